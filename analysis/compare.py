"""What the numbers allow to be said: an interval for each cell, and who is best at equal size and track.

Models of one teacher and track whose parameters differ by less than half a per cent are ranked together. The
best value of a column is compared with every other, Holm-corrected; all that are not significantly worse are
best together. Where one cell has no units, nothing is said of its rivals: it might be the best. A model on no
track (`analysis.tracks`) is ranked with nobody.
Where a row stands for several seeds, their noise is in its interval and in every comparison; with one seed
each nothing is known of it.
"""

from collections.abc import Sequence
from itertools import groupby
from operator import itemgetter

import pandas as pd

from analysis.differences import Arm, Read, Row, difference, generator, own_interval, resampled
from analysis.names import is_number
from analysis.schema import SCORES, checked, rows_of
from analysis.stats import RESAMPLES, holm
from analysis.tracks import TRACKS

SAME_SIZE = 0.005
ALPHA = 0.05


def compared(
    scores: pd.DataFrame, read: Read, problems: list[str], *, resamples: int = RESAMPLES
) -> pd.DataFrame:
    """`scores` with intervals, size groups and the best of each; `read` gives the losses of an address.

    A row whose `address` names several, one per seed, is compared as their mean.
    """
    rows = rows_of(scores)
    _group_by_size(rows)
    column = itemgetter("teacher", "measure")
    for _, members in groupby(sorted(rows, key=column), key=column):
        _judge(list(members), read, problems, resamples=resamples)
    return checked(rows, SCORES)


def _judge(cells: Sequence[Row], read: Read, problems: list[str], *, resamples: int) -> None:
    """One column: an interval for each cell, and the best of each contest; its draws are gone afterwards."""
    arms = resampled([(row, read) for row in cells], problems, resamples=resamples)
    for arm in arms:
        if ends := own_interval(arm):
            arm.row["low"], arm.row["high"] = ends
    ranked = [row for row in cells if row["track"] in TRACKS and is_number(row["group"])]
    contest = itemgetter("group", "track")
    for _, rivals in groupby(sorted(ranked, key=contest), key=contest):
        addresses = {row["address"] for row in rivals}
        group = [arm for arm in arms if arm.row["address"] in addresses]
        if len(group) == len(addresses):
            _mark_best(group)


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
    """Compare every cell of a column, size and track with the best of them; a lone cell has no rival."""
    if len(rivals) < 2:
        return
    extreme = max if rivals[0].row["metric"] == "accuracy" else min
    best = extreme(rivals, key=lambda rival: rival.row["value"])
    others = [rival for rival in rivals if rival is not best]
    rng = generator(1)
    judged = [difference(rival, best, rng=rng) for rival in others]
    found = [each for each in judged if each is not None]
    if len(found) < len(others):
        return
    adjusted = holm([each.gap.p_value for each in found])
    best.row["is_best"] = True
    for rival, each, p_value in zip(others, found, adjusted, strict=True):
        rival.row.update(
            worse_by=each.gap.estimate,
            worse_by_low=each.gap.low,
            worse_by_high=each.gap.high,
            detectable=each.detectable,
            test=each.test,
            p_adjusted=p_value,
            is_best=p_value >= ALPHA,
        )
