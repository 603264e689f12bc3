"""Who is better than whom, in two tables: comparisons that were declared beforehand, and those with the best.

A declared comparison is a pair of variants that a config names before anything is run (`comparisons`); Holm
goes over all of them under all protocols. Without such a plan only the second table exists: every model
against the best of its size and track, Holm within these and the column. Each difference stands beside the
smallest one that would have been found: without that, "no difference" says nothing.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import names
from analysis.compare import ALPHA
from analysis.comparison import Cell, Column, Table, measure_titles
from analysis.differences import Difference, Read, difference, generator, resampled
from analysis.schema import rows_of
from analysis.stats import holm

Row = dict[str, Any]
Pairs = Sequence[tuple[str, str]]
"""Names of variants, each against another."""

UNIT = (
    "Differences are paired, in nats per token or in points of accuracy, above zero where the first is "
    "worse, with 95 % intervals. Detectable: the true difference that this text and these seeds show four "
    "times in five (two-sided, 5 %). Bold: significant."
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """One declared comparison under one protocol."""

    first: Row
    second: Row
    found: Difference
    p_adjusted: float


def declared(
    scores: pd.DataFrame, arms: pd.DataFrame, pairs: Pairs, read: Read, problems: list[str]
) -> tuple[Verdict, ...]:
    """Every declared pair under every protocol that measured both, Holm over all; what is absent is said."""
    of_variant = {str(row["variant"]): row["arm"] for row in rows_of(scores)}
    found: list[tuple[Row, Row, Difference]] = []
    for pair in pairs:
        absent = [name for name in pair if name not in of_variant]
        if absent:
            problems.append(f"declared {' against '.join(pair)}: no scores of {' and '.join(absent)}")
            continue
        cells = [_cells(arms, of_variant[name]) for name in pair]
        for measure in sorted(cells[0].keys() & cells[1].keys()):
            first, second = cells[0][measure], cells[1][measure]
            members = resampled([(first, read), (second, read)], problems)
            gap = difference(*members, rng=generator(1)) if len(members) == len(pair) else None
            if gap is not None:
                found.append((first, second, gap))
    adjusted = holm([gap.gap.p_value for *_, gap in found])
    return tuple(Verdict(*each, p_value) for each, p_value in zip(found, adjusted, strict=True))


def _cells(arms: pd.DataFrame, arm: str) -> dict[str, Row]:
    return {str(row["measure"]): row for row in rows_of(arms[arms["arm"] == arm])}


def declared_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per declared comparison and protocol."""
    columns = [Column(title, is_text=True) for title in ("first", "against", "under")]
    columns += [Column(title) for title in ("difference", "p", "detectable")]
    rows = []
    for each in verdicts:
        metric = each.first["metric"]
        found = each.found
        gap = (found.gap.estimate, found.gap.low, found.gap.high)
        cells = _gap_cells(gap, metric, p_value=each.p_adjusted, detectable=found.detectable)
        heads = (each.first["variant"], each.second["variant"], each.first["protocol"])
        rows.append((*(Cell(str(text)) for text in heads), *cells))
    return Table(tuple(columns), tuple(rows), (f"Holm over all {len(verdicts)}. {UNIT}",), marks_best=True)


def differences_table(arms: pd.DataFrame, *, only: Collection[str] | None = None) -> Table:
    """Every model, or `only` these subjects, against the best of its size and track; maybe without rows.

    Three columns per measure.
    """
    rows = rows_of(arms)
    titles = measure_titles(arms)
    columns = [Column("run", is_text=True), Column("track", is_text=True)]
    for number, title in enumerate(titles.values(), start=1):
        columns += [Column(head, f"{title} [{number}]") for head in ("worse by", "p", "detectable")]
    by_subject: dict[str, dict[str, Row]] = {}
    for row in rows:
        if names.is_number(row["worse_by"]) and (only is None or row["subject"] in only):
            by_subject.setdefault(row["subject"], {})[row["measure"]] = row
    body = tuple(_against_best(cells, list(titles)) for cells in by_subject.values())
    return Table(tuple(columns), body, (f"Holm over each column, size and track. {UNIT}",), marks_best=True)


def _against_best(cells: Mapping[str, Row], measures: Sequence[str]) -> tuple[Cell, ...]:
    first = next(iter(cells.values()))
    found = [Cell(first["variant"], first["label"]), Cell(first["track"])]
    for measure in measures:
        row = cells.get(measure)
        if row is None:
            found += [Cell(names.MISSING)] * 3
            continue
        gap = (row["worse_by"], row["worse_by_low"], row["worse_by_high"])
        found += _gap_cells(gap, row["metric"], p_value=row["p_adjusted"], detectable=row["detectable"])
    return tuple(found)


def _gap_cells(
    gap: tuple[float, float, float], metric: str, *, p_value: float, detectable: float
) -> tuple[Cell, ...]:
    estimate, low, high = (names.gap(value, metric) for value in gap)
    return (
        Cell(estimate, f"{low} to {high}", is_best=p_value < ALPHA),
        Cell(names.probability(p_value)),
        Cell(names.gap(detectable, metric).removeprefix("+")),
    )
