"""`krony run`: the whole chain, from a corpus to the comparison table."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import parse
from pipeline.errors import KronyError


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for the report (default: report)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Build everything that a config asks for, skip what is done, and print the table."""
    arguments = parse("run", argv, about=__doc__, extend=_options)
    from pipeline import stages
    from pipeline.cluster import session
    from pipeline.config.sweep import load_sweep
    from pipeline.plan import describe
    from pipeline.store.records import KINDS
    from pipeline.sweep.run import run_sweep, scores_of
    from pipeline.tracking.tracker import resolve_uri, ui_command
    from pipeline.work import Work

    sweeps = [load_sweep(path, overrides=arguments.overrides) for path in arguments.study.sweeps]
    if arguments.plan:
        print(describe(arguments.study, as_json=arguments.json))
        for sweep in () if arguments.json else sweeps:
            print(f"{'sweep':<11}{sweep.name}: `krony sweep {sweep.source} --plan` shows its trials")
        return 0
    work = Work.on(
        arguments.study.first, force=frozenset(KINDS if arguments.force else ()), quiet=arguments.quiet
    )
    for config in arguments.study.configs:
        stages.require_speed(work.variant(config))
    with session():
        stages.tokens(work)
        addresses = [s.record.address for s in stages.scores(work, of_teacher=True).values()]
        for config in arguments.study.configs:
            addresses += [s.record.address for s in stages.scores(work.variant(config)).values()]
        swept = [run_sweep(sweep, quiet=arguments.quiet) for sweep in sweeps]
    failed: KronyError | None = None
    for config in arguments.study.configs:
        try:
            if config.speed.enabled:  # now that Ray is gone
                stages.speed(work.variant(config))
        except KronyError as err:  # all else is done: it shall be in the report
            failed = failed or err
    addresses += [address for artifact in swept for address in scores_of(artifact)]
    from analysis.report import write_report

    pairs = arguments.study.comparisons
    report = write_report(work.store, arguments.options.out, scores=addresses, comparisons=pairs)
    print(report.json() if arguments.json else report.table)
    config = work.config
    print(f"\nreport    {report.html}\n          {report.markdown}", flush=True)
    if uri := resolve_uri(config.tracking.uri, store=config.store):
        print(f"mlflow    {ui_command(uri)}")
    if failed:
        raise failed
    return int(any(artifact.record.metrics["failed"] for artifact in swept))


if __name__ == "__main__":
    raise SystemExit(cli.run("run"))
