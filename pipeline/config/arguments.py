"""The command line that every verb shares.

    krony <verb> [CONFIG.toml] [--plan] [--force] [--quiet] [--json] [verb's own options] [--section.field
    VALUE …]

An option that the verb does not know is a config field; it is checked by the schema, so a typo gets a
suggestion.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from pipeline.config.load import Study, load_study
from pipeline.config.schema import RunConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Arguments:
    """What was asked for."""

    study: Study
    options: argparse.Namespace
    """The verb's own options beside `plan`, `force`, `quiet` and `json`."""
    overrides: tuple[str, ...] = ()
    """The words that set config fields; they are in the study already."""

    @property
    def plan(self) -> bool:
        """Show what would happen and do nothing."""
        return bool(self.options.plan)

    @property
    def force(self) -> bool:
        """Build again what is there."""
        return bool(self.options.force)

    @property
    def quiet(self) -> bool:
        """No progress lines."""
        return bool(self.options.quiet)

    @property
    def json(self) -> bool:
        """Results as JSON on stdout."""
        return bool(self.options.json)


class LineParser(argparse.ArgumentParser):
    """argparse that raises our one-line error instead of printing its usage."""

    def error(self, message: str) -> "None":  # type: ignore[override]
        """Raise a ConfigError; the caller names the verb."""
        raise ConfigError(f"{message}; see `{self.prog} --help`")


Extend = Callable[[argparse.ArgumentParser], None]


def parse(verb: str, argv: Sequence[str] | None, *, about: str, extend: Extend | None = None) -> Arguments:
    """Parse `argv`; raises ConfigError (exit code 2) for anything that is not understood."""
    options, overrides = parse_words(verb, argv, about=about, extend=extend)
    return Arguments(load_study(options.config, overrides=overrides), options, tuple(overrides))


def parse_words(
    verb: str, argv: Sequence[str] | None, *, about: str, extend: Extend | None = None
) -> tuple[argparse.Namespace, list[str]]:
    """The verb's options, `config` among them, and the words that set config fields; reads no file."""
    parser = LineParser(
        prog=f"krony {verb}",
        description=about,
        epilog="Any config field is an option too: --section.field VALUE (see configs/base.toml).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "config", nargs="?", type=Path, help="TOML file; without it the defaults of configs/base.toml"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be done, and do nothing")
    parser.add_argument("--force", action="store_true", help="build again what is already there")
    parser.add_argument("--quiet", action="store_true", help="no progress lines")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    if extend:
        extend(parser)
    own, overrides = _split(parser, list(sys.argv[1:] if argv is None else argv))
    return parser.parse_args(own), overrides


def _split(parser: argparse.ArgumentParser, words: list[str]) -> tuple[list[str], list[str]]:
    """Words of the verb, and the config fields with their values."""
    known = set(parser._option_string_actions)  # noqa: SLF001  (argparse has no public list of its options)
    sections = {f.name.replace("_", "-") for f in fields(RunConfig)}
    own: list[str] = []
    overrides: list[str] = []
    while words:
        word = words.pop(0)
        name = word.partition("=")[0]
        if not word.startswith("--") or name in known:
            own.append(word)
            continue
        if "." not in name and name[2:] not in sections:
            raise ConfigError(f"{parser.prog}: unknown option {name}; see `{parser.prog} --help`")
        overrides.append(word)
        if "=" not in word:
            if not words:
                raise ConfigError(f"{parser.prog}: {word} needs a value")
            overrides.append(words.pop(0))
    return own, overrides
