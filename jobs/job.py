"""`krony job list|follow|stop [NAME]`: the jobs that `krony submit` started on a Ray cluster."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict

from jobs import cli
from pipeline.config.arguments import LineParser
from pipeline.errors import ConfigError


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = LineParser(prog="krony job", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["list", "follow", "stop"])
    parser.add_argument("name", nargs="?", default="", help="the name that `krony submit` printed")
    parser.add_argument("--address", default="", help="URL of the dashboard (default: RAY_ADDRESS)")
    parser.add_argument("--json", action="store_true", help="print the state as JSON")
    asked = parser.parse_args(argv)
    if bool(asked.name) == (asked.what == "list"):
        raise ConfigError(
            f"krony job {asked.what}: expected {'no name' if asked.name else 'the name of a job'}"
        )
    return asked


def main(argv: Sequence[str] | None = None) -> int:
    """List our jobs, show what one writes until it ends, or end it.

    The exit code of `follow` is that of the job: 0 succeeded, 130 stopped, else that of its command. `stop`
    ends with 0 once the job is over, with 1 if it is not after two minutes.
    """
    asked = _parse(argv)
    from pipeline import submit
    from pipeline.dashboard import dashboard_address

    address = dashboard_address(asked.address)
    if asked.what == "list":
        known = submit.jobs(address)
        if asked.json:
            print(json.dumps([asdict(job) for job in known]))
        for job in () if asked.json else known:
            print(f"{job.id:<32}{job.status.lower():<11}{job.started:<27}{job.command}")
        return 0
    if asked.what == "follow":
        quiet = (lambda _: None) if asked.json else (lambda text: print(text, end="", flush=True))
        state = submit.follow(address, asked.name, quiet)
    else:
        state = submit.stop(address, asked.name)
    print(json.dumps(asdict(state)) if asked.json else f"job       {state.id} {state.status.lower()}")
    return state.exit_code if asked.what == "follow" else int(not state.is_over)


if __name__ == "__main__":
    raise SystemExit(cli.run("job"))
