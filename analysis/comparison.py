"""The comparison table: one row per model, two columns per measure, and the notes it cannot do without.

A measure is a protocol on one token sequence; numbers of different measures never share a column. Models
stand under their teacher, the dense one first, then size by size and track by track, the best of each first;
seeds of one model are one row.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import pandas as pd

from analysis import names
from analysis.notes import MEANING, marks_of, notes
from analysis.schema import rows_of

Layout = Literal["full", "page", "brief"]
"""Every column; small figures below others, for a screen; or what a terminal has room for."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell as text, and what a page can add to it."""

    text: str
    detail: str = ""
    """The interval of a measurement."""

    is_best: bool = False
    address: str = ""
    """The scores record that the number comes from."""

    name: str = ""
    """What `krony report --explain` calls it."""


@dataclass(frozen=True, slots=True)
class Column:
    """Head of one column."""

    title: str
    group: str = ""
    """Second head over several columns: the measure."""

    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table before it has a format."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    marks_best: bool = False

    @property
    def groups(self) -> tuple[tuple[str, int], ...]:
        """Heads over the columns: name and number of columns, in order."""
        runs = groupby(column.group for column in self.columns)
        return tuple((name, len(list(columns))) for name, columns in runs)


def comparison(
    scores: pd.DataFrame, *, layout: Layout = "full", only: Collection[str] | None = None
) -> Table:
    """The table of a frame of `arms`, or of `scores`; `only` limits its rows to these subjects."""
    rows = rows_of(scores)
    measures = measure_titles(scores)
    subjects = _subjects(rows)
    columns = [Column("run", is_text=True), Column("model", is_text=True)]
    columns += [Column("track", is_text=True), Column("parameters")]
    columns += [Column("without wpe")] if layout == "full" else []
    columns += [Column("share")]
    columns += [Column("seeds")] if any(row["seeds"] > 1 for row in rows) else []
    columns += [Column("trained on")] if layout == "full" else []
    for number, (measure, title) in enumerate(measures.items(), start=1):
        metric = "acc." if _first(rows, measure)["metric"] == "accuracy" else "ppl"
        columns += [Column(metric, f"{title} [{number}]"), Column("recovery", f"{title} [{number}]")]
    common = {mark for mark in MEANING if all(mark in marks_of([row]) for row in rows)}
    heads = Heads(tuple(measures), column_names(measures, rows), row_names(rows), told_apart(rows))
    seeded = any(column.title == "seeds" for column in columns)
    body = tuple(
        _row(cells, heads, common, layout=layout, seeded=seeded)
        for subject, cells in subjects.items()
        if only is None or subject in only
    )
    marks_best = any(cell.is_best for row in body for cell in row)
    below = notes(rows, list(measures), marks_best=marks_best, brief=layout == "brief")
    return Table(tuple(columns), body, below, marks_best)


def measure_titles(scores: pd.DataFrame) -> dict[str, str]:
    """A short title for each measure: its protocol id, with a token count where one id has several texts."""
    rows = {row["measure"]: row for row in rows_of(scores.drop_duplicates("measure", keep="last"))}
    ids = [row["protocol"] for row in rows.values()]
    return {
        measure: row["protocol"]
        + (f" ({names.count(row['tokens'])} tokens)" if ids.count(row["protocol"]) > 1 else "")
        for measure, row in sorted(rows.items())
    }


@dataclass(frozen=True, slots=True)
class Heads:
    """What a row needs to know of the whole table."""

    measures: tuple[str, ...]
    columns: Mapping[str, str]
    """Names of columns by measure."""

    rows: Mapping[str, str]
    """Names of rows by subject."""

    told_apart: frozenset[tuple[Any, ...]]
    """Where someone is significantly worse than the best: only there is a best to mark."""


def row_names(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A name for each row, by its subject: its variant, or `teacher`; of namesakes with a fingerprint."""
    plain = {
        row["subject"]: "teacher" if row["is_dense"] else row["variant"] or row["method"] for row in rows
    }
    taken = Counter(plain.values())
    return {
        subject: name if taken[name] == 1 else f"{name}@{subject.split()[0].rpartition('-')[2]}"
        for subject, name in plain.items()
    }


def column_names(
    measures: Sequence[str] | Mapping[str, str], rows: Sequence[Mapping[str, Any]]
) -> dict[str, str]:
    """A name for each column, by its measure: its protocol, or its number where one protocol has several."""
    protocols = {row["measure"]: row["protocol"] for row in rows}
    taken = list(protocols.values())
    return {
        measure: protocols[measure] if taken.count(protocols[measure]) == 1 else str(number)
        for number, measure in enumerate(measures, start=1)
    }


def contest(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Whom a cell is compared with: the same column, teacher, track and size."""
    group = row["group"] if names.is_number(row["group"]) else None
    return row["measure"], row["teacher"], row["track"], group


def told_apart(rows: Sequence[Mapping[str, Any]]) -> frozenset[tuple[Any, ...]]:
    """Contests in which a cell is significantly worse than the best."""
    return frozenset(contest(row) for row in rows if row["is_best"] is False)


def _subjects(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Cells by measure for each model, in the order in which the models come."""
    subjects: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        subjects.setdefault(row["subject"], {})[row["measure"]] = row
    return subjects


def _row(
    cells: dict[str, dict[str, Any]],
    heads: "Heads",
    common: set[str],
    *,
    layout: Layout,
    seeded: bool,
) -> tuple[Cell, ...]:
    row = next(iter(cells.values()))
    marks = "".join(mark for mark in marks_of(cells.values()) if mark not in common)
    variant = "teacher" if row["is_dense"] else row["variant"]
    training = names.MISSING if row["is_dense"] else trained_on(row)
    krony = names.count(row["krony_parameters"])
    small = layout == "page"
    # what tells namesakes apart is left out where the name of the run does, and small on a screen
    named = layout == "brief" and heads.rows[row["subject"]] in (variant, "teacher")
    label = row["plain_label"] if named or small else row["label"]
    apart = row["label"].removeprefix(row["plain_label"]).strip() if small else ""
    found = [
        Cell(variant, training if small and not row["is_dense"] else ""),
        Cell(f"{label} {marks}".strip(), apart),
        Cell(row["track"] or names.MISSING),
        Cell(
            names.count(row["parameters"]), f"{krony} without wpe" if small and krony != names.MISSING else ""
        ),
    ]
    found += [Cell(krony)] if layout == "full" else []
    found += [Cell(names.share(row["share"]))]
    found += [Cell(names.MISSING if row["is_dense"] else str(row["seeds"]))] if seeded else []
    found += [Cell(training)] if layout == "full" else []
    for measure in heads.measures:
        cell = cells.get(measure)
        if cell is None:
            found += [Cell(names.MISSING), Cell(names.MISSING)]
            continue
        best = cell["is_best"] is True and contest(cell) in heads.told_apart
        value = names.quantity(cell["value"], cell["metric"])
        name = f"{heads.rows[row['subject']]}:{heads.columns[measure]}"
        found += [Cell(value, interval_text(cell), best, cell["address"], name)]
        found += [Cell(names.MISSING if row["is_dense"] else names.share(cell["recovery"]))]
    return tuple(found)


def trained_on(row: dict[str, Any]) -> str:
    """Recovery training as a reader wants it: tokens, or that there was none."""
    if not names.is_number(row["steps"]) or row["steps"] == 0:
        return "one-shot"
    return f"{names.short_count(row['train_tokens'])} tokens"


def interval_text(row: dict[str, Any]) -> str:
    """`24.1–25.6`, or nothing."""
    if not names.is_number(row["low"]) or not names.is_number(row["high"]):
        return ""
    low, high = (names.quantity(row[end], row["metric"]) for end in ("low", "high"))
    return f"{low.removesuffix(' %')}–{high}"


def _first(rows: Sequence[dict[str, Any]], measure: str) -> dict[str, Any]:
    return next(row for row in rows if row["measure"] == measure)
