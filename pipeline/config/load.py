"""From TOML files and flags to one validated `RunConfig` per variant.

Precedence: flags > file > `extends` > defaults. Files merge into one mapping (tables merge, arrays replace,
and a table whose `name` differs from the one below it replaces it whole); and pydantic validates all of it
strictly, flags included. Unknown keys and wrong types are one line with the path and the nearest valid name.
Paths in a file are relative to it, and may name `$VARIABLES`, but no secret ones: places are recorded.
"""

import copy
import difflib
import json
import math
import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import TypeAdapter, ValidationError

from pipeline.config.schema import RunConfig
from pipeline.errors import SECRET, ConfigError

UNIONS = ("corpus", "tokenizer", "teacher", "method")
"""Sections whose `name` chooses the class."""
_PATH_FIELDS = (
    ("", "store"),
    ("", "sweeps"),
    ("corpus", "paths"),
    ("corpus", "validation_paths"),
    ("tokenizer", "path"),
    ("eval", "texts"),
    ("eval", "tasks"),
)
_NAME_OR_PATH_FIELDS = (("corpus", "repo"), ("teacher", "id"))
"""A hub id, unless it is written as a path: `./…`, `../…`, `/…`, `~…`, or with a `$VARIABLE`."""

DEEPEST = 32
"""Tables within each other that a file or a flag may have."""

FILE_FIELDS = (*_PATH_FIELDS, *_NAME_OR_PATH_FIELDS)
"""Section and key of every field that may lead to files."""


@dataclass(frozen=True, slots=True)
class Study:
    """What one config file asks for: its variants in order; a file without `[[variants]]` has one."""

    configs: tuple[RunConfig, ...]
    source: str
    sweeps: tuple[Path, ...] = ()
    """Files of sweeps that `krony run` adds to the table: `sweeps = ["sweeps/main.toml"]`."""

    comparisons: tuple[tuple[str, str], ...] = ()
    """Pairs of variants that the study is made to decide: `comparisons = [["van-loan", "svd"]]`."""

    @property
    def first(self) -> RunConfig:
        """The config that speaks for what all variants share."""
        return self.configs[0]


def load_study(path: Path | None, *, overrides: Sequence[str] = ()) -> Study:
    """Read a config file (None: defaults) and lay `--section.field value` flags on top of every variant.

    Raises ConfigError with file, key, what was wrong and what was expected.
    """
    raw = read_toml(path) if path else {}
    flags = flag_table(overrides, base=Path.cwd())
    source = str(path) if path else "defaults"
    variants = raw.pop("variants", None)
    if variants is not None and not variants:
        raise ConfigError(f"{source}: variants must be an array of tables: [[variants]]")
    sweeps = raw.pop("sweeps", [])
    if not isinstance(sweeps, list) or not all(isinstance(each, str) for each in sweeps):
        raise ConfigError(f"{source}: sweeps={sweeps!r} must be an array of names of sweep files")
    comparisons = raw.pop("comparisons", [])
    configs = []
    for table in variants or [{}]:
        merged = merge(merge(raw, table), flags)
        configs.append(validate(merged, source=source))
    names = [config.name for config in configs]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"{source}: {names.count(name)} variants are named {name!r}; give each its own name"
            )
    return Study(tuple(configs), source, tuple(map(Path, sweeps)), _pairs(comparisons, names, source))


def _pairs(raw: Any, variants: Sequence[str], source: str) -> tuple[tuple[str, str], ...]:
    """Declared comparisons; raises ConfigError unless each names two variants of the study."""
    if not isinstance(raw, list) or not all(isinstance(each, list) and len(each) == 2 for each in raw):
        raise ConfigError(f'{source}: comparisons={raw!r} must be pairs of variants: [["van-loan", "svd"]]')
    for first, second in raw:
        for name in (first, second):
            if name not in variants:
                near = difflib.get_close_matches(str(name), variants, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(variants)}"
                raise ConfigError(f"{source}: comparisons: no variant is named {name!r}; {hint}")
        if first == second:
            raise ConfigError(f"{source}: comparisons: {first!r} is compared with itself; name two")
    return tuple((first, second) for first, second in raw)


def read_toml(path: Path, *, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """One file and everything that it extends, merged; relative paths become absolute."""
    try:
        path = path.expanduser().resolve()
    except (RuntimeError, ValueError) as err:
        raise ConfigError(f"{str(path)!r}: no place of a config file ({err})") from err
    if path in seen:
        chain = " → ".join(p.name for p in (*seen, path))
        raise ConfigError(f"{path}: extends itself ({chain}); remove one `extends`")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.toml")], n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ConfigError(f"{path}: no such config file{hint}") from None
    except (ValueError, OSError, RecursionError) as err:
        raise ConfigError(f"{path}: not a readable TOML file ({err})") from err
    _require_plain(table, source=str(path), left=DEEPEST)
    variants = table.get("variants", [])
    if not isinstance(variants, list) or not all(isinstance(each, dict) for each in variants):
        raise ConfigError(f"{path}: variants must be an array of tables: [[variants]]")
    for part in [table, *variants]:
        _make_absolute(part, base=path.parent)
    _make_axes_absolute(table, base=path.parent)
    parent = table.pop("extends", None)
    if parent is None:
        return table
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends={parent!r} must be the name of one file")
    below = read_toml(path.parent / parent, seen=(*seen, path))
    if "variants" in table:  # comparisons are between variants: other ones need their own
        below.pop("comparisons", None)
    return merge(below, table)


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` laid over `below`; a table with another `name` in a union section replaces the one below."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            other = (
                key in (*UNIONS, "of") and "name" in value and value["name"] != old.get("name", value["name"])
            )
            result[key] = dict(value) if other else merge(old, value)
        else:
            result[key] = value
    return result


def validate(table: Mapping[str, Any], *, source: str) -> RunConfig:
    """A mapping as a RunConfig; raises ConfigError for unknown keys, wrong types and impossible values."""
    if "sweep" in table:
        raise ConfigError(f"{source}: has a [sweep] section; it is for `krony sweep {source}`")
    require_finite(table, source=source)
    named = {key: with_name(key, value) for key, value in table.items()}
    try:
        return _ADAPTER.validate_json(json.dumps(named))
    except ValidationError as err:
        raise ConfigError(
            "; ".join(explain(each, source, root=RunConfig()) for each in err.errors(include_url=False)[:4])
        ) from err
    except ConfigError as err:
        raise ConfigError(f"{source}: {err}") from err
    except OverflowError as err:
        raise ConfigError(f"{source}: a number is beyond all measure ({err}); correct it") from err
    except TypeError as err:
        raise ConfigError(
            f"{source}: {err}; dates and other TOML types without a JSON form have no use here"
        ) from err


def require_finite(value: Any, *, source: str, path: str = "") -> None:
    """Raise ConfigError for the first `nan` or `inf` below `path`: TOML has them, no setting means them."""
    if isinstance(value, Mapping):
        for key, each in value.items():
            require_finite(each, source=source, path=f"{path}.{key}" if path else str(key))
    elif isinstance(value, list):
        for each in value:
            require_finite(each, source=source, path=path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{source}: {path}={value} is wrong; expected a finite number")


def _require_plain(value: Any, *, source: str, left: int) -> None:
    """Raise ConfigError for tables within each other without end, and for text that no path can hold."""
    if left == 0:
        raise ConfigError(f"{source}: more than {DEEPEST} tables within each other; no setting lies so deep")
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{source}: {value!r:.80} holds a NUL character; remove it")
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    for each in parts if isinstance(parts, list) else ():
        _require_plain(each, source=source, left=left - 1)


def to_json(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain JSON, for records and `--plan`."""
    return json.loads(_ADAPTER.dump_json(config))  # type: ignore[no-any-return]


def flag_table(flags: Sequence[str], *, base: Path) -> dict[str, Any]:
    """`["--train.max-steps", "20", "--seed=1"]` as the nested table that a file would hold.

    A value is read as TOML (`20`, `[4, 8]`, `true`, `{ name = "svd" }`) and else as a plain string.
    """
    table: dict[str, Any] = {}
    words = list(flags)
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            raise ConfigError(
                f"command line: {word!r} is not an option; config fields are set as --section.field VALUE"
            )
        path, equals, value = word[2:].partition("=")
        if not equals:
            if not words:
                raise ConfigError(f"command line: {word} needs a value")
            value = words.pop(0)
        *sections, leaf = path.replace("-", "_").split(".")
        inner = table
        for section in sections:
            if isinstance(inner.get(section), str):
                inner[section] = {"name": inner[section]}  # `--teacher hub --teacher.id …`
            inner = inner.setdefault(section, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"command line: {word} and --{section} {inner!r} exclude each other")
        found = _toml_value(value)
        if isinstance(inner.get(leaf), dict) and isinstance(found, str):
            inner[leaf]["name"] = found
        else:
            inner[leaf] = found
    _require_plain(table, source="command line", left=DEEPEST)
    _make_absolute(table, base=base)
    _make_axes_absolute(table, base=base)
    return table


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        return text


_ADAPTER: TypeAdapter[RunConfig] = TypeAdapter(RunConfig)


def with_name(key: str, value: Any) -> Any:
    """A union section without a `name` means the default one; a bare word is a name."""
    if key in UNIONS and isinstance(value, str):
        return {"name": value}
    if key in UNIONS and isinstance(value, Mapping) and "name" not in value:
        return {"name": getattr(RunConfig(), key).name, **value}
    return value


def explain(error: Mapping[str, Any], source: str, *, root: Any) -> str:
    """One of pydantic's errors as a line: where, what was found, what was expected; `root` is the config."""
    # pydantic puts the chosen member of a union into the path; people never wrote it
    parts = [str(part) for part in error["loc"]]
    names = [part for i, part in enumerate(parts) if not (i == 1 and parts[0] in UNIONS and len(parts) > 1)]
    where, found = ".".join(names), error.get("input")
    if error["type"] == "unexpected_keyword_argument":
        valid = _valid_names(parts, root)
        near = difflib.get_close_matches(names[-1], valid, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"expected one of: {', '.join(valid)}"
        return f"{source}: unknown key {where!r}; {hint}"
    if error["type"] == "union_tag_invalid":
        context = error["ctx"]
        near = difflib.get_close_matches(
            str(context["tag"]), re.findall(r"'([^']+)'", context["expected_tags"]), n=1
        )
        hint = f"; did you mean {near[0]!r}?" if near else ""
        return f"{source}: {where}.name={context['tag']!r} is not one of {context['expected_tags']}{hint}"
    message = str(error["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{source}: {where}={found!r} is wrong; expected {message}"


def _valid_names(parts: Sequence[str], root: Any) -> list[str]:
    """Field names of the dataclass in which the last of `parts` was not found."""
    value: Any = root
    for part in parts[:-1]:
        if is_dataclass(value) and part in {f.name for f in fields(value)}:
            value = _union_members(part) if part in UNIONS else getattr(value, part)
        elif isinstance(value, Mapping) and part in value:
            value = value[part]
    if isinstance(value, _Member):
        return list(value.fields)
    return [f.name for f in fields(value)] if is_dataclass(value) else []


def _union_members(section: str) -> dict[str, Any]:
    annotated = get_type_hints(RunConfig, include_extras=False)[section]
    return {member.name: member for member in map(_Member, get_args(annotated))}


class _Member:
    """The name and the fields of one dataclass of a union, without an instance of it."""

    def __init__(self, kind: Any) -> None:
        self.fields = {f.name: f for f in fields(kind)}
        self.name = str(self.fields["name"].default)


def _make_absolute(table: dict[str, Any], *, base: Path) -> None:
    for section, key in _PATH_FIELDS:
        _absolute(table, section, key, base=base)
    for section, key in _NAME_OR_PATH_FIELDS:
        part = table.get(section)
        if isinstance(part, dict) and str(part.get(key, "")).startswith((".", "/", "~", "$")):
            _absolute(table, section, key, base=base)


def _make_axes_absolute(table: dict[str, Any], *, base: Path) -> None:
    """The same for what `[sweep]` lays over the config: every value of an axis, every table of `skip`."""
    sweep = table.get("sweep")
    if not isinstance(sweep, dict):
        return
    if isinstance(axes := sweep.get("axes"), dict):
        sweep["axes"] = _laid_absolute(axes, "", base=base, are_lists=True)
    if isinstance(skip := sweep.get("skip"), list):
        sweep["skip"] = [
            _laid_absolute(each, "", base=base) if isinstance(each, dict) else each for each in skip
        ]


def _laid_absolute(
    values: Mapping[str, Any], prefix: str, *, base: Path, are_lists: bool = False
) -> dict[str, Any]:
    """Values by dotted path, or by nested tables, as if each stood in the config by itself."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found[key] = _laid_absolute(value, f"{path}.", base=base, are_lists=are_lists)
        elif are_lists and isinstance(value, list):
            found[key] = [_value_absolute(path, each, base=base) for each in value]
        else:
            found[key] = _value_absolute(path, value, base=base)
    return found


def _value_absolute(path: str, value: Any, *, base: Path) -> Any:
    section, _, leaf = path.partition(".")
    part = {section: {leaf: value} if leaf else copy.deepcopy(value)}
    _make_absolute(part, base=base)
    return part[section][leaf] if leaf else part[section]


def _absolute(table: dict[str, Any], section: str, key: str, *, base: Path) -> None:
    part = table.get(section) if section else table
    if not isinstance(part, dict) or key not in part:
        return
    value = part[key]
    if isinstance(value, str) and value:
        part[key] = value if "://" in value else _absolute_path(value, base)
    elif isinstance(value, list) and all(isinstance(each, str) for each in value):
        part[key] = [_absolute_path(each, base) for each in value]


def _absolute_path(text: str, base: Path) -> str:
    for name in re.findall(r"\$\{?(\w+)", text):
        if SECRET.search(name):
            raise ConfigError(
                f"{text}: ${name} looks like a secret, and places are recorded; use another name"
            )
    try:
        home = str(Path(text).expanduser())
    except RuntimeError as err:
        raise ConfigError(f"{text}: nobody's home ({err}); write the path out") from err
    # normpath, not resolve: a glob pattern must stay one, and a symbolic link must keep its name
    return os.path.normpath(base / os.path.expandvars(home))
