"""`krony prepare`: corpus to tokenizer and shards of tokens."""

import argparse
import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--verify", action="store_true", help="hash every shard again, check ids and documents"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Build the tokens of a config; `--plan` shows shards, disk and time, `--verify` checks what is there."""
    arguments = parse("prepare", argv, about=__doc__, extend=_options)
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.work import Work

    force = frozenset({"corpus", "tokenizer", "tokens"} if arguments.force else ())
    work = Work.on(arguments.study.first, force=force, quiet=arguments.quiet)
    if arguments.plan:
        from pipeline.data.prepare import plan_tokens

        print(plan_tokens(work.config, work.chain.tokens, work.store))
        return 0
    with session():
        tokens = stages.tokens(work)
    if arguments.options.verify:
        from pipeline.data.verify import verify_tokens

        verify_tokens(tokens, stages.tokenizer(work), quiet=arguments.quiet)
    if arguments.json:
        print(json.dumps({"address": tokens.record.address, **tokens.record.metrics}))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("prepare"))
