"""`krony report`: records to tables, plots and one page, on a laptop, without torch or Ray."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import Arguments, parse
from pipeline.progress import say


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("report"), help="folder to write (default: report)")
    parser.add_argument("--sweep", metavar="NAME", help="report this sweep: name, address, or its file")
    parser.add_argument("--explain", metavar="CELL", help="where one number comes from: ROW:COLUMN")
    parser.add_argument("--sync", action="store_true", help="also tell MLflow every run that it missed")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report of a store; with a config, of that study's scores only; or that of one sweep."""
    arguments = parse("report", argv, about=__doc__, extend=_options)
    if arguments.options.sweep:
        _sweep(arguments)
    else:
        _store(arguments)
    if arguments.options.sync:
        from pipeline.store.artifacts import Store
        from pipeline.tracking.sync import sync

        first = arguments.study.first
        told = sync(Store(first.store), uri=first.tracking.uri, experiment=first.tracking.experiment)
        say("mlflow", f"{len(told)} runs are complete there")
    return 0


def _sweep(arguments: Arguments) -> None:
    from analysis.sweep_report import write_sweep_report

    options = arguments.options
    store, name = arguments.study.first.store, options.sweep
    if name.endswith(".toml"):
        from pipeline.config.sweep import load_sweep
        from pipeline.sweep.identity import sweep_identity

        study = load_sweep(Path(name))
        store, name = study.first.store, sweep_identity(study).address
    report = write_sweep_report(store, name, options.out)
    print(report.json() if arguments.json else report.table)
    if not arguments.quiet and not arguments.json:
        print(f"\nreport    {report.html}\n          {report.markdown}")
        if report.best:
            print(f"best      krony train {report.best}")


def _store(arguments: Arguments) -> None:
    from analysis.report import explained, write_report
    from pipeline.chain import chain

    study, options = arguments.study, arguments.options
    links = [chain(config) for config in study.configs if options.config]
    found = [i.address for link in links for i in (*link.teacher_scores.values(), *link.scores.values())]
    store, scores = study.first.store, list(dict.fromkeys(found))
    if options.explain:
        origin = explained(store, options.explain, scores=scores)
        print(origin.json() if arguments.json else origin.text())
        return
    report = write_report(store, options.out, scores=scores, comparisons=study.comparisons)
    print(report.json() if arguments.json else report.table)
    if not arguments.quiet and not arguments.json:
        print(f"\nreport    {report.html}\n          {report.markdown}")


if __name__ == "__main__":
    raise SystemExit(cli.run("report"))
