"""Where the numbers of a run go, as seen by whoever has numbers.

Records and JSONL are the truth, a tracker is a window on them: one that fails costs a warning, never the run.
One process writes: the driver. What it wrote before it died is known to the tracker, so everything may be
told twice.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

from pipeline.errors import hide_passwords
from pipeline.store.location import Location

Scalar = str | int | float | bool
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker(Protocol):
    """Where numbers of a run go."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        """What the run was asked to do; logged once, later calls are compared with it."""

    def metrics(self, values: Mapping[str, Scalar], *, step: int) -> None:
        """Numbers at a step; a number that stands there already is dropped."""

    def tags(self, values: Mapping[str, Scalar]) -> None:
        """What may change, and what is no number."""

    def link(self, name: str, uri: str, *, digest: str) -> None:
        """An artifact: where it lies and the sha256 of what lies there."""

    def dataset(self, name: str, *, digest: str, source: str) -> None:
        """The shard table that the run reads; never its tokens."""

    def close(self, status: Status) -> None:
        """The run ended; nothing follows."""


class NullTracker:
    """No window."""

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Nothing."""

    def metrics(self, values: Mapping[str, Scalar], *, step: int) -> None:
        """Nothing."""

    def tags(self, values: Mapping[str, Scalar]) -> None:
        """Nothing."""

    def link(self, name: str, uri: str, *, digest: str) -> None:
        """Nothing."""

    def dataset(self, name: str, *, digest: str, source: str) -> None:
        """Nothing."""

    def close(self, status: Status) -> None:
        """Nothing."""


class CompositeTracker:
    """Several windows on the same run, told in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self._trackers = tuple(trackers)

    def params(self, values: Mapping[str, Scalar]) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.params(values)

    def metrics(self, values: Mapping[str, Scalar], *, step: int) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.metrics(values, step=step)

    def tags(self, values: Mapping[str, Scalar]) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.tags(values)

    def link(self, name: str, uri: str, *, digest: str) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.link(name, uri, digest=digest)

    def dataset(self, name: str, *, digest: str, source: str) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.dataset(name, digest=digest, source=source)

    def close(self, status: Status) -> None:
        """Tell all."""
        for tracker in self._trackers:
            tracker.close(status)


def open_tracker(
    uri: str, *, store: str, experiment: str, run_id: str, name: str, parent: str | None = None
) -> Tracker:
    """The window that `tracking.uri` asks for: `auto`, `off`, or an address of MLflow.

    `run_id` is the address of the run with its attempt, so that a restart finds its own row and `--force`
    gets a new one; `parent` is the `run_id` of the sweep that it belongs to.
    """
    target = resolve_uri(uri, store=store)
    if not target:
        return NullTracker()
    from pipeline.tracking.mlflow_writer import open_mlflow

    return open_mlflow(
        target, experiment, run_id, name, parent=parent, artifact_root=artifact_root(target, store=store)
    )


def resolve_uri(uri: str, *, store: str) -> str:
    """`auto` becomes the SQLite file beside a local store, `off` becomes nothing, the rest stays."""
    if uri == "off":
        return ""
    return f"sqlite:///{_beside(store) / 'mlflow.db'}" if uri == "auto" else uri


def artifact_root(uri: str, *, store: str) -> str:
    """Absolute folder for MLflow's own files; empty where a server decides. Never the current directory."""
    return "" if uri.startswith(("http://", "https://")) else str(_beside(store) / "mlflow")


def ui_command(uri: str, *, port: int = 5000) -> str:
    """The command that shows a tracker's pages; for a server, its address. No password is in it."""
    uri = hide_passwords(uri)
    if uri.startswith(("http://", "https://")):
        return uri
    python = Path(sys.executable)
    shown = python.relative_to(Path.cwd()) if python.is_relative_to(Path.cwd()) else python
    # Without the switch the server starts seven more processes for jobs that nobody runs here.
    return (
        f"MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false {shown} -m mlflow server --backend-store-uri {uri} "
        f"--host 127.0.0.1 --port {port} --workers 1"
    )


def flatten(values: Mapping[str, object], prefix: str = "") -> dict[str, Scalar]:
    """A nested configuration as dotted names: `{"train": {"lr": 1}}` is `train.lr`, `[3, 8]` is `3x8`."""
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, list | tuple):
            numbers = bool(value) and all(isinstance(item, int) for item in value)
            flat[name] = ("x" if numbers else ", ").join(str(item) for item in value)
        elif isinstance(value, Scalar):
            flat[name] = value
        else:
            flat[name] = str(value)
    return flat


def replay(tracker: Tracker, rows: Iterable[Mapping[str, Scalar]]) -> None:
    """Tell a tracker a history that it may know in part; fills the gap that a failed tracker left.

    A validation loss goes first: MLflow's comparison begins with the metric that it was told first.
    """
    for row in rows:
        names = sorted(row.keys() - {"step"}, key=lambda name: (name != "val_loss", name))
        tracker.metrics({name: row[name] for name in names}, step=int(row["step"]))


def _beside(store: str) -> Path:
    location = Location.of(store)
    return Path(location.uri).parent if location.is_local else Path("runs").resolve()
