"""The true history of a run: JSON lines in numbered parts, one row per log interval.

An object store cannot append, so a part is put again with every row until it is full, each time whole: a
reader never meets half a row. A writer that starts again opens the next part. A row at an earlier step than
the one before it says that the run went back to a checkpoint: it replaces everything from its step on. Loads
no torch, no tracker.
"""

import json
import math
import time
from collections.abc import Iterable, Mapping
from typing import Any, Self

from model.decode import parse_json
from pipeline.errors import StoreError
from pipeline.store.location import Location

ROWS_PER_PART = 200
LAST_STEP = 2**53
REMOTE_INTERVAL_S = 15.0
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class HistoryWriter:
    """Writes the history below a location, one writer at a time.

    Locally a row is on disk when `append` returns; on an object store within 15 seconds, and after `flush`.
    """

    def __init__(
        self, location: Location, prefix: str = "metrics", *, rows_per_part: int = ROWS_PER_PART
    ) -> None:
        """Start the part after the last one that lies there."""
        self._location, self._prefix, self._limit = location, prefix, rows_per_part
        self._part = max((number for number, _ in _parts(location, prefix)), default=0) + 1
        self._lines: list[str] = []
        self._dirty = False
        self._interval_s = 0.0 if location.is_local else REMOTE_INTERVAL_S
        self._put_at = time.monotonic()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it must hold an integer `step`."""
        if len(self._lines) >= self._limit:
            self.flush()
            self._part, self._lines = self._part + 1, []
        self._add(row)
        if time.monotonic() - self._put_at >= self._interval_s:
            self.flush()

    def put(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows as one part: however this process ends, whoever reads finds all of them or none."""
        if self._lines:
            self.flush()
            self._part, self._lines = self._part + 1, []
        for row in rows:
            self._add(row)
        self.flush()

    def flush(self) -> None:
        """Put what is not yet there."""
        if self._dirty:
            key = f"{self._prefix}-{self._part:05d}.jsonl"
            self._location.put_bytes(key, ("\n".join(self._lines) + "\n").encode())
            self._dirty, self._put_at = False, time.monotonic()

    def _add(self, row: Mapping[str, Any]) -> None:
        step = row.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise ValueError(f"a row of the history needs a step, an integer from 0 on; got {step!r}")
        self._lines.append(json.dumps({name: _plain(value) for name, value in row.items()}, allow_nan=False))
        self._dirty = True

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Flush, whatever happened."""
        self.flush()


def read_history(location: Location, prefix: str = "metrics") -> list[dict[str, Any]]:
    """All rows in ascending order of `step`, each step once: where a run went back, what it did later counts.

    Raises StoreError for a line that is no row, naming part and line. No history is an empty list.
    """
    rows: list[dict[str, Any]] = []
    for _, key in sorted(_parts(location, prefix)):
        for number, line in enumerate(location.read_bytes(key).splitlines(), start=1):
            try:
                row = parse_json(line)
                step = row["step"]
                if type(step) is not int or not 0 <= step < LAST_STEP:
                    raise ValueError(f"step is {step!r:.40}, expected a whole number from 0 on")
            except (ValueError, KeyError, TypeError) as err:
                raise StoreError(
                    f"{location.uri}/{key}:{number}: not a row of a history ({err}); "
                    "delete the file to drop its rows, or train again with --force"
                ) from err
            while rows and rows[-1]["step"] >= step:
                rows.pop()
            rows.append({name: _number(value) for name, value in row.items()})
    return rows


def _parts(location: Location, prefix: str) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    for key in location.list():
        head, _, number = key.removesuffix(".jsonl").rpartition("-")
        if key.endswith(".jsonl") and head == prefix and number.isdecimal():
            found.append((int(number), key))
    return found


def _plain(value: Any) -> Any:
    # JSON has no NaN and no infinity: they are written as words, and read back as numbers.
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _number(value: Any) -> Any:
    return _NONFINITE.get(value, value) if isinstance(value, str) else value
