"""`krony sweep CONFIG`: plan and run every trial of a sweep, and write its table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import parse_words
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError
from pipeline.progress import say


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--no-probe", action="store_true", help="plan without measuring training steps")
    parser.add_argument("--retry-failed", action="store_true", help="run trials again that failed")
    parser.add_argument(
        "--out", type=Path, default=Path("report"), help="folder for the report (default: report)"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Show every trial with size, start and time; or run them, skipping what is done."""
    options, overrides = parse_words("sweep", argv, about=__doc__, extend=_options)
    if options.config is None:
        raise ConfigError("name a config with a [sweep] section, such as configs/sweeps/smoke.toml")
    study = load_sweep(options.config, overrides=overrides)
    if options.plan:
        from pipeline.sweep.plan import plan
        from pipeline.sweep.plan_text import as_json, text
        from pipeline.sweep.space import space_of

        planned = plan(study, space_of(study), probe=not options.no_probe, quiet=options.quiet)
        print(json.dumps(as_json(planned), indent=1) if options.json else text(planned))
        return 0
    from pipeline.sweep.run import run_sweep

    artifact = run_sweep(study, retry_failed=options.retry_failed, quiet=options.quiet)
    from analysis.sweep_report import write_sweep_report

    record = artifact.record
    report = write_sweep_report(study.first.store, record.address, options.out)
    print(report.json() if options.json else report.table)
    if not options.quiet and not options.json:
        print(f"\nreport    {report.html}\n          {report.markdown}")
        if report.best:
            print(f"best      krony train {report.best}")
    if failed := record.metrics["failed"]:
        why = f"`krony status {options.config}` says why, `--retry-failed` runs them again"
        say("sweep", f"{failed} of {record.metrics['trials']} trials failed; {why}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(cli.run("sweep"))
