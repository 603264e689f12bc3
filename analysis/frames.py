"""Records and histories as tidy tables, with their columns checked: all that tables, plots and pages read.

`scores` has one row per measured cell: the number, what it means (protocol, text, tokens), and everything
that its chain of records says about the model. Cells may be compared only within one `measure`: the same
protocol, version and token sequence. `arms` is the same with all seeds of an arm in one row. `history` has
one row per run and step, `modules` one per replaced weight matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis import names
from analysis.arms import arms, relabelled
from analysis.compare import compared
from analysis.gaps import gaps, unscored
from analysis.lineage import Graph, Lineage
from analysis.schema import SCORES, checked, fitting, rows_of
from analysis.traces import history, known_losses, modules
from analysis.tracks import NONE, TRACKS, tracks
from pipeline.store.artifacts import Store
from pipeline.store.records import Record


@dataclass(frozen=True, eq=False)
class Frames:
    """The tables of one store, or of chosen scores in it."""

    scores: pd.DataFrame
    arms: pd.DataFrame
    """`scores`, with models that differ in seeds alone in one row: what tables and plots show."""

    history: pd.DataFrame
    modules: pd.DataFrame
    graph: Graph
    """The records behind all of it."""

    problems: tuple[str, ...]
    """What is missing or cannot be read, one line each."""


def load_frames(store: Store, *, scores: Sequence[str] = ()) -> Frames:
    """Read a store; `scores` limits the tables to these addresses and what stands behind them."""
    graph = Graph.read(store)
    wanted = [r for r in graph.of_kind("scores") if not scores or r.address in scores]
    problems = list(graph.problems) if not scores else []
    problems += [f"{address}: no scores" for address in scores if address not in graph.records]
    paths: list[tuple[Record, Lineage]] = []
    for record in wanted:
        lineage = graph.lineage(record)
        if not names.is_number(record.metrics.get("value")):
            problems.append(f"{record.address}: its record holds no value")
        elif lineage is None:
            problems.append(f"{record.address}: the model it scored has no record")
        else:
            paths.append((record, lineage))
    on_track = tracks(store, [path.init for _, path in paths if path.init], problems)
    rows = _scores(_cells(paths, problems), on_track)
    read = known_losses(store, graph)
    table = compared(checked(rows, SCORES), read, problems)
    together = relabelled(arms(rows))
    seeded = any(row["seeds"] > 1 for row in together)
    combined = in_order(compared(checked(together, SCORES), read, problems) if seeded else table)
    table = in_order(_as_arms(table, combined) if seeded else table)
    curves = history(store, graph, table, combined, problems)
    errors = modules(store, graph, combined, problems)
    problems += gaps(table)
    if not scores:
        problems += unscored(graph, table)
    return Frames(table, combined, curves, errors, graph, tuple(dict.fromkeys(problems)))


def _scores(cells: Sequence[dict[str, Any]], on_track: Mapping[str, str]) -> list[dict[str, Any]]:
    rows = _newest_exports(cells)
    for row in rows:
        row["track"] = on_track.get(row["init"], NONE)
    subjects = {row["subject"]: row for row in rows}
    labels = [row["plain_label"] for row in subjects.values()]
    for key in ("config", "calibration"):
        labels = names.distinct(labels, [row[key] for row in subjects.values()])
    named = dict(zip(subjects, labels, strict=True))
    for row in rows:
        row["label"] = named[row["subject"]]
    dense = {(row["teacher"], row["measure"]): row for row in rows if row["is_dense"]}
    for row in rows:
        reference = dense.get((row["teacher"], row["measure"]))
        if reference is None:
            continue
        best, value = reference["value"], row["value"]
        row["recovery"] = value / best if row["metric"] == "accuracy" else best / value
        if reference.get("parameters") and row.get("parameters"):
            row["share"] = row["parameters"] / reference["parameters"]
    return rows


def _cells(paths: Sequence[tuple[Record, Lineage]], problems: list[str]) -> list[dict[str, Any]]:
    """A row per record that says what a record says; one of somebody else may say anything."""
    rows = []
    for record, lineage in paths:
        try:
            rows.append(fitting(cell(record, lineage), SCORES))
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as err:
            problems.append(f"{record.address}: a record on its path holds values of another kind ({err})")
    return rows


def _newest_exports(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One model per run: exports of one run hold equal weights, so the newest stands for all of them."""
    models: dict[str, dict[str, Any]] = {}
    cells: dict[tuple[str, str], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["finished"], row["address"])):
        owner = row["run"] if row["run"] and row["subject"].startswith("model/") else row["subject"]
        models[owner] = row
        cells[owner, row["measure"]] = row
    shared = ("subject", "arm", "variant")
    return [
        {**row, **{key: models[owner][key] for key in shared}} for (owner, _), row in sorted(cells.items())
    ]


def _as_arms(scores: pd.DataFrame, combined: pd.DataFrame) -> pd.DataFrame:
    """`scores` with the verdicts of their arms: whoever is best is so with all seeds."""
    verdicts = ["group", "worse_by", "worse_by_low", "worse_by_high", "detectable", "test", "p_adjusted"]
    verdicts += ["is_best"]
    by_cell = {address: row for row in rows_of(combined) for address in str(row["address"]).split()}
    rows = [{**row, **{key: by_cell[row["address"]][key] for key in verdicts}} for row in rows_of(scores)]
    return checked(rows, SCORES)


def cell(record: Record, lineage: Lineage) -> dict[str, Any]:
    """One measured cell with all that its records say: a row of `scores` and what its label is made from."""
    measured = record.metrics
    protocol = str(measured.get("protocol", record.config.get("protocol", "?")))
    version = int(record.config.get("version", 1))
    run, init, teacher = lineage.run, lineage.init, lineage.teacher
    is_dense = lineage.subject.kind == "teacher"
    method = dict(init.config.get("method", {})) if init and not is_dense else {}
    train = dict(run.config.get("train", {})) if run else {}
    calibration = dict(lineage.stats.config) if lineage.stats and not is_dense else {}
    known = {key: measured[key] for key in SCORES if key in measured}
    return {
        **known,
        "address": record.address,
        "measure": f"{protocol} v{version} {str(measured.get('tokens_sha256', ''))[:12]}",
        "protocol": protocol,
        "version": version,
        "plain_label": _label(lineage, method, n_embd=measured.get("n_embd")),
        "variant": str((run or lineage.subject).settings.get("name", "")),
        "method": "dense teacher" if is_dense else str(method.get("name", "?")),
        "is_dense": is_dense,
        "seed": run.config.get("seed") if run else None,
        "calibration_seed": calibration.get("seed"),
        "seeds": 1,
        "arm": lineage.arm,
        "budget": (init.config.get("budget", {}).get("params") or None) if init and not is_dense else None,
        "steps": run.metrics.get("steps", train.get("max_steps")) if run else 0,
        "train_tokens": run.metrics.get("tokens") if run else 0,
        "subject": lineage.subject.address,
        "run": run.address if run else "",
        "init": init.address if init and not is_dense else "",
        "teacher": teacher.address if teacher else "",
        "drifted": " ".join(lineage.drifted),
        "missing": " ".join(lineage.missing),
        "dirty": lineage.dirty,
        "description": str(record.settings.get("description", "")),
        "tokenizer": str(record.settings.get("tokenizer", "")),
        "gate": record.settings.get("gate", {}).get("value"),
        "gate_tolerance": record.settings.get("gate", {}).get("tolerance"),
        "commit": str(record.provenance.get("commit", "")),
        "command": names.command(record.provenance.get("argv", ())),
        "finished": record.finished,
        "config": {
            "teacher": teacher.name if teacher else None,
            "method": method,
            "version": init.config.get("version", 1) if init else None,
            "train": train,
            "seed": run.config.get("seed") if run else None,
        },
        "calibration": {key: value for key, value in calibration.items() if key != "needs"},
    }


def _label(lineage: Lineage, method: Mapping[str, Any], *, n_embd: int | None) -> str:
    if lineage.subject.kind == "teacher":
        return f"{lineage.subject.name}, dense"
    if not method:
        return lineage.subject.name
    return names.method_label(method, n_embd=n_embd)


def in_order(scores: pd.DataFrame) -> pd.DataFrame:
    """Rows in the order of a table: by teacher, dense first, larger first, track by track, the best first."""
    order = scores.sort_values("measure", kind="stable").drop_duplicates("subject")
    merit = order["value"].where(order["metric"] != "accuracy", -order["value"])
    lane = order["track"].map({each: place for place, each in enumerate((*TRACKS, NONE))})
    keys = order.assign(merit=merit, trained=~order["is_dense"], lane=lane)
    by = ["teacher", "trained", "group", "lane", "merit", "subject"]
    ranked = keys.sort_values(by, na_position="last")
    place = {subject: position for position, subject in enumerate(ranked["subject"])}
    by_place = scores.assign(place=scores["subject"].map(place)).sort_values(["place", "measure"])
    return by_place.drop(columns="place").reset_index(drop=True)
