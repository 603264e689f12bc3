"""`krony sweep CONFIG`: plan and run every trial of a sweep, and write its table."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import parse_words
from pipeline.config.sweep import load_sweep
from pipeline.errors import ConfigError


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
    raise ConfigError("running a sweep is not possible yet; use --plan")


if __name__ == "__main__":
    raise SystemExit(cli.run("sweep"))
