"""Each logged step reaches the driver once and in order, whatever was repeated on the way.

A run that is continued repeats the steps since its checkpoint, with the same numbers; and a driver that was
killed may have missed rows that the checkpoint knows. Both are settled here, against the JSONL that lies at
the run's location.
"""

from collections.abc import Iterable

from pipeline.tracking.jsonl import read_history
from pipeline.train.request import FitRequest, OnLog, Row


class Relay:
    """`on_log` without steps at or before the last one that is on record."""

    def __init__(self, request: FitRequest, on_log: OnLog) -> None:
        """Read where the history of earlier sessions ends."""
        rows = read_history(request.run)
        self._last = int(rows[-1]["step"]) if rows else -1
        self._on_log = on_log

    def row(self, row: Row) -> None:
        """Hand on one row, if it is new."""
        step = int(row["step"])
        if step > self._last:
            self._last = step
            self._on_log(row)

    def rows(self, rows: Iterable[Row]) -> None:
        """Hand on what is new of several rows, in order."""
        for row in rows:
            self.row(row)
