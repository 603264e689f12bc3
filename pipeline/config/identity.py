"""Identity: which fields of a config decide a result.

A dataclass becomes plain JSON without the fields that are marked `NOT_IDENTITY`, and without those marked
`UNLESS_DEFAULT` where they have their default; what is left is what a fingerprint is made of. Pure, and loads
nothing.
"""

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any

from model.marks import UNLESS_DEFAULT


def identity_fields(value: Any) -> Any:
    """`value` as JSON: dataclasses become mappings of what counts, tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = (each for each in fields(value) if _counts(each, getattr(value, each.name)))
        return {each.name: identity_fields(getattr(value, each.name)) for each in kept}
    if isinstance(value, Mapping):
        return {str(key): identity_fields(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity_fields(item) for item in value]
    return value


def _counts(item: Field[Any], value: Any) -> bool:
    """Whether a field with this value takes part."""
    rule = item.metadata.get("identity", True)
    if rule == UNLESS_DEFAULT["identity"]:
        return bool(value != item.default)
    return bool(rule)


def differing(first: Any, second: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves at which two JSON values differ, by dotted path: what `shape=… init=…` names are made of.

    Where one of them has no table, every leaf of the other's differs from None.
    """
    tables = [each for each in (first, second) if isinstance(each, Mapping)]
    if tables and all(isinstance(each, Mapping) or each is None for each in (first, second)):
        left, right = first or {}, second or {}
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*left, *right}):
            path = f"{prefix}.{key}" if prefix else str(key)
            found |= differing(left.get(key), right.get(key), prefix=path)
        return found
    return {} if first == second else {prefix: (first, second)}
