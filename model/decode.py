"""Plain JSON values as frozen dataclasses, strictly: unknown or missing keys and wrong types name their path.

A union of dataclasses is told apart by their field `kind`, a `Literal` of one word. Text from a file becomes
such values by `parse_json`, which has one error for all that can be wrong with it.
"""

import json
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints


def parse_json(data: bytes | str) -> Any:
    """The value of a JSON text; ValueError for all else: not UTF-8, NaN and infinities, nested too deeply."""
    try:
        return json.loads(data, parse_constant=_no_number)
    except RecursionError as err:
        raise ValueError("nested too deeply") from err


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number in JSON")


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`; raises ValueError with the path `where` and what was expected."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is UnionType:
        known = {get_args(get_type_hints(arg)["kind"])[0]: arg for arg in args}
        name = value.get("kind") if isinstance(value, dict) else None
        if not isinstance(name, str) or name not in known:
            raise ValueError(f"{where}.kind is {name!r}, expected one of {', '.join(known)}")
        return decode(known[name], value, where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where} is {value!r}, expected one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is {type(value).__name__}, expected a list")
        kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
        if len(kinds) != len(value):
            raise ValueError(f"{where} has {len(value)} items, expected {len(kinds)}")
        return tuple(
            decode(each, item, f"{where}[{i}]")
            for i, (each, item) in enumerate(zip(kinds, value, strict=True))
        )
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    if kind is float and type(value) is int and abs(value) < 2**53:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {value!r}, expected {kind.__name__}")
    return value


def _decode_dataclass(kind: Any, value: Any, where: str) -> Any:
    """An object whose keys are exactly the fields of `kind`."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {type(value).__name__}, expected an object")  # noqa: TRY004 - bad data
    names = [field.name for field in fields(kind)]
    if unknown := sorted(set(value) - set(names)):
        raise ValueError(
            f"{where} has unknown key {unknown[0]!r}; it was written by another version of krony"
        )
    if missing := [name for name in names if name not in value]:
        raise ValueError(f"{where} lacks key {missing[0]!r}; the file is incomplete")
    hints = get_type_hints(kind)
    return kind(**{name: decode(hints[name], value[name], f"{where}.{name}") for name in names})
