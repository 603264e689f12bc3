"""One trial of a sweep, as work that a thread does: init → run → model → scores, by the ordinary stages.

The thread speaks with whoever holds it over a `Channel`: rows and stages one way, a wish to stop the other
way. Where early stopping is on it waits at each validation for the answer, so a trial that is stopped ends at
the very step that was judged. A trial never raises for what a person can act on: that is a failed `Outcome`
with one line. Knows no Ray.
"""

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pipeline import stages
from pipeline.config.schema import RunConfig
from pipeline.errors import Interrupted, KronyError
from pipeline.store.artifacts import Artifact
from pipeline.tracking.jsonl import read_history
from pipeline.train.request import Driver, Row
from pipeline.work import Work

Why = Literal["", "rung", "rule", "shutdown"]
"""Why a trial was asked to leave: it reached its rung, it lost against others, the sweep is ending."""

End = Literal["finished", "stopped", "paused", "interrupted", "failed"]
"""How a job ended; `paused` and `interrupted` ones go on from their checkpoint."""

ENDS: Mapping[Why, End] = {"rung": "paused", "rule": "stopped", "shutdown": "interrupted"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A trial, or the part of it up to a rung."""

    key: str
    """The trial."""

    config: RunConfig
    """What `krony train` would take; its store is an absolute place, its tracker off."""

    rungs: tuple[int, ...] = ()
    """Tokens at which it is validated so that it can be compared."""

    until: int = 0
    """Pause at the first validation at or after so many tokens; 0 goes on to the end."""

    waits: bool = False
    """Whether each validation waits for an answer."""

    argv: tuple[str, ...] = ()
    """Command line of the driver, for provenance."""

    def __str__(self) -> str:
        """Its key: Tune makes names of it."""
        return self.key

    @property
    def total_tokens(self) -> int:
        """Training tokens of the whole trial."""
        return self.config.train.total_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a job ended, and what it left in the store."""

    state: End
    reason: str = ""
    """One line; empty unless stopped or failed."""

    init: str = ""
    run: str = ""
    """Of one that was left: the address at which `krony train` goes on."""
    model: str = ""
    scores: Mapping[str, str] = field(default_factory=dict)
    parameters: int = 0
    macs_per_token: int = 0
    tokens: int = 0
    val_loss: float | None = None
    val_loss_initial: float | None = None
    train_s: float = 0.0
    """Seconds of training in this job: loading, steps, validations and checkpoints, without waits."""


@dataclass(frozen=True, slots=True)
class Told:
    """What a trial said since it was last asked."""

    stage: str
    rows: tuple[Row, ...]
    """New rows of its history; at the beginning of a job, the validations of earlier ones."""

    beats: int
    """Signs of life so far."""

    leader: bytes = b""
    """The id of the actor that leads its workers, where it has some."""


class Channel:
    """Between the thread that trains and the one that speaks for it; all calls are short but `row`."""

    def __init__(self) -> None:
        """Nothing said, nothing wished."""
        self.waited_s = 0.0
        self._changed = threading.Condition()
        self._rows: list[Row] = []
        self._stage, self._beats = "start", 0
        self._why: Why = ""
        self._leader = b""
        self._is_waiting = self._has_ended = False

    # --- the thread that trains -----------------------------------------------------------------------------

    def row(self, row: Row, *, wait: bool = False) -> None:
        """Tell a row; `wait` until the other side listens again or wants the end."""
        with self._changed:
            self._rows.append(row)
            self._beats += 1
            if wait and not self._why:
                self._is_waiting, began = True, time.monotonic()
                self._changed.notify_all()
                self._changed.wait_for(lambda: not self._is_waiting)
                self.waited_s += time.monotonic() - began

    def enter(self, stage: str) -> None:
        """Tell that a stage begins, or is still alive."""
        with self._changed:
            self._stage, self._beats = stage, self._beats + 1

    def join(self, leader: bytes) -> None:
        """The workers of this trial are led by the actor of this id."""
        with self._changed:
            self._leader, self._beats = leader, self._beats + 1

    def leave(self) -> None:
        """Nothing more will be told."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    @property
    def why(self) -> Why:
        """Why the trial should leave; empty while it may go on."""
        return self._why

    # --- the one that speaks for it -------------------------------------------------------------------------

    def ask_stop(self, why: Why) -> None:
        """Ask the trial to save and leave; the first reason stays."""
        with self._changed:
            self._why = self._why or why
            self._is_waiting = False
            self._changed.notify_all()

    def listen(self, timeout_s: float) -> Told:
        """Let a trial go on that waits for an answer; hear it until it waits, ends, or `timeout_s` went by.

        A trial that began to wait since the last call was not heard yet: it goes on waiting.
        """
        with self._changed:
            if not self._rows:
                self._is_waiting = False
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._is_waiting or self._has_ended, timeout_s)
            told = Told(self._stage, tuple(self._rows), self._beats, self._leader)
            self._rows = []
        return told


Finish = Callable[[RunConfig], None]
"""Exports and scores the trained model of a config."""


def perform(job: Job, channel: Channel, *, finish: Finish | None = None) -> Outcome:
    """Do a job, or what is left of it; KronyErrors become a failed outcome, anything else is raised.

    `finish` may export and score elsewhere; without it that happens here.
    """
    try:
        return _perform(job, channel, finish)
    except KronyError as err:
        return Outcome(state="failed", reason=err.line)
    finally:
        channel.leave()


def _perform(job: Job, channel: Channel, finish: Finish | None) -> Outcome:
    def on_row(row: Row) -> None:
        is_validated = "val_loss" in row
        channel.row(row, wait=is_validated and job.waits and int(row["tokens"]) < job.total_tokens)
        if is_validated and _is_reached(job, int(row["tokens"])):
            channel.ask_stop("rung")

    waits = 0

    def on_wait() -> None:
        nonlocal waits
        waits += 1
        channel.enter("train")  # a sign of life

    driver = Driver(
        on_row=on_row,
        on_wait=on_wait,
        on_queue=lambda: channel.enter("train"),  # a sign of life too: who waits for machines does not hang
        should_stop=lambda: channel.why != "",
        validate_at=tuple(map(job.config.train.step_at, job.rungs)),
        on_leader=channel.join,
    )
    work = Work.on(job.config, quiet=True, driver=driver)
    earlier = validations(work)
    for row in earlier:
        channel.row(row)
    channel.enter("init")
    init = stages.init(work)
    channel.enter("train")
    if earlier and _is_reached(job, int(earlier[-1]["tokens"])) and work.store.find(work.chain.run) is None:
        return _left(work, init, "paused", train_s=0.0)
    if channel.why:
        return _left(work, init, ENDS[channel.why], train_s=0.0)
    began, waited = time.monotonic(), channel.waited_s
    try:
        stages.run(work)
    except Interrupted:
        return _left(work, init, ENDS[channel.why], train_s=time.monotonic() - began)
    for row in validations(work) if waits else ():  # what another process made is told too, each point once
        channel.row(row)
    train_s = time.monotonic() - began - (channel.waited_s - waited)
    channel.enter("score")
    try:
        if finish:
            finish(job.config)
        else:
            stages.scores(work)
    except Interrupted:
        return _left(work, init, ENDS[channel.why], train_s=train_s)
    outcome = found(work, train_s=train_s)
    assert outcome is not None, "all stages are done"
    return outcome


def validations(work: Work) -> list[Row]:
    """The validated points on record of the run that `work` would train, done or not."""
    artifact = work.store.find(work.chain.run)
    if artifact:
        rows = read_history(artifact.location)
    else:
        with work.store.attempt(work.chain.run, resume=True) as attempt:
            rows = read_history(attempt.location)
    return [row for row in rows if "val_loss" in row]


def found(work: Work, *, train_s: float = 0.0) -> Outcome | None:
    """The outcome of a trial whose artifacts are all in the store; None if one is missing."""
    run, model = work.store.find(work.chain.run), work.store.find(work.chain.model)
    scores = {protocol: work.store.find(identity) for protocol, identity in work.chain.scores.items()}
    if run is None or model is None or None in scores.values():
        return None
    metrics = run.record.metrics
    return Outcome(
        state="finished",
        init=work.chain.init.address,
        run=run.record.address,
        model=model.record.address,
        scores={protocol: identity.address for protocol, identity in work.chain.scores.items()},
        parameters=int(metrics["parameters"]),
        macs_per_token=int(metrics["macs_per_token"]),
        tokens=int(metrics["tokens"]),
        val_loss=float(metrics["val_loss"]),
        val_loss_initial=float(metrics["val_loss_initial"]),
        train_s=train_s,
    )


def _left(work: Work, init: Artifact, state: End, *, train_s: float) -> Outcome:
    """The outcome of a trial that saved its state and left: its run is not published, but has its address."""
    rows = validations(work)
    return Outcome(
        state=state,
        init=init.record.address,
        run=work.chain.run.address,
        parameters=int(init.record.metrics["parameters"]),
        macs_per_token=int(init.record.metrics["macs_per_token"]),
        tokens=int(rows[-1]["tokens"]) if rows else 0,
        train_s=train_s,
    )


def _is_reached(job: Job, tokens: int) -> bool:
    return 0 < job.until <= tokens < job.total_tokens
