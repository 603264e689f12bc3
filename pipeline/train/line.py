"""The line between the workers of a run and its driver: rows, notes and errors one way, wishes the other.

A plain object that the driver turns into one actor without CPUs. Its process loads neither torch nor the
loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from pipeline.errors import KronyError
from pipeline.train.request import Row


class Told(NamedTuple):
    """What came in since the last look."""

    rows: list[Row]
    notes: list[str]
    failure: KronyError | None
    leader: Any = None
    """Ray Train's controller, once."""
    waits: bool = False
    """Whether no worker trains, because the group waits for its place."""


class Line:
    """A mailbox; every call is short."""

    def __init__(self) -> None:
        """Nothing said, nothing wished."""
        self._rows: list[Row] = []
        self._notes: list[str] = []
        self._stop = False
        self._error: KronyError | None = None
        self._leader: Any = None
        self._waits = True

    def lead(self, controller: Any) -> None:
        """Ray Train's controller stands."""
        self._leader = controller

    def place(self, waits: bool) -> None:  # noqa: FBT001  (called from afar)
        """The controller waits for the place of a group, or not any more."""
        self._waits = waits

    def join(self) -> None:
        """The workers run."""
        self._waits = False

    def push(self, rows: Sequence[Row]) -> None:
        """A worker tells rows."""
        self._rows.extend(rows)

    def note(self, text: str) -> None:
        """A worker tells something that a person should read."""
        self._notes.append(text)

    def listen(self) -> Told:
        """The driver takes what came in."""
        told = Told(self._rows, self._notes, self._error, self._leader, self._waits)
        self._rows, self._notes, self._leader = [], [], None
        return told

    def ask_stop(self) -> None:
        """The driver asks all workers to save and leave."""
        self._stop = True

    def is_stop_asked(self) -> bool:
        """A worker looks whether it should leave."""
        return self._stop

    def fail(self, error: KronyError) -> None:
        """A worker met an error that no restart mends; the first one counts."""
        self._error = self._error or error

    def failure(self) -> KronyError | None:
        """What ended the run, if anything did."""
        return self._error
