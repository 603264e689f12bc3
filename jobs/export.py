"""`krony export`: trained model to folders that others can load, each reopened and compared."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import parse
from pipeline.errors import ConfigError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, help="copy the folders to OUT/<variant>, model cards with the scores known by now"
    )
    parser.add_argument(
        "--nanogpt", action="store_true", help="with --out: also the dense form as nanoGPT's ckpt.pt"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Export every variant of a config; what it needs and is not there is built first."""
    arguments = parse("export", argv, about=__doc__, extend=_options)
    out: Path | None = arguments.options.out
    if arguments.options.nanogpt and out is None:
        raise ConfigError("--nanogpt adds a file to what --out writes; name a folder with --out")
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.plan import describe
    from pipeline.work import Work

    work = Work.on(
        arguments.study.first, force=frozenset({"model"} if arguments.force else ()), quiet=arguments.quiet
    )
    if arguments.plan:
        print(describe(arguments.study, as_json=arguments.json))
        return 0
    with session():
        for config in arguments.study.configs:
            variant = work.variant(config)
            record = stages.model(variant).record
            if out is not None:
                stages.hand_out(variant, out / config.name, nanogpt=arguments.options.nanogpt)
            if arguments.json:
                print(json.dumps({"address": record.address, **record.metrics}))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("export"))
