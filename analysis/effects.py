"""Main effects: what a value of one axis is worth on average over the other axes, seeds' noise included.

Values are compared on equal ground only: over the combinations of the other axes (blocks) in which every
value has a whole arm. Where no block holds all values, those with the fewest blocks are left out, and named;
an axis of which not even two values share a block has no effect of its own. The arms are what was asked
about, not a sample, so the interval of a mean is that of the seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.compare import ALPHA
from analysis.names import MISSING, is_number, leaf
from analysis.ranking import Arm
from analysis.stats import Interval, holm, seed_noise, t_interval
from analysis.sweeps import Sweep, axis_values


@dataclass(frozen=True, kw_only=True, slots=True)
class Level:
    """One value of an axis."""

    value: Any
    """A number or a text; None where the axis does not apply."""

    loss: float
    """Mean over blocks of the means over seeds, nats per token."""

    interval: Interval | None
    gap: Interval | None = None
    """How much worse than the best value; None for the best, or where seeds are not known."""

    p_adjusted: float | None = None
    is_best: bool = False
    """Best, or not significantly worse than the best."""

    @property
    def text(self) -> str:
        """The value as a reader meets it."""
        return leaf(self.value) if self.value is not None else MISSING


@dataclass(frozen=True, kw_only=True, slots=True)
class Effect:
    """One axis."""

    axis: str
    levels: tuple[Level, ...]
    """In the order of their values; empty if no two values can be compared."""

    blocks: int
    """Combinations of the other axes that the means are over."""

    note: str
    """What is not balanced about it; empty if nothing is."""

    @property
    def spread(self) -> float:
        """Loss of the worst value over that of the best."""
        losses = [level.loss for level in self.levels]
        return max(losses) - min(losses) if losses else 0.0

    @property
    def tells_apart(self) -> bool:
        """Whether any value is significantly worse than the best."""
        return any(level.p_adjusted is not None and not level.is_best for level in self.levels)


def main_effects(sweep: Sweep, arms: Sequence[Arm]) -> tuple[Effect, ...]:
    """The effect of every axis of which whole arms have two values, the largest spread first."""
    arms = [arm for arm in arms if arm.losses and arm.is_whole]
    values = {
        axis: {arm.name: found[arm.trials[0].key] for arm in arms}
        for axis in sweep.axes
        for found in [axis_values(sweep, axis)]
    }
    effects = [
        _effect(axis, arms, values) for axis in sweep.axes if len(set(map(_key, values[axis].values()))) > 1
    ]
    return tuple(sorted(effects, key=lambda effect: -effect.spread))


def before_stops(sweep: Sweep) -> tuple[int, tuple[Arm, ...]]:
    """Tokens of the last validation of all trials that did not fail, and the arms as they stood there.

    What early stopping made unbalanced at the end is whole there. 0 and no arms if nobody was stopped, or if
    there is no such point.
    """
    points = {t.key: {int(tokens): float(loss) for tokens, loss in t.rungs if tokens} for t in sweep.trials}
    alive = [trial for trial in sweep.trials if trial.state != "failed"]
    common = set.intersection(*(set(points[trial.key]) for trial in alive)) if alive else set()
    if not common or all(trial.state == "finished" for trial in alive):
        return 0, ()
    tokens = max(common)
    losses = {key: found[tokens] for key, found in points.items() if tokens in found}
    arms = (
        Arm(
            name=name,
            choices=trials[0].choices,
            trials=trials,
            losses=tuple(losses[trial.key] for trial in trials if trial.key in losses),
        )
        for name, trials in sweep.arms.items()
    )
    return tokens, tuple(arms)


def _effect(axis: str, arms: Sequence[Arm], values: Mapping[str, Mapping[str, Any]]) -> Effect:
    own = values[axis]
    others = [other for other in values if other != axis]
    blocks: dict[str, dict[str, Arm]] = {}
    for arm in arms:
        block = json.dumps([values[other][arm.name] for other in others])
        blocks.setdefault(block, {})[_key(own[arm.name])] = arm
    originals = {_key(value): value for value in own.values()}
    kept, full = _shared(sorted(originals, key=lambda key: _order(originals[key])), blocks)
    notes = []
    if len(kept) < 2:
        notes.append("no two values share a combination of the other axes, so it has no effect of its own")
        return Effect(axis=axis, levels=(), blocks=0, note="; ".join(notes))
    if lost := [leaf(value) for key, value in originals.items() if key not in kept]:
        notes.append(f"left out, as no combination has it and all others: {', '.join(lost)}")
    if unused := sum(key in kept for each in blocks.values() for key in each) - len(full) * len(kept):
        notes.append(
            f"unbalanced: {unused} of {len(arms)} arms lack a partner for every value, so are not in it"
        )
    groups = [[block[key] for block in full] for key in kept]
    levels = [_level(originals[key], group) for key, group in zip(kept, groups, strict=True)]
    return Effect(axis=axis, levels=_judged(levels, groups), blocks=len(full), note="; ".join(notes))


def _shared(
    keys: Sequence[str], blocks: Mapping[str, Mapping[str, Arm]]
) -> tuple[list[str], list[Mapping[str, Arm]]]:
    """The most common values that some blocks hold all of, and these blocks."""
    kept = list(keys)
    while len(kept) > 1:
        full = [block for block in blocks.values() if all(key in block for key in kept)]
        if full:
            return kept, full
        kept.remove(min(reversed(kept), key=lambda key: sum(key in block for block in blocks.values())))
    return kept, []


def _level(value: Any, arms: Sequence[Arm]) -> Level:
    losses = [np.array(arm.losses) for arm in arms]
    mean = float(np.mean([each.mean() for each in losses]))
    noise = seed_noise(losses, [1 / len(arms)] * len(arms))
    return Level(value=value, loss=mean, interval=t_interval(mean, noise))


def _judged(levels: Sequence[Level], groups: Sequence[Sequence[Arm]]) -> tuple[Level, ...]:
    """Every value against the best one, Holm over the axis."""
    first = min(range(len(levels)), key=lambda i: levels[i].loss)
    gaps: dict[int, Interval] = {}
    for i, level in enumerate(levels):
        both = [np.array(arm.losses) for arm in (*groups[i], *groups[first])]
        share = 1 / len(groups[i])
        shares = [share] * len(groups[i]) + [-share] * len(groups[first])
        gap = t_interval(level.loss - levels[first].loss, seed_noise(both, shares))
        if i != first and gap is not None:
            gaps[i] = gap
    adjusted = dict(zip(gaps, holm([gap.p_value for gap in gaps.values()]), strict=True))
    return tuple(
        replace(
            level,
            gap=gaps.get(i),
            p_adjusted=adjusted.get(i),
            is_best=i == first or adjusted.get(i, 0.0) >= ALPHA,
        )
        for i, level in enumerate(levels)
    )


def _key(value: Any) -> str:
    return json.dumps(value)


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, then texts, then what does not apply."""
    if is_number(value):
        return 0, float(value), ""
    return (2, 0.0, "") if value is None else (1, 0.0, str(value))
