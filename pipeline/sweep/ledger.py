"""What happened in a sweep, as events that are appended and never changed; the state follows from them.

    {"step": 7, "at": 1764000000.1, "event": "validated", "key": "1f0c…", "tokens": 65536, "val_loss": 3.1}

The driver of a sweep is the only writer, and tells itself what happens by the same events that it writes. So
a driver that was killed finds, in the next session, exactly what it knew. Loads no torch and no Ray.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.store.location import Location
from pipeline.tracking.jsonl import HistoryWriter, read_history

PREFIX = "trials"
State = Literal["waiting", "running", "paused", "finished", "stopped", "failed"]
OVER: frozenset[State] = frozenset({"finished", "stopped", "failed"})
_AFTER: Mapping[str, State] = {"interrupted": "waiting"}
_RESULT = ("init", "run", "model", "parameters", "macs_per_token", "tokens", "val_loss", "val_loss_initial")


@dataclass(slots=True)
class Entry:
    """One trial, as far as it is known."""

    key: str
    name: str
    arm: str
    choices: Mapping[str, Any]
    picks: Mapping[str, Any]
    """What a guided search calls its arm."""
    seed: int
    total_tokens: int
    state: State = "waiting"
    reason: str = ""
    init: str = ""
    run: str = ""
    model: str = ""
    scores: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    macs_per_token: int = 0
    tokens: int = 0
    val_loss: float | None = None
    val_loss_initial: float | None = None
    rungs: dict[int, float] = field(default_factory=dict)
    """Validation loss by tokens, as far as it was validated."""
    train_s: float = 0.0
    wall_s: float = 0.0
    crashes: int = 0
    """Times its process was lost since it was last asked for."""
    since: float = 0.0
    """When it was last started, in seconds of the epoch."""

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do for it."""
        return self.state in OVER

    @property
    def reach(self) -> int:
        """Tokens up to which it was validated."""
        return max(self.rungs, default=0)

    def to_json(self) -> dict[str, Any]:
        """The row of `trials.json`."""
        left_out = ("picks", "total_tokens", "crashes", "since", "rungs")
        plain = {name: getattr(self, name) for name in self.__slots__ if name not in left_out}
        seconds = {name: round(plain[name], 3) for name in ("train_s", "wall_s")}
        return plain | seconds | {"rungs": [[tokens, self.rungs[tokens]] for tokens in sorted(self.rungs)]}


@dataclass(slots=True)
class Book:
    """All trials and all validations, in the order in which they became known."""

    entries: dict[str, Entry] = field(default_factory=dict)
    validated: list[tuple[str, int, float]] = field(default_factory=list)
    """(key, tokens, val_loss), each point once."""
    judged: set[int] = field(default_factory=set)
    """Rungs at which the arms were compared."""
    out: set[str] = field(default_factory=set)
    """Arms that lost at one of them."""
    train_s: float = 0.0
    """Seconds of training that this sweep itself did."""
    wall_s: float = 0.0
    """Seconds of all its sessions."""
    slots: int = 0
    _session: float | None = None
    heard_at: float = 0.0
    """When the last event came, in seconds of the epoch."""

    def apply(self, event: Mapping[str, Any]) -> None:
        """Take one event in. An event of a kind that is not known here is an error of ours."""
        at = float(event["at"])
        if event["event"] == "session":
            self._session, self.heard_at, self.slots = at, at, int(event["slots"])
            for entry in self.entries.values():
                if entry.state == "running":  # its driver was killed
                    entry.state = "waiting"
            return
        if self._session is not None:
            self.wall_s += max(0.0, at - self.heard_at)
            self.heard_at = at
        if event["event"] == "end":
            self._session = None
            return
        handle = {
            "drawn": self._drawn,
            "started": self._started,
            "validated": self._validated,
            "ended": self._ended,
            "crashed": self._crashed,
            "retried": self._retried,
            "judged": self._judged,
        }[event["event"]]
        handle(event, at)

    @property
    def is_open(self) -> bool:
        """Whether a session began and did not end."""
        return self._session is not None

    def _drawn(self, event: Mapping[str, Any], _at: float) -> None:
        names = ("key", "name", "arm", "choices", "picks", "seed", "total_tokens")
        self.entries.setdefault(event["key"], Entry(**{name: event[name] for name in names}))

    def _started(self, event: Mapping[str, Any], at: float) -> None:
        entry = self.entries[event["key"]]
        entry.state, entry.reason, entry.since = "running", "", at

    def _validated(self, event: Mapping[str, Any], _at: float) -> None:
        entry, tokens, loss = self.entries[event["key"]], int(event["tokens"]), float(event["val_loss"])
        if tokens in entry.rungs:
            return
        entry.rungs[tokens] = loss
        entry.tokens = max(entry.tokens, tokens)
        if tokens == 0:
            entry.val_loss_initial = loss
        if tokens == max(entry.rungs):
            entry.val_loss = loss
        self.validated.append((entry.key, tokens, loss))

    def _ended(self, event: Mapping[str, Any], at: float) -> None:
        entry = self.entries[event["key"]]
        entry.state = _AFTER.get(event["state"], event["state"])
        entry.reason = event["reason"]
        for name in _RESULT:
            if event.get(name):
                setattr(entry, name, event[name])
        entry.scores = event["scores"] or entry.scores
        self._spend(entry, at)
        entry.train_s += float(event["train_s"])
        self.train_s += float(event["train_s"])

    def _crashed(self, event: Mapping[str, Any], at: float) -> None:
        entry = self.entries[event["key"]]
        entry.crashes += 1
        entry.reason = event["reason"]
        entry.state = "failed" if event["is_final"] else "waiting"
        self._spend(entry, at)

    def _retried(self, event: Mapping[str, Any], _at: float) -> None:
        entry = self.entries[event["key"]]
        entry.state, entry.reason, entry.crashes = "waiting", "", 0
        self.out.discard(entry.arm)  # who asks for it again wants it compared again

    def _judged(self, event: Mapping[str, Any], _at: float) -> None:
        rung, ranked, kept = int(event["rung"]), list(event["ranked"]), int(event["kept"])
        self.judged.add(rung)
        self.out.update(ranked[kept:])
        for entry in self.entries.values():
            if not entry.is_over and entry.arm in self.out:
                place = ranked.index(entry.arm) + 1
                entry.state = "stopped"
                entry.reason = f"rung {rung:,} tokens: place {place} of {len(ranked)}, {kept} go on"

    def _spend(self, entry: Entry, at: float) -> None:
        if entry.since:
            entry.wall_s, entry.since = entry.wall_s + max(0.0, at - entry.since), 0.0

    def count(self, *states: State) -> int:
        """Trials in any of `states`."""
        return sum(entry.state in states for entry in self.entries.values())


class Ledger:
    """The events of one attempt at a sweep, and the book that they make. One writer at a time."""

    def __init__(self, location: Location, *, clock: Callable[[], float] = time.time) -> None:
        """Read what is there; `clock` gives seconds of the epoch."""
        self.book = Book()
        self._clock = clock
        self._next = 0
        self._location = location
        self._writer: HistoryWriter | None = None
        for event in read_events(location):
            self.book.apply(event)
            self._next = int(event["step"]) + 1
        self._is_left = self.book.is_open

    @property
    def is_empty(self) -> bool:
        """Whether nothing ever happened."""
        return self._next == 0

    def tell(self, event: str, **values: Any) -> None:
        """Something happened: on record first, then in the book."""
        self._put({"step": self._next, "at": self._clock(), "event": event, **values})

    def begin_with(self, earlier: Location) -> None:
        """Take over the events of an earlier attempt, all at once, unless something happened here already."""
        if self.is_empty:
            events = [{**event, "step": number} for number, event in enumerate(read_events(earlier))]
            HistoryWriter(self._location, PREFIX).put(events)
            for event in events:
                self.book.apply(event)
            self._next, self._is_left = len(events), self.book.is_open

    def _put(self, row: Mapping[str, Any]) -> None:
        if self._writer is None:
            self._writer = HistoryWriter(self._location, PREFIX)
        if self._is_left:  # its driver was killed: what comes now is no time of its session
            self._is_left = False
            self._put({"step": self._next, "at": self.book.heard_at, "event": "end"})
            row = {**row, "step": self._next}
        self._writer.append(row)
        self._next += 1
        self.book.apply(row)

    def flush(self) -> None:
        """Put what is not yet there."""
        if self._writer:
            self._writer.flush()


def read_events(location: Location) -> Sequence[Mapping[str, Any]]:
    """The events that lie below a location, in order; none is an empty list."""
    return read_history(location, PREFIX)
