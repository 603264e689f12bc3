"""MLflow as the window on a run: one writer, one row per run, restarts included.

A run is found or created by the tag `krony.run_id`. Parameters are logged once and compared afterwards; a
metric that already stands at a step is dropped, so a resumed run, or a replay of the JSONL, fills exactly
what is missing. If MLflow fails there is one warning and the writer falls silent: the truth is in the
records. Everything here goes through the client, never through the fluent API with its global run.
"""

# ruff: noqa: E402  (the switches must be set before mlflow is imported)

import fcntl
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

for _name, _value in {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # a window that is slow must not hold up the run
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}.items():
    os.environ.setdefault(_name, _value)  # read when mlflow is imported

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from pipeline.errors import PreflightError
from pipeline.progress import say
from pipeline.store.provenance import provenance
from pipeline.tracking.tracker import NullTracker, Scalar, Status, Tracker

RUN_ID = "krony.run_id"
PAGES = {"mlflow.experimentKind": "custom_model_development"}
"""Opens the pages of an experiment on training runs, not on GenAI traces."""
OPEN_ATTEMPTS = 3
BUFFER_S = 5.0
BATCH = 100
P = ParamSpec("P")
_FAILURE = (MlflowException, SQLAlchemyError, OSError)


@dataclass(frozen=True, kw_only=True)
class Connection:
    """An opened MLflow: the database exists, the experiment exists."""

    client: MlflowClient
    experiment_id: str


def connect(uri: str, experiment: str, *, artifact_root: str) -> Connection:
    """Open MLflow and the experiment, created if need be; safe when several processes are the first at once.

    Raises PreflightError with the reason when it cannot be reached.
    """
    for noisy in ("alembic", "mlflow"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    for attempt in range(1, OPEN_ATTEMPTS + 1):
        try:
            with _first_opener(uri):
                client = MlflowClient(tracking_uri=uri, registry_uri=uri)
                found = client.get_experiment_by_name(experiment)
                place = artifact_root or None
                experiment_id = (
                    found.experiment_id
                    if found
                    else client.create_experiment(experiment, artifact_location=place, tags=PAGES)
                )
            return Connection(client=client, experiment_id=experiment_id)
        except _FAILURE as err:
            is_race = isinstance(err, MlflowException) and err.error_code == "RESOURCE_ALREADY_EXISTS"
            is_repeated = uri.startswith("http") and not is_race  # mlflow repeats requests by itself
            if attempt == OPEN_ATTEMPTS or is_repeated:
                raise PreflightError(
                    f"tracking.uri={uri}: cannot be opened ({_reason(err)}); start it, correct the address, "
                    "or set tracking.uri=off"
                ) from err
            time.sleep(0.5 * attempt)
    raise AssertionError("unreachable")


def open_mlflow(
    uri: str, experiment: str, run_id: str, name: str, *, parent: str | None, artifact_root: str
) -> Tracker:
    """The tracker of one run; with one warning it is a NullTracker if MLflow cannot be opened.

    `run_id` and `parent` are ours, not MLflow's; `artifact_root` is absolute, or empty for a server.
    """
    try:
        opened = connect(uri, experiment, artifact_root=artifact_root)
        above = find_or_create(opened, parent, name=parent, parent=None) if parent else None
        own = find_or_create(opened, run_id, name=name, parent=above)
        return MlflowTracker(opened.client, own)
    except (PreflightError, *_FAILURE) as err:
        say("mlflow", f"warning: {_reason(err)}; the run goes on, its history is in its own files")
        return NullTracker()


def find_or_create(opened: Connection, run_id: str, *, name: str, parent: str | None) -> str:
    """MLflow's id of our run; the same one however often we restart. `parent` is MLflow's id.

    A run that stands alone gets the parent; one that has a parent keeps it.
    """
    quoted = run_id.replace("'", "")
    found = opened.client.search_runs([opened.experiment_id], f"tags.`{RUN_ID}` = '{quoted}'", max_results=1)
    if found:
        if parent and "mlflow.parentRunId" not in found[0].data.tags:
            opened.client.set_tag(found[0].info.run_id, "mlflow.parentRunId", parent)
        return str(found[0].info.run_id)
    origin = provenance()
    tags = {
        RUN_ID: quoted,
        "mlflow.source.name": " ".join(origin["argv"]),
        "mlflow.source.git.commit": str(origin["commit"]),
    }
    if parent:
        tags["mlflow.parentRunId"] = parent
    return str(opened.client.create_run(opened.experiment_id, tags=tags, run_name=name).info.run_id)


def _forgiving(
    tell: Callable[Concatenate["MlflowTracker", P], None],
) -> Callable[Concatenate["MlflowTracker", P], None]:
    """A method that warns at the first failure and does nothing after it."""

    @wraps(tell)
    def told(self: "MlflowTracker", /, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.silent:
            return
        try:
            tell(self, *args, **kwargs)
        except _FAILURE as err:
            self.silent = True
            say(
                "mlflow",
                f"warning: {_reason(err)}; no more is sent, `krony report --sync` fills the gap later",
            )

    return told


class MlflowTracker:
    """One run in MLflow. After the first failure it is silent."""

    def __init__(self, client: MlflowClient, mlflow_id: str) -> None:
        """Go on with the run `mlflow_id`: it is RUNNING from here on."""
        self.mlflow_id = mlflow_id
        self.silent = False
        self._client = client
        self._known: dict[str, set[int]] = {}  # metric -> steps that stand there
        self._strange: set[str] = set()
        self._buffer: list[Metric] = []
        self._sent_at = time.monotonic()
        client.update_run(mlflow_id, status="RUNNING")

    @_forgiving
    def params(self, values: Mapping[str, Scalar]) -> None:
        """Log what is new; where a value differs from the logged one, that stays and a warning names it."""
        logged = self._client.get_run(self.mlflow_id).data.params
        wanted = {key: str(value)[:6000] for key, value in values.items()}
        new = [Param(key, value) for key, value in wanted.items() if key not in logged]
        for start in range(0, len(new), BATCH):
            self._client.log_batch(self.mlflow_id, params=new[start : start + BATCH])
        differing = {key: value for key, value in wanted.items() if logged.get(key, value) != value}
        if differing:
            shown = ", ".join(f"{key} was {logged[key]!r}, is {value!r}" for key, value in differing.items())
            self._client.set_tag(self.mlflow_id, "krony.params_differ", shown[:8000])
            say("mlflow", f"warning: parameters of this run changed, the first values stay: {shown}")

    @_forgiving
    def metrics(self, values: Mapping[str, Scalar], *, step: int) -> None:
        """Keep numbers for a batch every few seconds. What is not finite becomes a tag, once per name."""
        now_ms = int(time.time() * 1000)
        for key, value in values.items():
            if isinstance(value, str) or step in self._steps(key):
                continue
            self._known[key].add(step)
            if math.isfinite(value):
                self._buffer.append(Metric(key, float(value), now_ms, step))
            elif key not in self._strange:
                self._strange.add(key)
                self._client.set_tag(self.mlflow_id, f"nonfinite.{key}", f"{value} at step {step}")
        if time.monotonic() - self._sent_at >= BUFFER_S:
            self._send()

    @_forgiving
    def tags(self, values: Mapping[str, Scalar]) -> None:
        """Set tags; an earlier value is replaced."""
        tags = [RunTag(key, str(value)[:8000]) for key, value in values.items()]
        for start in range(0, len(tags), BATCH):
            self._client.log_batch(self.mlflow_id, tags=tags[start : start + BATCH])

    def link(self, name: str, uri: str, *, digest: str) -> None:
        """An artifact as two tags; nothing is copied."""
        self.tags({f"link.{name}": uri, f"sha256.{name}": digest})

    @_forgiving
    def dataset(self, name: str, *, digest: str, source: str) -> None:
        """The shard table as an input of the run; MLflow keeps 36 characters of a digest."""
        place = json.dumps({"uri": source, "sha256": digest})
        self._client.log_inputs(
            self.mlflow_id, [DatasetInput(Dataset(name, digest[:36], "shards", place), [])]
        )

    @_forgiving
    def close(self, status: Status) -> None:
        """Send the rest and end the run explicitly."""
        self._send()
        self._client.set_terminated(self.mlflow_id, status)

    def _steps(self, key: str) -> set[int]:
        if key not in self._known:
            logged = self._client.get_metric_history(self.mlflow_id, key)
            self._known[key] = {metric.step for metric in logged}
        return self._known[key]

    def _send(self) -> None:
        for start in range(0, len(self._buffer), BATCH):
            self._client.log_batch(self.mlflow_id, metrics=self._buffer[start : start + BATCH])
        self._buffer, self._sent_at = [], time.monotonic()


@contextmanager
def _first_opener(uri: str) -> Iterator[None]:
    # MLflow's migrations of a fresh SQLite file fail when two processes run them at once.
    if not uri.startswith("sqlite:///"):
        yield
        return
    path = Path(uri.removeprefix("sqlite:///"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _reason(err: Exception) -> str:
    lines = str(err).strip().splitlines()
    return lines[0][:300] if lines else type(err).__name__
