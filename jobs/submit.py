"""`krony submit VERB CONFIG …`: the same command as a job on a Ray cluster."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from jobs import cli
from pipeline.config.arguments import LineParser
from pipeline.errors import hide_passwords


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = LineParser(prog="krony submit", description=__doc__, allow_abbrev=False)
    parser.add_argument("--address", default="", help="URL of the dashboard (default: RAY_ADDRESS)")
    parser.add_argument(
        "--python", default="python", help="interpreter on the nodes (default: the first on their PATH)"
    )
    parser.add_argument("--plan", action="store_true", help="show what would be sent, and send nothing")
    parser.add_argument("--follow", action="store_true", help="show its output until it ends; its exit code")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("verb", choices=[verb for verb in cli.VERBS if verb not in ("submit", "job")])
    parser.add_argument("config", type=Path, help="TOML file, below the project")
    parser.add_argument("words", nargs=argparse.REMAINDER, metavar="…", help="what else the verb is told")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Show what is sent, start the job, and say how to follow it; a job that runs already is left alone."""
    asked = _parse(argv)
    from pipeline import submit
    from pipeline.dashboard import dashboard_address

    study = submit.read_study(asked.config, asked.words)
    name = submit.submission_id(asked.verb, study)
    upload = submit.plan_upload()
    command = submit.entrypoint(
        asked.verb, asked.config, asked.words, study=study, upload=upload, python=asked.python
    )
    if asked.plan and asked.json:
        print(json.dumps({"id": name, "command": command, "files": dict(upload.files)}))
        return 0
    if not asked.json:
        print(f"upload    {len(upload.files)} files, {upload.size_bytes / 2**20:.1f} MiB of {upload.folder}")
        print(f"command   {command}\nstore     {submit.store_of(study)}")
    if asked.plan:
        print(f"job       {name}")
        return 0
    job = submit.submit(dashboard_address(asked.address), name, command, upload)
    if asked.json:
        print(json.dumps({"id": job.id, "is_new": job.is_new, "address": hide_passwords(job.address)}))
        return 0
    print(f"job       {job.id}{'' if job.is_new else ' runs already'}")
    print(f"follow    {job.follow()}\nstop      {job.stop()}", flush=True)
    if not asked.follow:
        return 0
    state = submit.follow(job.address, job.id, lambda text: print(text, end="", flush=True))
    print(f"job       {state.id} {state.status.lower()}")
    return state.exit_code


if __name__ == "__main__":
    raise SystemExit(cli.run("submit"))
