"""A difference of two cells of one column: its interval, its test, and how small a one would have been found.

Both cells are resampled over the same windows, documents or passages, so they are compared unit by unit;
where a cell stands for several seeds, their noise comes on top. Whether two models of one seed each are right
equally often is McNemar's exact test. The minimum detectable difference is what an interval alone does not
say: the true difference that this text and these seeds show four times in five.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.stats import (
    FEW,
    RESAMPLES,
    Floats,
    Interval,
    interval_over_units,
    mcnemar,
    over_units,
    resampled_means,
    seed_noise,
)
from pipeline.errors import StoreError

Test = Literal["bootstrap", "Student", "McNemar"]
"""All paired; Student's where units are too few for a bootstrap."""

Row = dict[str, Any]
"""One row of `scores` while it is filled in."""

Units = tuple[Floats, Floats]
"""(U,) sums and (U,) weights, whose ratio of totals is the loss, or the error rate, of a cell."""

Read = Callable[[str], pd.DataFrame]
"""Losses per unit of a scores address."""


@dataclass(frozen=True, eq=False, slots=True)
class Arm:
    """One cell with what resampling says about it."""

    row: Row
    means: Floats
    """(resamples,) of its loss or error rate, averaged over its seeds."""

    seeds: Floats
    """(S,) the same over all units, one per seed."""

    units: int
    """How many windows, documents or passages."""

    right: NDArray[np.bool_] | None
    """(U,) which passages are right; None for a loss, and for several seeds."""


@dataclass(frozen=True, slots=True)
class Difference:
    """How much worse the first cell is: nats per token, or the share of passages it has wrong."""

    gap: Interval
    detectable: float
    """The true difference that would be found with power 80 %, two-sided at 5 %."""

    test: Test
    """Where the p-value comes from; beside McNemar's the interval is that of the others."""


def own_interval(arm: Arm) -> tuple[float, float] | None:
    """Ends of the interval of its value: a perplexity, or an accuracy; None with one unit."""
    noise = seed_noise([arm.seeds])
    estimate = float(arm.seeds.mean())
    found = interval_over_units(estimate, arm.means, noise, units=arm.units, rng=generator(1))
    if found is None:
        return None
    ends = found.low, found.high
    if arm.row["metric"] == "accuracy":
        return 1.0 - ends[1], 1.0 - ends[0]
    return float(np.exp(ends[0])), float(np.exp(ends[1]))


def difference(first: Arm, second: Arm, *, rng: np.random.Generator) -> Difference | None:
    """The first less the second; `rng` draws the noise of seeds, where there are any; None with one unit."""
    noise = seed_noise([first.seeds, second.seeds])
    estimate = float(first.seeds.mean() - second.seeds.mean())
    judged = over_units(estimate, first.means - second.means, noise, units=first.units, rng=rng)
    if judged is None:
        return None
    found, smallest = judged
    if first.right is not None and second.right is not None:
        return Difference(replace(found, p_value=mcnemar(first.right, second.right)), smallest, "McNemar")
    return Difference(found, smallest, "Student" if first.units < FEW else "bootstrap")


def resampled(
    cells: Iterable[tuple[Row, Read]], problems: list[str], *, resamples: int = RESAMPLES
) -> list[Arm]:
    """Bootstrap means of each cell of one column, over the same resamples for all; others become problems.

    With each cell comes what reads its losses: cells may lie in several stores.
    """
    units: list[tuple[Row, Floats, Floats]] = []
    for row, read in cells:
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
    draws = resampled_means(means, weights, rng=generator(0), resamples=resamples)
    return [
        Arm(row, drawn, values.sum(1) / weights.sum(), len(weights), _right(row, values))
        for (row, values, _), drawn in zip(units, draws, strict=True)
    ]


def units_of(losses: pd.DataFrame, weighting: str) -> Units:
    """The units of a scores artifact, as its protocol averages over them."""
    nll, tokens = losses["nll"].to_numpy(float), losses["tokens"].to_numpy(float)
    if weighting == "passages":
        return 1.0 - losses["correct"].to_numpy(float), np.ones(len(losses))
    if weighting == "windows":
        return nll / tokens, np.ones(len(losses))
    return nll, tokens


def generator(level: int) -> np.random.Generator:
    """Of units (0) or seeds (1): the same resamples every time, so the same page."""
    return np.random.default_rng([20_412, 1] if level else 20_412)


def _right(row: Mapping[str, Any], errors: Floats) -> NDArray[np.bool_] | None:
    return errors[0] == 0.0 if row["metric"] == "accuracy" and len(errors) == 1 else None
