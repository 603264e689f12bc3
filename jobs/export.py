"""`krony export`: trained model to a stock GPT-2 folder and a native one, both reopened and compared."""

import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Export every variant of a config; what it needs and is not there is built first."""
    arguments = parse("export", argv, about=__doc__)
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
            record = stages.model(work.variant(config)).record
            if arguments.json:
                print(json.dumps({"address": record.address, **record.metrics}))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("export"))
