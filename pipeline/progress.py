"""One progress line per interval, with the time left, and its JSON twin.

    tokens    12/40 shards · 1.9 Mtok/s · 0m31s left

Lines go to stderr, so that a table on stdout can be piped. With `KRONY_PROGRESS=json` each is one JSON object
instead.
"""

import json
import os
import sys
import time
from types import TracebackType
from typing import Self

from pipeline.errors import hide_passwords


def duration(seconds: float) -> str:
    """Seconds as people read them: `0.4s`, `12s`, `3m05s`, `1h12m`."""
    if seconds < 1:
        return f"{seconds:.1f}s"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def say(label: str, text: str, **values: object) -> None:
    """One line that is not progress: a stage that is skipped, a warning, a place."""
    text = hide_passwords(text)
    if os.environ.get("KRONY_PROGRESS") == "json":
        print(json.dumps({"stage": label, "message": text, **values}), file=sys.stderr, flush=True)
    else:
        print(f"{label:<10}{text}", file=sys.stderr, flush=True)


class Progress:
    """Progress of one stage; writes at most one line per `every_s`, and one at the end."""

    def __init__(
        self, label: str, total: int, *, unit: str = "", quiet: bool = False, every_s: float = 5.0
    ) -> None:
        """`total` in units of work; a total of 0 means that it is not known."""
        self._label, self._total, self._unit = label, total, unit
        self._quiet, self._every_s = quiet, every_s
        self._begin = time.monotonic()
        self._start: int | None = None
        self._begin_work = self._begin
        self._said = self._begin
        self._done = 0
        self._text = ""

    def __enter__(self) -> Self:
        """Start the clock."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, tb: TracebackType | None
    ) -> None:
        """Close with the final line; after an error there is none."""
        if kind is None:
            self.close()

    def update(self, done: int, **values: str | float) -> None:
        """`done` units are finished; `values` are shown as `name value`."""
        if self._start is None:  # starting up, and what an earlier run did, say nothing about the speed
            self._start, self._begin_work = done, time.monotonic()
        self._done = done
        self._text = "".join(f" · {name.replace('_', ' ')} {_show(value)}" for name, value in values.items())
        now = time.monotonic()
        if now - self._said >= self._every_s:
            self._said = now
            self._line(self._left(now), values)

    def close(self) -> None:
        """The last line: what was done and how long it took."""
        self._line(f"done in {duration(time.monotonic() - self._begin)}", {})

    def _left(self, now: float) -> str:
        worked = self._done - (self._start or 0)
        if not self._total or worked <= 0:
            return f"{duration(now - self._begin)} so far"
        return f"{duration((now - self._begin_work) / worked * (self._total - self._done))} left"

    def _line(self, ending: str, values: dict[str, str | float | int]) -> None:
        if self._quiet:
            return
        if os.environ.get("KRONY_PROGRESS") == "json":
            row = {"stage": self._label, "done": self._done, "total": self._total, "time": ending, **values}
            print(json.dumps(row), file=sys.stderr, flush=True)
            return
        count = f"{self._done:,}/{self._total:,}" if self._total else f"{self._done:,}"
        unit = f" {self._unit}" if self._unit else ""
        print(f"{self._label:<10}{count}{unit}{self._text} · {ending}", file=sys.stderr, flush=True)


def _show(value: str | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
