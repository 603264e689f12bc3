"""`krony eval`: model to scores, by protocol; the dense teacher is measured by the same code."""

import argparse
import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import Arguments, parse_words
from pipeline.config.load import load_study


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="show every protocol and what it means")
    parser.add_argument(
        "--protocol",
        action="append",
        metavar="ID",
        help="measure this one, and not what the config names; may be given several times",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Score every variant of a config, and its teacher; what it needs and is not there is built first."""
    options, words = parse_words("eval", argv, about=__doc__, extend=_options)
    if options.protocol:
        words += ["--eval.protocols", json.dumps(options.protocol)]
    arguments = Arguments(load_study(options.config, overrides=words), options, tuple(words))
    if arguments.options.list:
        from pipeline.evaluate.protocols import HARNESS, PROTOCOLS

        for protocol in PROTOCOLS.values():
            print(f"{protocol.id:<28}{protocol.description}")
        print(f"{HARNESS + '<task>':<28}Any other task of lm-evaluation-harness, or of a file in eval.tasks.")
        return 0
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.plan import describe
    from pipeline.work import Work

    if arguments.plan:
        print(describe(arguments.study, as_json=arguments.json))
        return 0
    work = Work.on(
        arguments.study.first, force=frozenset({"scores"} if arguments.force else ()), quiet=arguments.quiet
    )
    with session():
        found = list(stages.scores(work, of_teacher=True).values())
        for config in arguments.study.configs:
            found += stages.scores(work.variant(config)).values()
    for scores in found:
        row = {"address": scores.record.address, **scores.record.config, **scores.record.metrics}
        print(
            json.dumps(row)
            if arguments.json
            else f"{scores.record.name:<48}{scores.record.metrics['value']:>12.4f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("eval"))
