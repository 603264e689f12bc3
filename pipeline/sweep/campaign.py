"""What a sweep does next, as decisions on its ledger: which job, go on or stop, retry or give up.

It knows no Ray, so every decision can be tested as a function of what was heard. Jobs that were under way
come first. `halving` compares whole arms (the mean over their seeds) at a rung once all of them are there, so
the same numbers always give the same winners, whatever was trained before; the other rules decide trial by
trial, elsewhere, and only report here.
"""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, Protocol

from pipeline.config.schema import RayConfig, RunConfig, TrackingConfig
from pipeline.config.sweep import StopRule, SweepConfig
from pipeline.store.location import Location
from pipeline.sweep.job import Job, Outcome
from pipeline.sweep.ledger import Book, Entry, Ledger
from pipeline.sweep.space import TrialSpec
from pipeline.train.request import Row


class Proposal(NamedTuple):
    """One more arm of a search: its trials, and what the search calls it."""

    specs: Sequence[TrialSpec]
    picks: Mapping[str, Any]


class Proposer(Protocol):
    """A search that decides as results come in."""

    def propose(self, book: Book) -> Proposal | None:
        """One more arm; None once all are drawn."""


class Campaign:
    """The trials of one sweep on their way."""

    def __init__(
        self,
        sweep: SweepConfig,
        ledger: Ledger,
        specs: Iterable[TrialSpec],
        *,
        ray: RayConfig,
        proposer: Proposer | None = None,
        argv: Sequence[str] = (),
    ) -> None:
        """Take in what is known beforehand; what the ledger knows already is not told again.

        `ray` is what a trial holds, see `held`.
        """
        self.ledger = ledger
        self.running: dict[str, Job] = {}
        self.is_stopping = False
        self.ray = ray
        self._is_drawn = proposer is None
        self._sweep, self._argv = sweep, tuple(argv)
        self._proposer = proposer
        self.specs: dict[str, TrialSpec] = {}
        self.configs: dict[str, RunConfig] = {}
        for spec in specs:
            self.add(spec)

    @property
    def book(self) -> Book:
        """What is known."""
        return self.ledger.book

    def add(self, spec: TrialSpec, *, picks: Mapping[str, Any] | None = None) -> None:
        """One more trial; `picks` is what a search calls its arm."""
        self.specs[spec.key], config = spec, spec.config
        self.configs[spec.key] = replace(
            config, store=Location.of(config.store).uri, tracking=TrackingConfig(uri="off"), ray=self.ray
        )
        if spec.key not in self.book.entries:
            self.ledger.tell(
                "drawn",
                key=spec.key,
                name=spec.name,
                arm=spec.arm,
                choices=dict(spec.choices),
                picks=dict(picks or {}),
                seed=spec.seed,
                total_tokens=config.train.total_tokens,
            )

    @property
    def rule(self) -> StopRule | None:
        """When a trial that does badly is stopped."""
        return self._sweep.stop

    @property
    def is_complete(self) -> bool:
        """Whether every trial is over and no search will draw another."""
        return self._is_drawn and all(entry.is_over for entry in self.book.entries.values())

    # --- what is next ---------------------------------------------------------------------------------------

    def next(self) -> Job | None:
        """One more job to start now, or None: then `is_over` says whether any will follow."""
        if self.is_stopping:
            return None
        self._judge()
        waiting = self._ready()
        if not waiting and self._proposer is not None:
            proposal = self._proposer.propose(self.book)
            self._is_drawn = proposal is None
            for spec in proposal.specs if proposal else ():
                self.add(spec, picks=proposal.picks if proposal else {})
            waiting = self._ready()
        if not waiting:
            return None
        job = self._job(waiting[0])
        self.running[job.key] = job
        self.ledger.tell("started", key=job.key)
        return job

    @property
    def is_over(self) -> bool:
        """Whether no job runs and none will follow."""
        if self.running:
            return False
        return self.is_stopping or not any(not entry.is_over for entry in self.book.entries.values())

    def _ready(self) -> list[Entry]:
        """Trials that can be started, those with a checkpoint first."""
        rung = self._rung()
        found = [
            entry
            for entry in self.book.entries.values()
            if entry.state in ("waiting", "paused") and not 0 < rung <= entry.reach
        ]
        return sorted(found, key=lambda entry: not entry.rungs)

    def _job(self, entry: Entry) -> Job:
        rule = self._sweep.stop
        return Job(
            key=entry.key,
            config=replace(self.configs[entry.key], ray=self.ray),
            rungs=rule.rungs(entry.total_tokens) if rule else (),
            until=self._rung() if rule and rule.name == "halving" else 0,
            waits=rule is not None and rule.name != "halving",
            argv=self._argv,
        )

    # --- halving --------------------------------------------------------------------------------------------

    def _rung(self) -> int:
        """The rung that all trials are on their way to; 0 if it is the end."""
        rule = self._sweep.stop
        if rule is None or rule.name != "halving":
            return 0
        longest = max((entry.total_tokens for entry in self.book.entries.values()), default=0)
        return next((rung for rung in rule.rungs(longest) if rung not in self.book.judged), 0)

    def _judge(self) -> None:
        """Once every living trial is at a rung, end the arms that lost."""
        rule = self._sweep.stop
        while rule is not None and not self.running and (rung := self._rung()):
            alive = [entry for entry in self.book.entries.values() if not entry.is_over]
            if not alive or any(entry.reach < rung for entry in alive):
                return
            there = [entry for entry in self.book.entries.values() if self._was_at(entry, rung)]
            ranked = rank_arms(there, rung, out=self.book.out)
            self.ledger.tell("judged", rung=rung, ranked=ranked, kept=max(1, len(ranked) // rule.reduction))

    def _was_at(self, entry: Entry, rung: int) -> bool:
        """Whether it can be compared; a run trained before may have no validation at this very rung."""
        train = self.configs[entry.key].train
        return entry.state != "finished" or train.step_at(rung) * train.batch_tokens in entry.rungs

    # --- what was heard -------------------------------------------------------------------------------------

    def ended(self, key: str, outcome: Outcome) -> None:
        """A job came to its end."""
        self.running.pop(key, None)
        self._end(key, outcome)

    def note_validations(self, key: str, rows: Iterable[Row]) -> list[tuple[int, float]]:
        """Validations of a trial, in order; returns the new ones as (tokens, loss)."""
        entry, new = self.book.entries[key], []
        for row in rows:
            tokens = int(row["tokens"])
            if "val_loss" in row and tokens not in entry.rungs:
                self.ledger.tell("validated", key=key, tokens=tokens, val_loss=float(row["val_loss"]))
                new.append((tokens, float(row["val_loss"])))
        return new

    def crashed(self, key: str, reason: str, *, is_final: bool = False) -> bool:
        """The process of a trial was lost; whether it will be tried again."""
        self.running.pop(key, None)
        crashes = self.book.entries[key].crashes + 1
        is_final = is_final or crashes > self._sweep.retries
        if crashes > 1:
            reason = f"{reason} ({crashes} times)"
        self.ledger.tell("crashed", key=key, reason=reason, is_final=is_final)
        return not is_final

    def retry_failed(self) -> int:
        """Give every failed trial another chance; how many there are."""
        failed = [entry.key for entry in self.book.entries.values() if entry.state == "failed"]
        for key in failed:
            self.ledger.tell("retried", key=key)
        return len(failed)

    def _end(self, key: str, outcome: Outcome) -> None:
        self.ledger.tell(
            "ended",
            key=key,
            state=outcome.state,
            reason=outcome.reason,
            init=outcome.init,
            run=outcome.run,
            model=outcome.model,
            scores=dict(outcome.scores),
            parameters=outcome.parameters,
            macs_per_token=outcome.macs_per_token,
            tokens=outcome.tokens,
            val_loss=outcome.val_loss,
            val_loss_initial=outcome.val_loss_initial,
            train_s=outcome.train_s,
        )


def rank_arms(entries: Iterable[Entry], rung: int, *, out: Container[str] = ()) -> list[str]:
    """Arms that are in the comparison at `rung`, best first by the mean loss of their seeds there.

    An arm that was trained to its end elsewhere is compared like the others, so what a store happens to hold
    does not decide who else goes on. `out` are the arms that lost before. An arm that lost a seed to a
    failure stands behind all whole ones: a recipe that diverges now and then must not win by better seeds.
    """
    arms: dict[str, list[Entry]] = {}
    for entry in entries:
        arms.setdefault(entry.arm, []).append(entry)
    there = {
        arm: trials
        for arm, trials in arms.items()
        if arm not in out and any(trial.state != "failed" for trial in trials)
    }
    return sorted(there, key=lambda arm: _score(there[arm], rung))


def _score(trials: Sequence[Entry], rung: int) -> tuple[int, float]:
    losses = [_loss_at(trial.rungs, rung) for trial in trials if trial.state != "failed"]
    return sum(trial.state == "failed" for trial in trials), sum(losses) / len(losses)


def _loss_at(rungs: Mapping[int, float], rung: int) -> float:
    """Loss at the first validation at or after a rung; the last one of a trial that ended before it."""
    later = [tokens for tokens in rungs if tokens >= rung]
    return rungs[min(later)] if later else rungs[max(rungs)] if rungs else math.inf
