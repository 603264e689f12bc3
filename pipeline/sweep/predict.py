"""How far each trial starts from its teacher: the energy that the compressed matrices lose, before training.

Read from the init where it is in the store. Where only the teacher is (and the statistics, if the method
needs any), the init is made here, as the ordinary artifact that the sweep would make. Corpus, teacher and
statistics are never built: then the answer is what has to come first.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline import stages
from pipeline.chain import Chains
from pipeline.compress.build import REPORT
from pipeline.errors import KronyError
from pipeline.progress import say
from pipeline.store.artifacts import Artifact, Store
from pipeline.sweep.space import TrialSpec
from pipeline.work import Work


@dataclass(frozen=True, slots=True)
class Start:
    """Where a trial starts."""

    error: float | None
    """Mean of ||W - K||^2 / ||W||^2 over the replaced matrices, in the method's metric; None if unknown."""
    metric: str = ""
    """What is squared: `frobenius`, or what the method minimises instead."""
    note: str = ""
    """Why it is not known, or what stands for it."""


def starts(
    trials: Sequence[TrialSpec], chains: Chains, *, within_s: float, quiet: bool
) -> Mapping[str, Start]:
    """Where every trial starts, by key; inits are made for about `within_s`, one seed of each arm."""
    until = time.monotonic() + within_s
    by_arm: dict[str, Start] = {}
    by_init: dict[str, Start] = {}
    found: dict[str, Start] = {}
    for trial in trials:
        init = chains.of(trial.config).init.fingerprint
        if init not in by_init:
            is_first = trial.arm not in by_arm
            start = _start(trial, chains, may_build=is_first and time.monotonic() < until, quiet=quiet)
            if start.error is None and not is_first and by_arm[trial.arm].error is not None:
                first = by_arm[trial.arm]
                start = Start(first.error, first.metric, "of another seed")
            by_init[init] = start
            by_arm.setdefault(trial.arm, start)
        found[trial.key] = by_init[init]
    return found


def _start(trial: TrialSpec, chains: Chains, *, may_build: bool, quiet: bool) -> Start:
    config, chain = trial.config, chains.of(trial.config)
    store = Store(config.store)
    if done := store.find(chain.init):
        return _read(done)
    if store.find(chain.teacher) is None:
        return Start(None, note="after the teacher")
    if chain.stats and store.find(chain.stats) is None:
        return Start(None, note="after calibration")
    if not may_build:
        return Start(None, note="not decomposed yet")
    if not quiet:
        say("plan", f"decomposing the teacher for {trial.arm}")
    try:
        return _read(stages.init(Work(config, chain, store, quiet=True)))
    except KronyError as err:
        return Start(None, note=f"fails: {err}")


def _read(init: Artifact) -> Start:
    metrics = init.record.metrics
    if not metrics["replaced_matrices"]:
        is_whole = metrics["parameters"] == metrics["dense_parameters"]
        return Start(0.0 if is_whole else None, note="" if is_whole else "no matrix is replaced")
    rows = json.loads(init.path(REPORT).read_text())
    metric = ", ".join(sorted({str(row["metric"]) for row in rows}))
    return Start(1.0 - float(metrics["energy_kept"]), metric)
