"""Dotted paths into a configuration: which exist, which decide a result, and where one lands.

`train.lr` always lands on the learning rate. A setting of a section with a `name` lands only if the chosen
class has it: `method.shape` does nothing for `svd`. A control that wraps another method (`random_init`) hands
on what it has no field for, so one axis over shapes reaches it and the methods it is a control for.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, get_args, get_type_hints

from pipeline.config.load import merge, with_name
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError

WRAPPED = "of"
"""The field of a wrapping method that holds the wrapped one."""


@cache
def known_paths() -> Mapping[str, bool]:
    """Every dotted path of a run config, sections included, and whether it takes part in identity."""
    return MappingProxyType(dict(_walk(RunConfig, "", identity=True)))


def require_path(path: str, *, where: str) -> None:
    """Raise ConfigError, with the nearest valid path, for one that no class of the config has."""
    known = known_paths()
    if path in known:
        return
    leaf = path.rpartition(".")[2]
    same_leaf = sorted((each for each in known if each.rpartition(".")[2] == leaf), key=len)
    near = (
        difflib.get_close_matches(path, known, n=1, cutoff=0.75)
        or same_leaf
        or difflib.get_close_matches(path, known, n=1)
    )
    hint = f"did you mean {near[0]!r}?" if near else f"sections are {', '.join(_sections())}"
    raise ConfigError(f"{where}: no setting is called {path!r}; {hint}")


def landing(table: Mapping[str, Any], path: str) -> str | None:
    """Where `path` lands in a raw config table, or None if the chosen classes have no such setting."""
    kind: Any = RunConfig
    place: list[str] = []
    value: Any = table
    for part in path.split("."):
        if not is_dataclass(kind):
            return None
        names = {item.name: item for item in fields(kind)}
        if part not in names and WRAPPED in names:
            value, kind = _enter(value, kind, names[WRAPPED])
            place.append(WRAPPED)
            names = {item.name: item for item in fields(kind)}
        if part not in names:
            return None
        value, kind = _enter(value, kind, names[part])
        place.append(part)
    return ".".join(place)


def lay(table: Mapping[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a raw config table with `value` at `path`; ConfigError if it lands nowhere.

    A section is laid as a file would lay it: over one of the same `name`, in place of one of another.
    """
    place = landing(table, path)
    if place is None:
        section, _, leaf = path.partition(".")
        chosen = table.get(section, {}).get("name", "this section")
        raise ConfigError(f"{path}: {chosen} has no setting {leaf!r}")
    *outer, last = place.split(".")
    above: Any = {last: with_name(last, value) if not outer else value}
    for part in reversed(outer):
        above = {part: above}
    return merge(_named_default(table, outer), above)


def value_at(table: Mapping[str, Any], path: str) -> Any:
    """The value that `path` lands on in a complete config table; None if it lands nowhere."""
    place = landing(table, path)
    value: Any = table
    for part in place.split(".") if place else ():
        value = value[part]
    return value if place else None


def _named_default(table: Mapping[str, Any], outer: list[str]) -> dict[str, Any]:
    """`table` with the wrapped method named where it is about to be changed and was left to its default."""
    if outer[:2] != ["method", WRAPPED]:
        return dict(table)
    method = dict(table["method"])
    method[WRAPPED] = {"name": _chosen(method.get(WRAPPED, {}), "kron_vl"), **method.get(WRAPPED, {})}
    return {**table, "method": method}


def _walk(kind: Any, prefix: str, *, identity: bool) -> Iterator[tuple[str, bool]]:
    hints = _hints(kind)
    for item in fields(kind):
        path, decides = f"{prefix}{item.name}", identity and item.metadata.get("identity", True)
        yield path, decides
        for member in _classes(hints[item.name]):
            yield from _walk(member, f"{path}.", identity=decides)


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _classes(hint: Any) -> list[Any]:
    """The dataclasses that a field may hold: one, the members of a union, or none for a plain value."""
    return [each for each in (hint, *get_args(hint)) if isinstance(each, type) and is_dataclass(each)]


def _enter(value: Any, kind: Any, item: Field[Any]) -> tuple[Any, Any]:
    """The value of a field in a raw table, and the class that stands there (None for a plain value)."""
    inner = value.get(item.name, {}) if isinstance(value, Mapping) else {}
    members = _classes(_hints(kind)[item.name])
    if len(members) < 2:
        return inner, members[0] if members else None
    default = item.default_factory().name if item.default_factory is not MISSING else ""
    name = _chosen(inner, default)
    return inner, next((each for each in members if _name_of(each) == name), None)


def _chosen(section: Any, default: str) -> str:
    return section if isinstance(section, str) else str(section.get("name", default))


def _name_of(member: Any) -> str:
    return next(str(item.default) for item in fields(member) if item.name == "name")


def _sections() -> list[str]:
    return [item.name for item in fields(RunConfig)]
