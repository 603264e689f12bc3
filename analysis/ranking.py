"""Which arm of a sweep is best, and which others may be: the mean over seeds, and what carries a difference.

Arms are ranked by their loss: under the first protocol that scored every finished trial, else by the loss
of the last validation. The interval of a mean is Student's over seeds, on the text as it is. Against the
best, an arm is compared on both: the windows that all share, by the paired bootstrap, and the seeds, by
Welch's t; Holm over all arms. An arm of which seeds were stopped or failed is ranked behind the whole ones,
because the seeds that are left may be the lucky ones, and is never called best.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.compare import ALPHA
from analysis.differences import Units, units_of
from analysis.stats import (
    RESAMPLES,
    Floats,
    Interval,
    holm,
    over_units,
    pareto_front,
    resampled_means,
    seed_noise,
    t_interval,
)
from analysis.sweeps import Sweep, Trial
from pipeline.errors import StoreError

VALIDATION = "validation"
"""Measure of a sweep without scores: the loss of the last validation in training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One arm and where it stands."""

    name: str
    choices: Mapping[str, Any]
    trials: tuple[Trial, ...]
    losses: tuple[float, ...] = ()
    """Nats per token of each seed that finished and was measured."""

    interval: Interval | None = None
    """Of the mean over seeds; None with one seed."""

    rank: int = 0
    """From 1; 0 if no seed finished."""

    gap: Interval | None = None
    """How much worse than the best, nats; None for the best itself and where nothing can be said."""

    p_adjusted: float | None = None
    is_best: bool = False
    """Best, or not significantly worse than the best."""

    fronts: tuple[str, ...] = ()
    """Sizes (`parameters`, `macs_per_token`) against which no other arm is better in both."""

    @property
    def loss(self) -> float | None:
        """Mean over seeds."""
        return sum(self.losses) / len(self.losses) if self.losses else None

    @property
    def is_whole(self) -> bool:
        """Whether every seed finished and was measured."""
        return len(self.losses) == len(self.trials)

    @property
    def parameters(self) -> int:
        """Of any of its trials; 0 if none came so far."""
        return max(trial.parameters for trial in self.trials)

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates per token, like `parameters`."""
        return max(trial.macs_per_token for trial in self.trials)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """All arms of a sweep, the best first, those that never finished last."""

    measure: str
    """A protocol id, or `validation`."""

    arms: tuple[Arm, ...]
    teacher_loss: float | None
    """Of the dense teacher under the same measure."""

    knows_text: bool
    """Whether comparisons know the noise of the text."""

    knows_seeds: bool
    """Whether any arm has two seeds, so that comparisons know their noise."""

    problems: tuple[str, ...]

    @property
    def ranked(self) -> tuple[Arm, ...]:
        """Arms of which at least one seed finished."""
        return tuple(arm for arm in self.arms if arm.rank)

    @property
    def best(self) -> Arm | None:
        """The first of the ranking, whole or not; None if no trial finished."""
        return next(iter(self.ranked), None)

    @property
    def tells_apart(self) -> bool:
        """Whether any arm is significantly worse than the best: only then is there a best set to mark."""
        return any(arm.p_adjusted is not None and not arm.is_best for arm in self.arms)


def rank(sweep: Sweep, read: Callable[[str], pd.DataFrame], *, resamples: int = RESAMPLES) -> Ranking:
    """Rank the arms of a sweep; `read` gives the losses per window of a scores address."""
    measure = _measure(sweep)
    problems: list[str] = []
    arms = [_arm(sweep, name, trials, measure) for name, trials in sweep.arms.items()]
    arms.sort(key=lambda arm: (not arm.losses, not arm.is_whole, arm.loss or _progress(arm)))
    ranked = [replace(arm, rank=number) for number, arm in enumerate(arms, start=1) if arm.losses]
    whole = [arm for arm in ranked if arm.is_whole]
    units = _units(sweep, whole, measure, read, problems)
    judged = {arm.name: arm for arm in _judged(whole, units, resamples=resamples)}
    found = [judged.get(arm.name, arm) for arm in ranked] + arms[len(ranked) :]
    return Ranking(
        measure=measure,
        arms=tuple(_with_fronts(found)),
        teacher_loss=sweep.teacher(measure).get("loss"),
        knows_text=bool(units),
        knows_seeds=any(len(arm.losses) > 1 for arm in whole),
        problems=tuple(problems),
    )


def _measure(sweep: Sweep) -> str:
    """The first protocol with a loss for every finished trial, else the last validation."""
    for protocol in sweep.protocols:
        found = [sweep.measured(trial, protocol) for trial in sweep.finished]
        if all("loss" in each and each.get("metric") != "accuracy" for each in found):
            return protocol
    return VALIDATION


def _arm(sweep: Sweep, name: str, trials: tuple[Trial, ...], measure: str) -> Arm:
    losses = tuple(
        float(loss)
        for trial in trials
        if trial.state == "finished"
        and (loss := trial.val_loss if measure == VALIDATION else sweep.measured(trial, measure).get("loss"))
        is not None
    )
    arm = Arm(name=name, choices=trials[0].choices, trials=trials, losses=losses)
    if arm.loss is None:
        return arm
    return replace(arm, interval=t_interval(arm.loss, seed_noise([np.array(losses)])))


def _progress(arm: Arm) -> float:
    """Order of arms that never finished: who came farther first."""
    return -max(trial.tokens for trial in arm.trials)


def _units(
    sweep: Sweep,
    arms: Sequence[Arm],
    measure: str,
    read: Callable[[str], pd.DataFrame],
    problems: list[str],
) -> Mapping[str, Units]:
    """(S, U) losses per window of each arm and the (U,) weights that all share; empty if any are missing."""
    found: dict[str, Units] = {}
    for arm in arms if measure != VALIDATION else ():
        seeds = []
        for trial in arm.trials:
            weighting = str(sweep.measured(trial, measure).get("weighting", ""))
            try:
                seeds.append(units_of(read(trial.scores[measure]), weighting))
            except (StoreError, OSError, KeyError, ValueError) as err:
                problems.append(
                    f"{trial.name}: no losses per window ({err}), so no arm is compared on the text"
                )
                return {}
        weights = next(iter(found.values()))[1] if found else seeds[0][1]
        if not all(np.array_equal(each, weights) for _, each in seeds):
            problems.append(f"{arm.name}: measured on other windows, so no arm is compared on the text")
            return {}
        found[arm.name] = np.stack([values for values, _ in seeds]), weights
    return found


def _judged(arms: Sequence[Arm], units: Mapping[str, Units], *, resamples: int) -> list[Arm]:
    """Whole arms, each compared with the first; without windows and seeds nothing is."""
    if not arms:
        return []
    best, *others = arms
    draws: dict[str, Floats] = {}
    count = 0
    if units:
        weights = next(iter(units.values()))[1]
        count = len(weights)
        means = np.stack([values.mean(0) for values, _ in units.values()])
        rng = np.random.default_rng(20_412)
        draws = dict(zip(units, resampled_means(means, weights, rng=rng, resamples=resamples), strict=True))
    seeds = np.random.default_rng([20_412, 1])
    gaps = [_gap(arm, best, draws, units=count, rng=seeds) for arm in others]
    if any(gap is None for gap in gaps):
        return [replace(best, is_best=True), *others]
    known = [gap for gap in gaps if gap is not None]
    adjusted = holm([gap.p_value for gap in known])
    return [
        replace(best, is_best=True),
        *(
            replace(arm, gap=gap, p_adjusted=p_value, is_best=p_value >= ALPHA)
            for arm, gap, p_value in zip(others, known, adjusted, strict=True)
        ),
    ]


def _gap(
    arm: Arm, best: Arm, draws: Mapping[str, Floats], *, units: int, rng: np.random.Generator
) -> Interval | None:
    """How much worse an arm is than the best one."""
    assert arm.loss is not None
    assert best.loss is not None
    estimate = arm.loss - best.loss
    noise = seed_noise([np.array(arm.losses), np.array(best.losses)], [1.0, -1.0])
    if not draws:
        return t_interval(estimate, noise)
    found = over_units(estimate, draws[arm.name] - draws[best.name], noise, units=units, rng=rng)
    return found[0] if found else None


def _with_fronts(arms: Sequence[Arm]) -> list[Arm]:
    """Mark the arms that no other beats in loss and in a size; nothing where all are of one size."""
    whole = [arm for arm in arms if arm.rank and arm.is_whole]
    fronts: dict[str, list[str]] = {arm.name: [] for arm in arms}
    for size in ("parameters", "macs_per_token"):
        sizes = np.array([getattr(arm, size) for arm in whole], dtype=float)
        if not differ(sizes):
            continue
        front = pareto_front(sizes, np.array([arm.loss for arm in whole], dtype=float))
        for arm, is_on in zip(whole, front, strict=True):
            fronts[arm.name] += [size] if is_on else []
    return [replace(arm, fronts=tuple(fronts[arm.name])) for arm in arms]


def differ(sizes: Floats) -> bool:
    """Whether sizes differ by more than half a per cent: else quality against size says nothing."""
    return len(sizes) > 1 and float(sizes.max()) > 1.005 * float(sizes.min()) > 0
