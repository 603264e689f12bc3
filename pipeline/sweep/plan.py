"""The plan of a sweep: every trial with its exact size, its start and its time, and what all of it takes.

Nothing is trained. Sizes follow from integers, starts from decompositions (`predict`), times from a short
measurement on this machine (`probe`); whatever is not known says what has to come first.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Literal

from pipeline.chain import Chain, Chains
from pipeline.compress.outlook import Outlook, dense_spec, try_outlook
from pipeline.config.schema import RunConfig, ScratchTeacher
from pipeline.config.sweep import StopRule, SweepStudy
from pipeline.config.training import TrainConfig
from pipeline.progress import say
from pipeline.store.artifacts import Identity, Store
from pipeline.sweep.predict import Start, starts
from pipeline.sweep.slots import held, trial_slots
from pipeline.sweep.space import Space, TrialSpec
from pipeline.train.schedule import is_due

if TYPE_CHECKING:
    from pipeline.sweep.probe import Pace, Question

PROBE_S = 20.0
"""Time for measuring steps, in seconds; what is left then is scaled from what was measured."""

PREDICT_S = 60.0
"""Time for decomposing, in seconds; inits that are left then are made by the sweep."""

PROCESS_BYTES = 700_000_000
"""Resident memory of one process with torch and Ray loaded, beside model and data."""


@dataclass(frozen=True, slots=True)
class TrialPlan:
    """One trial before it runs."""

    trial: TrialSpec
    size: Outlook
    start: Start
    tokens: int
    """Training tokens, to the end."""
    train_s: float | None
    """Seconds of training and validation from the first step; None without a probe."""
    is_measured: bool
    """Whether its own structure was measured; else it was scaled from the nearest."""
    memory_bytes: int
    """Of all its processes; 0 without a probe."""
    state: Literal["trained", "begun", "missing"]
    """What the store has of its run."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What trials hold, and what this machine has."""

    cpus: float
    """Of one trial."""
    gpus: float
    """Of one trial."""
    fits: bool
    """Whether this machine holds even one."""
    slots: int
    """Trials at once, at least 1."""
    scarce: str
    """What limits them."""
    memory_bytes: int
    """The largest trials, `slots` of them, together; 0 without a probe."""
    machine_bytes: int
    """What this machine has; 0 if it does not say."""


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """Everything that can be known of a sweep beforehand."""

    study: SweepStudy
    space: Space
    trials: tuple[TrialPlan, ...]
    shared: Mapping[str, tuple[int, int]]
    """By kind: distinct artifacts that trials share, and how many of them are there."""
    teacher_s: float | None
    """Seconds to train the teachers that are missing, with one thread each; None without a probe."""
    busy: float
    """Wall time of the probe over its processor time; 1 without a probe."""
    resources: Resources

    @property
    def left(self) -> tuple[TrialPlan, ...]:
        """Trials whose run is not there yet."""
        return tuple(row for row in self.trials if row.state != "trained")

    @property
    def train_s(self) -> float | None:
        """Seconds of training of what is left, one after another and to the end; None without a probe."""
        times = [row.train_s for row in self.left]
        return None if None in times else sum(time for time in times if time is not None)

    @property
    def wall_s(self) -> float | None:
        """Seconds until the last is trained, so many at once; without start-up, exports and scores."""
        if (total := self.train_s) is None:
            return None
        longest = max((row.train_s or 0.0 for row in self.left), default=0.0)
        return max(total / self.resources.slots, longest)

    @property
    def kept(self) -> float:
        """Share of the tokens that early stopping leaves, if every rung stops what it says."""
        stop = self.study.sweep.stop
        tokens = sum(row.tokens for row in self.left)
        return (
            sum(expected_tokens(stop, row.tokens) for row in self.left) / tokens if stop and tokens else 1.0
        )


def plan(study: SweepStudy, space: Space, *, probe: bool, quiet: bool = True) -> SweepPlan:
    """Plan `space`; `probe` measures times. Makes inits where the teacher is there, builds nothing else.

    Nothing is measured for trials that ask for GPUs on a machine that has none.
    """
    chains = Chains()
    probe = probe and (_gpus() > 0 or not study.first.ray.gpus_per_worker)
    chained = {trial.key: chains.of(trial.config) for trial in space.trials}
    sizes = _sizes(space.trials, chained)
    found = starts(space.trials, chains, within_s=PREDICT_S, quiet=quiet)
    paces = _paces(space.trials, sizes, quiet=quiet) if probe else {}
    rows = tuple(
        _trial(trial, sizes[trial.key], found[trial.key], chained[trial.key], paces.get(trial.key))
        for trial in space.trials
    )
    teacher_s = _teachers(space.trials, chained) if probe else None
    busy = max((pace.busy for pace in paces.values()), default=1.0)
    shared, resources = _shared(space.trials, chained), _resources(study, rows)
    return SweepPlan(study, space, rows, shared, teacher_s, busy, resources)


def expected_tokens(stop: StopRule, total: int) -> float:
    """Tokens of an average trial: after each rung one of `reduction` goes on; half of them for `median`."""
    kept, at, sum_ = 1.0, 0, 0.0
    for rung in stop.rungs(total):
        sum_ += kept * (rung - at)
        kept, at = kept / (2 if stop.name == "median" else stop.reduction), rung
    return sum_ + kept * (total - at)


def validations(train: TrainConfig) -> int:
    """How often a run validates: before the first step, when due, and at the end."""
    steps = range(1, train.max_steps + 1)
    return 1 + sum(is_due(step, train.val_every, total=train.max_steps) for step in steps)


def _sizes(trials: Sequence[TrialSpec], chained: Mapping[str, Chain]) -> dict[str, Outlook]:
    """The exact size of every trial; from statistics where they are stored and decide it."""
    from model.compress.contract import Stats
    from model.compress.stats_file import load_stats

    @cache
    def read(store: str, address: str) -> Stats:
        return load_stats(Store(store).open(address).folder())

    def stored(trial: TrialSpec) -> Stats | None:
        wanted = chained[trial.key].stats
        is_there = wanted and Store(trial.config.store).find(wanted)
        return read(trial.config.store, wanted.address) if wanted and is_there else None

    arms: dict[str, Outlook] = {}
    for trial in trials:
        if trial.arm not in arms:
            arms[trial.arm] = try_outlook(trial.config, partial(stored, trial))
    return {trial.key: arms[trial.arm] for trial in trials}


def _question(trial: TrialSpec, size: Outlook) -> "Question":
    """What its workers do in a step; the dense structure where its own is not known yet."""
    from pipeline.sweep.probe import Question

    config, spec = trial.config, size.plan.spec if size.plan else size.dense
    return Question.of(
        spec,
        config.train,
        workers=config.ray.workers,
        cpus=config.ray.cpus_per_worker,
        dense=size.dense,
    )


def _paces(trials: Sequence[TrialSpec], sizes: Mapping[str, Outlook], *, quiet: bool) -> Mapping[str, "Pace"]:
    from pipeline.sweep.probe import probe

    questions = {trial.key: _question(trial, sizes[trial.key]) for trial in trials}
    if not quiet:
        say("plan", f"measuring training steps of {len(set(questions.values()))} models")
    answers = probe(list(questions.values()), within_s=PROBE_S)
    return {key: answers[question] for key, question in questions.items()}


def _trial(trial: TrialSpec, size: Outlook, start: Start, chain: Chain, pace: "Pace | None") -> TrialPlan:
    train, workers = trial.config.train, max(1, trial.config.ray.workers)
    run_s = train.max_steps * pace.step_s + validations(train) * pace.validation_s / workers if pace else None
    return TrialPlan(
        trial=trial,
        size=size,
        start=start,
        tokens=train.total_tokens,
        train_s=run_s,
        is_measured=bool(pace and pace.is_measured and size.plan),
        memory_bytes=workers * (pace.memory_bytes + PROCESS_BYTES) if pace else 0,
        state=_state(Store(trial.config.store), chain.run),
    )


def _state(store: Store, run: Identity) -> Literal["trained", "begun", "missing"]:
    if store.find(run):
        return "trained"
    return "begun" if store.root.folders(run.address) else "missing"


def _shared(trials: Sequence[TrialSpec], chained: Mapping[str, Chain]) -> dict[str, tuple[int, int]]:
    """Distinct artifacts before the runs, and how many of them are there."""
    seen: dict[str, dict[str, bool]] = {}
    for trial in trials:
        chain, store = chained[trial.key], Store(trial.config.store)
        for identity in (chain.tokens, chain.teacher, chain.stats, chain.init):
            if identity and identity.fingerprint not in seen.setdefault(identity.kind, {}):
                seen[identity.kind][identity.fingerprint] = store.find(identity) is not None
    return {kind: (len(found), sum(found.values())) for kind, found in seen.items()}


def _teachers(trials: Sequence[TrialSpec], chained: Mapping[str, Chain]) -> float:
    """Seconds to train every teacher that trials need and that is not there, with one thread per worker."""
    from pipeline.sweep.probe import Question, measure

    missing: dict[str, RunConfig] = {}
    for trial in trials:
        identity, config = chained[trial.key].teacher, trial.config
        is_ours = isinstance(config.teacher, ScratchTeacher)
        if is_ours and identity.fingerprint not in missing and Store(config.store).find(identity) is None:
            missing[identity.fingerprint] = config
    total = 0.0
    for config in missing.values():
        assert isinstance(config.teacher, ScratchTeacher)
        train, dense = config.teacher.train, dense_spec(config)
        pace = measure(Question.of(dense, train, workers=config.ray.workers, cpus=1, dense=dense))
        total += train.max_steps * pace.step_s + validations(train) * pace.validation_s
    return total


def _resources(study: SweepStudy, rows: Sequence[TrialPlan]) -> Resources:
    """Trials at once if this machine is the cluster, and what they hold together."""
    ray = held(study.first, has_gpu=_gpus() > 0)
    several = max(1, ray.workers)
    holds = {
        "cores": ray.cpus_per_worker * several,
        "GPUs": ray.gpus_per_worker * several,
    }
    fit = trial_slots([{"CPU": _cpus(), "GPU": _gpus()}], ray)
    limits = {" and ".join(name for name, each in holds.items() if each): fit, "their number": len(rows)}
    if study.sweep.concurrent:
        limits["sweep.concurrent"] = study.sweep.concurrent
    scarce = min(limits, key=lambda name: limits[name])
    slots = max(1, limits[scarce])
    largest = sorted((row.memory_bytes for row in rows), reverse=True)
    return Resources(
        cpus=holds["cores"],
        gpus=holds["GPUs"],
        fits=fit > 0,
        slots=slots,
        scarce=scarce,
        memory_bytes=sum(largest[:slots]),
        machine_bytes=_memory(),
    )


def _cpus() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _memory() -> int:
    """Bytes of memory of this machine; 0 where it does not say."""
    names = getattr(os, "sysconf_names", {})
    known = "SC_PHYS_PAGES" in names and "SC_PAGE_SIZE" in names
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 0
