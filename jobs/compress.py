"""`krony compress`: teacher to compressed model, with the error of every replaced matrix."""

import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Compress the teacher as every variant of a config asks; it is built first if it is not there."""
    arguments = parse("compress", argv, about=__doc__)
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.plan import describe
    from pipeline.work import Work

    work = Work.on(
        arguments.study.first, force=frozenset({"init"} if arguments.force else ()), quiet=arguments.quiet
    )
    if arguments.plan:
        print(describe(arguments.study, as_json=arguments.json))
        return 0
    with session():
        for config in arguments.study.configs:
            record = stages.init(work.variant(config)).record
            if arguments.json:
                print(json.dumps({"address": record.address, **record.metrics}))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("compress"))
