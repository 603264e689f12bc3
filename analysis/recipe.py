"""A resolved config as a TOML file that `krony train` takes as it is.

The standard library reads TOML and does not write it, and what a config holds is little: numbers, words,
lists, tables. So the writer is here, and it is held to being read back as the very same config.
"""

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from pipeline.config.load import to_json, validate
from pipeline.errors import KronyError

_BARE = re.compile(r"[A-Za-z0-9_-]+")


def recipe(config: Mapping[str, Any], *, about: str = "") -> str:
    """A resolved config (`pipeline.config.load.to_json`) as TOML; `about` becomes comments on top.

    Raises ConfigError for what is no config, and KronyError if TOML cannot hold it exactly.
    """
    wanted = validate(config, source="the best recipe")
    comments = "".join(f"# {line}".rstrip() + "\n" for line in about.splitlines())
    text = comments + ("\n" if comments else "") + to_toml(to_json(wanted))
    if validate(tomllib.loads(text), source="the written recipe") != wanted:
        raise KronyError(
            "the best recipe cannot be written as TOML without a change; take it from the record"
        )
    return text


def to_toml(table: Mapping[str, Any]) -> str:
    """Plain JSON as TOML, sections as tables; a value that is null is left out, as TOML has none."""
    return _section(table, ()).lstrip("\n")


def _section(table: Mapping[str, Any], path: tuple[str, ...]) -> str:
    plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
    lines = [f"{_key(key)} = {_value(value)}" for key, value in plain.items() if value is not None]
    tables = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    head = [f"\n[{'.'.join(map(_key, path))}]"] if path and (lines or not tables) else []
    below = [_section(value, (*path, key)) for key, value in tables.items()]
    return "".join(f"{line}\n" for line in [*head, *lines]) + "".join(below)


def _key(key: str) -> str:
    return key if _BARE.fullmatch(key) else _string(key)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int | float):
        return repr(value)  # the shortest that is read back as the same number; `inf` and `nan` are TOML too
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, Mapping):
        inner = ", ".join(f"{_key(key)} = {_value(item)}" for key, item in value.items() if item is not None)
        return f"{{ {inner} }}" if inner else "{}"
    raise KronyError(f"{value!r} ({type(value).__name__}) has no form in TOML")


def _string(text: str) -> str:
    # a JSON string is a TOML string, but for one control character that TOML does not take raw
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
