"""Identity: which fields of a config decide a result.

A dataclass becomes plain JSON without the fields that are marked `NOT_IDENTITY`; what is left is what a
fingerprint is made of. Pure, and loads nothing.
"""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any


def identity_fields(value: Any) -> Any:
    """`value` as JSON: dataclasses become mappings without non-identity fields, tuples become lists."""
    if is_dataclass(value) and not isinstance(value, type):
        kept = (f for f in fields(value) if f.metadata.get("identity", True))
        return {f.name: identity_fields(getattr(value, f.name)) for f in kept}
    if isinstance(value, Mapping):
        return {str(key): identity_fields(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [identity_fields(item) for item in value]
    return value


def differing(first: Any, second: Any, *, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Leaves at which two JSON values differ, by dotted path: what `shape=… init=…` names are made of."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for key in sorted({*first, *second}):
            path = f"{prefix}.{key}" if prefix else str(key)
            found |= differing(first.get(key), second.get(key), prefix=path)
        return found
    return {} if first == second else {prefix: (first, second)}
