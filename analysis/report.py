"""From a store to a report: the verb behind `krony report`, and the table at the end of `krony run`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd

from analysis.comparison import comparison
from analysis.frames import Frames, load_frames
from analysis.page import LINES, MISSING, build_page
from analysis.provenance import Provenance, explain
from analysis.speed import speed_table, speeds
from analysis.speed_origin import explain_figure, is_figure
from analysis.tables import csv, latex, markdown, terminal
from analysis.traces import losses
from analysis.verdicts import Pairs, declared, declared_table
from pipeline.store.artifacts import Store
from pipeline.store.location import Location


@dataclass(frozen=True, eq=False)
class Report:
    """What was written, and the table for a terminal."""

    html: Path
    markdown: Path
    table: str
    frames: Frames

    def json(self) -> str:
        """The scores as a JSON array, one object per cell, with absent values left out."""
        rows = self.frames.scores.to_dict("records")
        kept = [{key: value for key, value in row.items() if not pd.isna(value)} for row in rows]
        return json.dumps(kept, indent=1)


def write_report(
    store: Store | str, out: Path, *, scores: Sequence[str] = (), comparisons: Pairs = ()
) -> Report:
    """Write page, tables and figures of a store into `out`; `scores` limits them to these addresses.

    `comparisons` are pairs of variants that were declared beforehand. Never fails for what a store lacks:
    that is said on the page. The same store gives the same bytes.
    """
    opened = store if isinstance(store, Store) else Store(store)
    frames = load_frames(opened, scores=scores)
    problems: list[str] = []
    measured = _speeds(frames, problems, everything=not scores)
    finished = [*frames.scores["finished"].dropna(), *measured["finished"].dropna()]
    verdicts = declared(frames.scores, frames.arms, comparisons, partial(losses, opened), problems)
    frames = replace(frames, problems=tuple(dict.fromkeys([*frames.problems, *problems])))
    written = str(max(finished, default=""))
    page = build_page(frames, speeds=measured, store=opened.root.uri, written=written, verdicts=verdicts)
    table = comparison(frames.arms)
    place = Location.of(out)
    contents = {
        "report.html": page.html(),
        "report.md": page.markdown(),
        "comparison.md": markdown(table),
        "comparison.tex": latex(table),
        "arms.csv": csv(frames.arms),
        "scores.csv": csv(frames.scores),
        "history.csv": csv(frames.history),
        **({"modules.csv": csv(frames.modules)} if len(frames.modules) else {}),
        **(
            {MISSING: "".join(f"{line}\n" for line in frames.problems)}
            if len(frames.problems) > LINES
            else {}
        ),
        **({"speed.csv": csv(measured), "speed.tex": latex(speed_table(measured))} if len(measured) else {}),
        **{f"figures/{figure.key}.svg": figure.svg for figure in page.figures},
    }
    for key, text in contents.items():
        place.put_bytes(key, text.encode())
    shown = terminal(comparison(frames.arms, layout="brief"))
    shown += f"\n\ndeclared comparisons\n{terminal(declared_table(verdicts))}" if verdicts else ""
    missing = "".join(f"\nmissing   {problem}" for problem in frames.problems)
    return Report(out / "report.html", out / "report.md", shown + missing, frames)


def _speeds(frames: Frames, problems: list[str], *, everything: bool) -> pd.DataFrame:
    """What was measured of the models of these frames, or of all in the store."""
    shown = {*frames.scores["run"].dropna(), *frames.scores["subject"].dropna()}
    records = [
        record
        for record in frames.graph.of_kind("speed")
        if everything or shown & {each.address for each in frames.graph.path(record)}
    ]
    return speeds(frames.graph, records, problems)


def comparison_table(store: Store | str, *, scores: Sequence[str] = ()) -> str:
    """The comparison table of a store for a terminal; writes nothing."""
    opened = store if isinstance(store, Store) else Store(store)
    return terminal(comparison(load_frames(opened, scores=scores).arms, layout="brief"))


def explained(store: Store | str, cell: str, *, scores: Sequence[str] = ()) -> Provenance:
    """The provenance of the cell `ROW:COLUMN` of that report; raises ConfigError listing what there is."""
    opened = store if isinstance(store, Store) else Store(store)
    frames = load_frames(opened, scores=scores)
    if is_figure(cell):
        measured = _speeds(frames, [], everything=not scores)
        return explain_figure(frames.graph, measured, cell, store=opened.root.uri)
    return explain(frames, cell, store=opened.root.uri)
