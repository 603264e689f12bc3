"""What the numbers allow to be said: an interval for each cell, and who is best at equal size.

Models of one teacher whose parameters differ by less than half a per cent form a size group. In a group the
best value of a column is compared with every other by a paired bootstrap over windows, documents or
passages, Holm-corrected; all that are not significantly worse are best together. Where a row stands for
several seeds, their noise is in its interval and in every comparison; with one seed each nothing is known
of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import is_number
from analysis.schema import SCORES, checked
from analysis.stats import RESAMPLES, Floats, holm, interval, resampled_means, seed_noise
from pipeline.errors import StoreError

SAME_SIZE = 0.005
ALPHA = 0.05

Row = dict[str, Any]
"""One row of `scores` while it is filled in."""

Units = tuple[Floats, Floats]
"""(U,) sums and (U,) weights, whose ratio of totals is the loss, or the error rate, of a cell."""


@dataclass(frozen=True, eq=False, slots=True)
class Arm:
    """One cell with what resampling says about it."""

    row: Row
    means: Floats
    """(resamples,) of its loss or error rate, averaged over its seeds."""

    seeds: Floats
    """(S,) the same over all units, one per seed."""


def compared(
    scores: pd.DataFrame,
    read: Callable[[str], pd.DataFrame],
    problems: list[str],
    *,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """`scores` with intervals, size groups and the best of each; `read` gives the losses of an address.

    A row whose `address` names several, one per seed, is compared as their mean.
    """
    rows: list[Row] = [{str(key): value for key, value in row.items()} for row in scores.to_dict("records")]
    _group_by_size(rows)
    column = itemgetter("teacher", "measure")
    for _, cells in groupby(sorted(rows, key=column), key=column):
        arms = _arms(list(cells), read, problems, resamples=resamples)
        for arm in arms:
            found = interval(0.0, seed_noise([arm.seeds]).on(arm.means, rng=_generator(1)))
            arm.row["low"], arm.row["high"] = sorted(
                _value(end, arm.row["metric"]) for end in (found.low, found.high)
            )
        rivals = [arm for arm in arms if not arm.row["is_dense"] and is_number(arm.row["group"])]
        for _, group in groupby(sorted(rivals, key=_group), key=_group):
            _mark_best(list(group))
    return checked(rows, SCORES)


def _group(rival: Arm) -> int:
    return int(rival.row["group"])


def _generator(level: int) -> np.random.Generator:
    """Of units (0) or seeds (1): the same resamples every time, so the same page."""
    return np.random.default_rng([20_412, 1] if level else 20_412)


def _arms(
    cells: Sequence[Row], read: Callable[[str], pd.DataFrame], problems: list[str], *, resamples: int
) -> list[Arm]:
    """Bootstrap means of each cell of one column, over the same resamples for all."""
    units: list[tuple[Row, Floats, Floats]] = []
    for row in cells:
        try:
            seeds = [units_of(read(address), row["weighting"]) for address in row["address"].split()]
        except (StoreError, OSError, KeyError, ValueError) as err:
            problems.append(f"{row['address']}: no losses per unit, so no interval ({err})")
            continue
        first = units[0][2] if units else seeds[0][1]
        if not all(np.array_equal(weights, first) for _, weights in seeds):
            other = (units[0][0] if units else row)["address"].split()[0]
            problems.append(f"{row['address']}: other units than {other}, so no interval")
            continue
        units.append((row, np.stack([values for values, _ in seeds]), first))
    if not units:
        return []
    weights = units[0][2]
    means = np.stack([values.mean(0) for _, values, _ in units])
    draws = resampled_means(means, weights, rng=_generator(0), resamples=resamples)
    return [
        Arm(row, drawn, values.sum(1) / weights.sum())
        for (row, values, _), drawn in zip(units, draws, strict=True)
    ]


def _group_by_size(rows: Sequence[Row]) -> None:
    """Number the size groups within each teacher; 0 holds the largest models."""
    sized = [row for row in rows if is_number(row["parameters"])]
    for _, family in groupby(sorted(sized, key=itemgetter("teacher")), key=itemgetter("teacher")):
        number, top = -1, float("inf")
        for row in sorted(family, key=itemgetter("parameters"), reverse=True):
            if row["parameters"] < top * (1 - SAME_SIZE):
                number, top = number + 1, row["parameters"]
            row["group"] = number


def _mark_best(rivals: Sequence[Arm]) -> None:
    """Compare every cell of a column and size group with the best of them; a lone cell has no rival."""
    if len(rivals) < 2:
        return
    extreme = max if rivals[0].row["metric"] == "accuracy" else min
    best = extreme(rivals, key=lambda rival: rival.row["value"])
    others = [rival for rival in rivals if rival is not best]
    rng = _generator(1)
    gaps = []
    for rival in others:
        gap = rival.means - best.means
        noise = seed_noise([rival.seeds, best.seeds])
        gaps.append(interval(float(gap.mean()), noise.on(gap, rng=rng)))
    best.row["is_best"] = True
    for rival, found, p_value in zip(others, gaps, holm([gap.p_value for gap in gaps]), strict=True):
        verdict = {"worse_by": found.estimate, "worse_by_low": found.low, "worse_by_high": found.high}
        rival.row.update(verdict, p_adjusted=p_value, is_best=p_value >= ALPHA)


def units_of(losses: pd.DataFrame, weighting: str) -> Units:
    """The units of a scores artifact, as its protocol averages over them."""
    nll, tokens = losses["nll"].to_numpy(float), losses["tokens"].to_numpy(float)
    if weighting == "passages":
        return 1.0 - losses["correct"].to_numpy(float), np.ones(len(losses))
    if weighting == "windows":
        return nll / tokens, np.ones(len(losses))
    return nll, tokens


def _value(mean: float, metric: str) -> float:
    """A mean loss as perplexity, a mean error as accuracy."""
    return 1.0 - mean if metric == "accuracy" else float(np.exp(mean))
