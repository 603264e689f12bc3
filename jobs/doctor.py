"""`krony doctor`: is this machine, cluster, store and tracker ready? What is wrong gets one line."""

import argparse
import json
from collections.abc import Sequence

from jobs import cli
from pipeline.config.arguments import parse


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--verify", action="store_true", help="hash every file of every artifact again")
    parser.add_argument("--no-ray", action="store_true", help="do not start or join Ray")


def main(argv: Sequence[str] | None = None) -> int:
    """Run all checks; exit code 3 if one failed."""
    arguments = parse("doctor", argv, about=__doc__, extend=_options)
    from pipeline.doctor import checkup

    findings = checkup(
        arguments.study.first, with_ray=not arguments.options.no_ray, verify=arguments.options.verify
    )
    for finding in findings:
        row = {"check": finding.check, "ok": finding.ok, "text": finding.text}
        print(
            json.dumps(row)
            if arguments.json
            else f"{'ok' if finding.ok else 'FAIL':<6}{finding.check:<12}{finding.text}"
        )
    return 0 if all(finding.ok for finding in findings) else 3


if __name__ == "__main__":
    raise SystemExit(cli.run("doctor"))
