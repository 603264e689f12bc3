"""`krony speed`: how fast each model reads and writes, and how much memory it takes, against its teacher."""

import json
import sys
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every variant of a config; what it needs and is not there is built first."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parse("speed", [*words, "--speed.enabled", "true"], about=__doc__)
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.plan import describe
    from pipeline.work import Work

    if arguments.plan:
        print(describe(arguments.study, as_json=arguments.json))
        return 0
    force = frozenset({"speed"} if arguments.force else ())
    work = Work.on(arguments.study.first, force=force, quiet=arguments.quiet)
    variants = [work.variant(config) for config in arguments.study.configs]
    for each in variants:
        stages.require_speed(each)
    with session():
        for each in variants:
            stages.model(each)
    records = [stages.speed(each).record for each in variants]  # no Ray beside a measurement
    if arguments.json:
        for record in records:
            known = {**record.config, **record.metrics, **record.settings}
            print(json.dumps({"address": record.address, **known}))
        return 0
    from analysis.speed import load_speeds, speed_text

    print(speed_text(load_speeds(work.store, [record.address for record in records])))
    return 0


if __name__ == "__main__":
    raise SystemExit(cli.run("speed"))
