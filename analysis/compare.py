"""What the numbers allow to be said: an interval for each cell, and who is best at equal size.

Models of one teacher whose parameters differ by less than half a per cent form a size group. In a group the
best value of a column is compared with every other by a paired bootstrap over windows, documents or
passages, Holm-corrected; all that are not significantly worse are best together. With one seed each the
interval knows nothing of seed noise.
"""

from collections.abc import Callable, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pandas as pd

from analysis.names import is_number
from analysis.schema import SCORES, checked
from analysis.stats import RESAMPLES, Floats, holm, interval, resampled_means
from pipeline.errors import StoreError

SAME_SIZE = 0.005
ALPHA = 0.05

Row = dict[str, Any]
"""One row of `scores` while it is filled in."""

Units = tuple[Floats, Floats]
"""(U,) sums and (U,) weights, whose ratio of totals is the loss, or the error rate, of a cell."""


def compared(
    scores: pd.DataFrame,
    read: Callable[[str], pd.DataFrame],
    problems: list[str],
    *,
    resamples: int = RESAMPLES,
) -> pd.DataFrame:
    """`scores` with intervals, size groups and the best of each; `read` gives the losses of an address."""
    rows: list[Row] = [{str(key): value for key, value in row.items()} for row in scores.to_dict("records")]
    _group_by_size(rows)
    column = itemgetter("teacher", "measure")
    for _, cells in groupby(sorted(rows, key=column), key=column):
        draws = _draws(list(cells), read, problems, resamples=resamples)
        for row, means in draws:
            found = interval(0.0, means)
            row["low"], row["high"] = sorted(_value(end, row["metric"]) for end in (found.low, found.high))
        rivals = [(row, means) for row, means in draws if not row["is_dense"] and is_number(row["group"])]
        for _, group in groupby(sorted(rivals, key=_group), key=_group):
            _mark_best(list(group))
    return checked(rows, SCORES)


def _group(rival: tuple[Row, Floats]) -> int:
    return int(rival[0]["group"])


def _draws(
    cells: Sequence[Row], read: Callable[[str], pd.DataFrame], problems: list[str], *, resamples: int
) -> list[tuple[Row, Floats]]:
    """Bootstrap means of each cell of one column, over the same resamples for all."""
    units: list[tuple[Row, Floats, Floats]] = []
    for row in cells:
        try:
            values, weights = _units(read(row["address"]), row["weighting"])
        except (StoreError, OSError, KeyError, ValueError) as err:
            problems.append(f"{row['address']}: no losses per unit, so no interval ({err})")
            continue
        if units and not np.array_equal(weights, units[0][2]):
            problems.append(f"{row['address']}: other units than {units[0][0]['address']}, so no interval")
            continue
        units.append((row, values, weights))
    if not units:
        return []
    rng = np.random.default_rng(20_412)  # the same resamples every time: the same page
    draws = resampled_means(np.stack([u[1] for u in units]), units[0][2], rng=rng, resamples=resamples)
    return [(row, means) for (row, _, _), means in zip(units, draws, strict=True)]


def _group_by_size(rows: Sequence[Row]) -> None:
    """Number the size groups within each teacher; 0 holds the largest models."""
    sized = [row for row in rows if is_number(row["parameters"])]
    for _, family in groupby(sorted(sized, key=itemgetter("teacher")), key=itemgetter("teacher")):
        number, top = -1, float("inf")
        for row in sorted(family, key=itemgetter("parameters"), reverse=True):
            if row["parameters"] < top * (1 - SAME_SIZE):
                number, top = number + 1, row["parameters"]
            row["group"] = number


def _mark_best(rivals: Sequence[tuple[Row, Floats]]) -> None:
    """Compare every cell of a column and size group with the best of them; a lone cell has no rival."""
    if len(rivals) < 2:
        return
    extreme = max if rivals[0][0]["metric"] == "accuracy" else min
    best, reference = extreme(rivals, key=lambda rival: rival[0]["value"])
    others = [(row, means) for row, means in rivals if row is not best]
    found = [interval(float((means - reference).mean()), means - reference) for _, means in others]
    best["is_best"] = True
    for (row, _), gap, p_value in zip(others, found, holm([gap.p_value for gap in found]), strict=True):
        row["worse_by"], row["worse_by_low"], row["worse_by_high"] = gap.estimate, gap.low, gap.high
        row["p_adjusted"], row["is_best"] = p_value, p_value >= ALPHA


def _units(losses: pd.DataFrame, weighting: str) -> Units:
    nll, tokens = losses["nll"].to_numpy(float), losses["tokens"].to_numpy(float)
    if weighting == "passages":
        return 1.0 - losses["correct"].to_numpy(float), np.ones(len(losses))
    if weighting == "windows":
        return nll / tokens, np.ones(len(losses))
    return nll, tokens


def _value(mean: float, metric: str) -> float:
    """A mean loss as perplexity, a mean error as accuracy."""
    return 1.0 - mean if metric == "accuracy" else float(np.exp(mean))
