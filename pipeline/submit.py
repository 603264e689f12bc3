"""A verb as a job on a Ray cluster: what is sent, under which name, whether it runs already, and how it ends.

What is sent is this checkout without what `.gitignore` and `.rayignore` name, as Ray itself reads them. The
name follows from verb, store and config, so the same work is never started twice at a time: Ray refuses a
name that is in use.
"""

import asyncio
import hashlib
import json
import logging
import os
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config.identity import identity_fields
from pipeline.config.load import Study, load_study
from pipeline.config.schema import RunConfig
from pipeline.dashboard import client_of, list_jobs, prepare, reason_of, said
from pipeline.errors import PreflightError, hide_passwords
from pipeline.store.location import Location
from pipeline.store.provenance import provenance, redact

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PROJECT = Path(__file__).resolve().parents[1]
LIMIT_BYTES = 100 * 2**20
"""What a dashboard takes in one upload."""

ENDED = ("STOPPED", "SUCCEEDED", "FAILED")
RETRY_S = 1.0
PATIENCE_S = 60.0
"""How long a dashboard may be away while a job is followed."""

STOP_S = 120
"""How long a job that is told to end may take to save its state, before Ray kills it; 3 s unless told."""


@dataclass(frozen=True, slots=True)
class Upload:
    """Files below a folder that a job would see."""

    folder: Path
    files: Mapping[str, int]
    """Relative path and size in bytes."""

    @property
    def size_bytes(self) -> int:
        """Before compression."""
        return sum(self.files.values())

    def largest(self, count: int) -> list[tuple[str, int]]:
        """The largest files, largest first."""
        return sorted(self.files.items(), key=lambda item: -item[1])[:count]


@dataclass(frozen=True, slots=True)
class Submission:
    """A job on a cluster."""

    id: str
    address: str
    is_new: bool
    """False when it was running already and nothing was sent."""

    def follow(self) -> str:
        """The command that shows its output until it ends."""
        return f"krony job follow {self.id} --address {hide_passwords(self.address)}"

    def stop(self) -> str:
        """The command that ends it; what is finished stays."""
        return f"krony job stop {self.id} --address {hide_passwords(self.address)}"


@dataclass(frozen=True, slots=True)
class JobState:
    """What a cluster says about one of its jobs."""

    id: str
    status: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    started: str
    """ISO time in UTC, to the second; empty before."""
    ended: str
    command: str
    code: int | None
    """Exit code of the command; None while it runs, or where it never ran."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self.status in ENDED

    @property
    def exit_code(self) -> int:
        """What to leave with: 0 succeeded, 130 stopped, else the code of the command, or 1."""
        if self.status == "SUCCEEDED":
            return 0
        if self.status == "STOPPED":
            return 130
        return self.code if self.code in (1, 2, 3, 130) else 1


def plan_upload(folder: Path = PROJECT, *, limit_bytes: int = LIMIT_BYTES) -> Upload:
    """What Ray would send of `folder`; raises PreflightError when it is more than a dashboard takes."""
    prepare()
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import (
        _dir_travel,
        _get_excludes,
    )  # Ray's own reading of the files

    files: dict[str, int] = {}

    def take(path: Path) -> None:
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = path.stat().st_size

    silent = logging.getLogger("krony.submit")
    silent.setLevel(logging.CRITICAL)
    excludes = [_get_excludes(folder, get_runtime_env_default_excludes())]
    with_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1"
    _dir_travel(folder, excludes, take, include_gitignore=with_gitignore, logger=silent)
    upload = Upload(folder, files)
    if upload.size_bytes > limit_bytes:
        most = ", ".join(f"{name} ({size / 2**20:.1f} MiB)" for name, size in upload.largest(3))
        raise PreflightError(
            f"{folder}: {upload.size_bytes / 2**20:.0f} MiB would be sent, a cluster takes "
            f"{limit_bytes / 2**20:.0f}; "
            f"the largest are {most}; move them away or name them in .rayignore, each with a leading /"
        )
    return upload


def submission_id(verb: str, study: Study) -> str:
    """`krony-<verb>-<8 hex digits>` of the store and of every field that decides a result."""
    decides = {
        "verb": verb,
        "configs": [identity_fields(each) for each in study.configs],
        "store": store_of(study),
    }
    canonical = json.dumps(decides, sort_keys=True, separators=(",", ":"))
    return f"krony-{verb}-{hashlib.sha256(canonical.encode()).hexdigest()[:8]}"


def store_of(study: Study) -> str:
    """Where the job will put its results: absolute, because a job runs in a folder of its own."""
    return Location.of(study.first.store).uri


def read_study(config: Path, words: Sequence[str]) -> Study:
    """What `config` and the fields among `words` ask for; options of the verb are checked where it runs."""
    sections = {field.name for field in fields(RunConfig)}
    overrides: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name.startswith("--") and name[2:].replace("-", "_").split(".")[0] in sections:
            overrides += [word] if equals or not rest else [word, rest.pop(0)]
    return load_study(config, overrides=overrides)


def entrypoint(
    verb: str, config: Path, words: Sequence[str], *, study: Study, upload: Upload, python: str
) -> str:
    """The command line of the job, quoted for a shell. `python` is looked up on the node, not here.

    Raises PreflightError for a config file that would not be sent, and for a password among the words: who
    sees the dashboard sees the command.
    """
    if redact(words) != list(words):
        raise PreflightError(
            f"{shlex.join(redact(words))}: a job's command is shown to all who see the dashboard; give "
            "secrets by the environment of the nodes: MLFLOW_TRACKING_USERNAME and _PASSWORD, PGPASSWORD, "
            "AWS_…"
        )
    path = config.expanduser().resolve()
    sent = path.relative_to(upload.folder).as_posix() if path.is_relative_to(upload.folder) else ""
    if sent not in upload.files:
        raise PreflightError(
            f"{config}: would not be sent to the cluster; put it below {upload.folder}/configs"
        )
    return shlex.join(
        [python, "-m", f"jobs.{verb}", sent, *_without_store(words), "--store", store_of(study)]
    )


def _without_store(words: Sequence[str]) -> list[str]:
    kept: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word == "--store":
            del rest[:1]
        elif not word.startswith("--store="):
            kept.append(word)
    return kept


def submit(address: str, name: str, command: str, upload: Upload) -> Submission:
    """Start `command` under `name`, or find that it runs already; after an ended one the next is `-r2`.

    Raises PreflightError when the cluster cannot be reached, refuses our token, or runs another Ray.
    """
    taken = {str(job.submission_id): str(job.status) for job in list_jobs(address)}
    attempt = 1
    while (own := name if attempt == 1 else f"{name}-r{attempt}") in taken:
        if taken[own] not in ENDED:
            return Submission(own, address, is_new=False)
        attempt += 1
    origin = provenance()
    environment = {
        "KRONY_COMMIT": str(origin["commit"]),
        "KRONY_DIRTY": str(origin["dirty"]),
        "PYTHONUNBUFFERED": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    }
    with said(address, "the job may not have started"):
        try:
            client_of(address).submit_job(
                entrypoint=command,
                submission_id=own,
                runtime_env={"working_dir": str(upload.folder), "env_vars": environment},
            )
        except RuntimeError as err:
            if "already exists" not in str(err):
                raise
            return Submission(own, address, is_new=False)  # somebody was faster by a moment
    return Submission(own, address, is_new=True)


def jobs(address: str) -> list[JobState]:
    """Our jobs that the cluster remembers, the newest first. Raises PreflightError as `submit` does."""
    found = [_state(job) for job in list_jobs(address) if _is_ours(job)]
    return sorted(found, key=lambda job: job.started or "~", reverse=True)


def find_job(address: str, name: str) -> JobState:
    """One job by its name; raises PreflightError with the names there are."""
    known = [_state(job) for job in list_jobs(address) if job.submission_id]
    if found := [job for job in known if job.id == name]:
        return found[0]
    names = ", ".join(sorted(job.id for job in known)) or "none"
    raise PreflightError(f"{address}: no job {name!r}; there are: {names}")


def follow(address: str, name: str, show: Callable[[str], None]) -> JobState:
    """Hand on what the job writes until it ends; a connection that breaks is taken up where it was.

    Raises PreflightError for a name that the cluster does not know, or when it is gone for a minute.
    """
    find_job(address, name)
    client, echo, lost_s = client_of(address), _Echo(show), 0.0
    with said(address, f"{name} cannot be followed any further"):
        while True:
            try:
                asyncio.run(_tail(client, name, echo))
                state, lost_s = _state(client.get_job_info(name)), 0.0
                if state.is_over:
                    echo.begin()
                    echo.take(str(client.get_job_logs(name)))
                    return state
            except (OSError, RuntimeError) as err:  # the dashboard is away: what Ray's client raises
                lost_s += RETRY_S
                if lost_s > PATIENCE_S:
                    raise PreflightError(
                        f"{address}: the dashboard is gone ({reason_of(err)}); the job may go on: "
                        f"krony job follow {name}"
                    ) from err
            time.sleep(RETRY_S)


def stop(address: str, name: str) -> JobState:
    """Ask a job to end, as Ctrl-C does, and wait until it has. One that is over stays as it is."""
    if find_job(address, name).is_over:
        return find_job(address, name)
    client = client_of(address)
    with said(address, f"{name} may not have been asked to end"):
        client.stop_job(name)
        until = time.monotonic() + STOP_S + RETRY_S
        while not (state := _state(client.get_job_info(name))).is_over and time.monotonic() < until:
            time.sleep(RETRY_S)
        return state


class _Echo:
    """Hands on a text that is read from its beginning again and again, every part of it once."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show, self._at, self._shown = show, 0, 0

    def begin(self) -> None:
        """The next part is the first one."""
        self._at = 0

    def take(self, part: str) -> None:
        """The next part."""
        new = part[max(0, self._shown - self._at) :]
        self._at += len(part)
        self._shown = max(self._shown, self._at)
        if new:
            self._show(new)


async def _tail(client: "JobSubmissionClient", name: str, echo: _Echo) -> None:
    from aiohttp import ClientError  # what Ray reads the log with

    echo.begin()
    try:
        async for part in client.tail_job_logs(name):
            echo.take(part)
    except ClientError as err:  # no OSError, though a tunnel whose far end is away raises it
        raise ConnectionError(str(err)) from err


def _is_ours(job: Any) -> bool:
    return str(job.submission_id or "").startswith("krony-")


def _state(job: Any) -> JobState:
    def when(milliseconds: int | None) -> str:
        if not milliseconds:
            return ""
        return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="seconds")

    return JobState(
        id=str(job.submission_id),
        status=str(getattr(job.status, "value", job.status)),
        started=when(job.start_time),
        ended=when(job.end_time),
        command=str(job.entrypoint),
        code=job.driver_exit_code,
    )
