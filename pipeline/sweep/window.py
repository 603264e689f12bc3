"""A sweep in MLflow: one parent, a child per trial named by what sets it apart, one process that writes.

A child has the id of its training run, so a trial that `krony train` began, or `krony report --sync` fills
up, is the same row. What the trackers were told before a restart they know.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.chain import Chains
from pipeline.config.schema import RunConfig, TrackingConfig
from pipeline.store.artifacts import Store
from pipeline.sweep.job import Outcome
from pipeline.sweep.ledger import Book, Entry
from pipeline.tracking.tracker import Status, Tracker, flatten, open_tracker, replay
from pipeline.train.request import Row
from pipeline.training import asked

_STATUS: Mapping[str, Status] = {"finished": "FINISHED", "failed": "FAILED"}


class Window:
    """The trackers of one sweep; only its driver has one."""

    def __init__(
        self, tracking: TrackingConfig, store: Store, *, run_id: str, name: str, asks: Mapping[str, Any]
    ) -> None:
        """Open the parent; `run_id` is the address of the sweep with its attempt, `asks` what it varies."""
        self._chains = Chains()
        self._tracking, self._store, self._run_id = tracking, store, run_id
        self._children: dict[str, Tracker] = {}
        self._parent = self._open(run_id, name, parent=None)
        self._parent.params(flatten(asks))
        self._parent.tags({"krony.address": run_id.rpartition("/")[0], "krony.kind": "sweep"})

    def begin(self, entry: Entry, config: RunConfig) -> None:
        """A trial starts, or goes on."""
        run = self._chains.of(config).run
        with self._store.attempt(run, resume=True) as attempt:
            child = self._open(f"{run.address}/{attempt.name}", entry.name, parent=self._run_id)
        self._children[entry.key] = child
        child.params(asked(config, "train") | {"seed": config.seed} | flatten(dict(entry.choices)))
        child.tags(
            {
                "krony.address": run.address,
                "krony.method": config.method.name,
                "krony.trial": entry.key,
                "krony.arm": entry.arm,
                "krony.sweep": self._run_id.rpartition("/")[0],
            }
        )

    def rows(self, key: str, rows: Iterable[Row]) -> None:
        """New rows of a trial."""
        if key in self._children:
            replay(self._children[key], rows)

    def end(self, entry: Entry, outcome: Outcome | None, *, step: int) -> None:
        """A trial ended, or lost its process (no outcome)."""
        child = self._children.pop(entry.key, None)
        if child is None:
            return
        if outcome is not None:
            child.metrics(
                {"parameters": outcome.parameters, "macs_per_token": outcome.macs_per_token}, step=step
            )
        child.tags({"krony.state": entry.state, "krony.reason": entry.reason})
        child.close(_STATUS.get(entry.state, "KILLED"))

    def counts(self, book: Book) -> None:
        """How far the sweep is."""
        over = book.count("finished", "stopped", "failed")
        losses = [
            e.val_loss for e in book.entries.values() if e.state == "finished" and e.val_loss is not None
        ]
        values: dict[str, float] = {
            "trials_over": over,
            "trials_stopped": book.count("stopped"),
            "trials_failed": book.count("failed"),
        }
        self._parent.metrics(values | ({"best_val_loss": min(losses)} if losses else {}), step=over)

    def close(self, status: Status) -> None:
        """The sweep ends; trials that are under way stay unfinished."""
        for child in self._children.values():
            child.close("KILLED")
        self._children = {}
        self._parent.close(status)

    def link(self, uri: str, *, digest: str) -> None:
        """The published artifact of the sweep."""
        self._parent.link("sweep", uri, digest=digest)

    def _open(self, run_id: str, name: str, *, parent: str | None) -> Tracker:
        return open_tracker(
            self._tracking.uri,
            store=self._store.root.uri,
            experiment=self._tracking.experiment,
            run_id=run_id,
            name=name,
            parent=parent,
        )
