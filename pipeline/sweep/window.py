"""A sweep in MLflow: one parent, a child per trial named by what sets it apart, one process that writes.

A child has the id of its training run, so a trial that `krony train` began, or `krony report --sync` fills
up, is the same row. What the trackers were told before a restart they know. They are told in a thread of
their own, in order: a database that is slow does not hold up a trial that waits for a verdict.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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


def axes_of(choices: Mapping[str, Any]) -> dict[str, Any]:
    """What a trial is on each axis, as `axis.…`: a section by its name, whatever else it sets.

    MLflow's comparison draws the first parameters of the alphabet that differ, so it begins with these.
    """
    named = {
        path: value["name"] if isinstance(value, Mapping) and "name" in value else value
        for path, value in choices.items()
    }
    return dict(flatten(named, "axis."))


class Window:
    """The trackers of one sweep; only its driver has one."""

    def __init__(
        self, tracking: TrackingConfig, store: Store, *, run_id: str, name: str, asks: Mapping[str, Any]
    ) -> None:
        """Open the parent; `run_id` is the address of the sweep with its attempt, `asks` what it varies."""
        self._chains = Chains()
        self._tracking, self._store, self._run_id = tracking, store, run_id
        self._children: dict[str, Tracker] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trackers")
        self._failed: list[BaseException] = []
        self._parent = self._open(run_id, name, parent=None)
        self._parent.params(flatten(asks))
        self._parent.tags({"krony.address": run_id.rpartition("/")[0], "krony.kind": "sweep"})

    def begin(self, entry: Entry, config: RunConfig) -> None:
        """A trial starts, or goes on."""
        key, name, arm, choices = entry.key, entry.name, entry.arm, dict(entry.choices)

        def tell() -> None:
            run = self._chains.of(config).run
            with self._store.attempt(run, resume=True) as attempt:
                # what was trained before, or in the meantime, has the number of its own attempt
                done = self._store.find(run)
                number = done.record.attempt if done else attempt.name
            child = self._open(f"{run.address}/{number}", name, parent=self._run_id)
            self._children[key] = child
            child.params(asked(config, "train") | {"seed": config.seed} | axes_of(choices))
            tags = {"krony.address": run.address, "krony.method": config.method.name, "krony.trial": key}
            child.tags(tags | {"krony.arm": arm, "krony.sweep": self._run_id.rpartition("/")[0]})

        self._later(tell)

    def rows(self, key: str, rows: Sequence[Row]) -> None:
        """New rows of a trial."""

        def tell() -> None:
            if key in self._children:
                replay(self._children[key], rows)

        self._later(tell)

    def end(self, entry: Entry, outcome: Outcome | None, *, step: int) -> None:
        """A trial ended, or lost its process (no outcome)."""
        key, state, reason = entry.key, entry.state, entry.reason

        def tell() -> None:
            if (child := self._children.pop(key, None)) is None:
                return
            if outcome is not None:
                sizes = {"parameters": outcome.parameters, "macs_per_token": outcome.macs_per_token}
                child.metrics(sizes, step=step)
            child.tags({"krony.state": state, "krony.reason": reason})
            child.close(_STATUS.get(state, "KILLED"))

        self._later(tell)

    def counts(self, book: Book) -> None:
        """How far the sweep is."""
        over = book.count("finished", "stopped", "failed")
        done = [entry for entry in book.entries.values() if entry.state == "finished"]
        losses = [entry.val_loss for entry in done if entry.val_loss is not None]
        values: dict[str, float] = {
            "trials_over": over,
            "trials_stopped": book.count("stopped"),
            "trials_failed": book.count("failed"),
        }
        best = {"best_val_loss": min(losses)} if losses else {}
        self._later(lambda: self._parent.metrics(values | best, step=over))

    def close(self, status: Status) -> None:
        """The sweep ends; trials that are under way stay unfinished. Waits until all is told."""

        def tell() -> None:
            for child in self._children.values():
                child.close("KILLED")
            self._children = {}
            self._parent.close(status)

        self._later(tell)
        self._thread.shutdown()
        for err in self._failed:
            raise err

    def _later(self, tell: Callable[[], None]) -> None:
        def note(done: Future[None]) -> None:
            if (err := done.exception()) is not None:
                self._failed.append(err)

        self._thread.submit(tell).add_done_callback(note)

    def _open(self, run_id: str, name: str, *, parent: str | None) -> Tracker:
        return open_tracker(
            self._tracking.uri,
            store=self._store.root.uri,
            experiment=self._tracking.experiment,
            run_id=run_id,
            name=name,
            parent=parent,
        )
