"""Speed and memory: what `krony speed` measured, as a tidy frame and as a table of ratios to dense.

Seconds of two machines, or of two protocols, are no comparison: rows of one machine and one protocol stand
together under their own dense side, and nothing is ranked. The dense side is measured anew beside every
model; its row shows the median of these, and the note below how far they lie apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

import pandas as pd

from analysis import names
from analysis.comparison import Cell, Column, Table
from analysis.frames import cell
from analysis.lineage import Graph
from analysis.schema import SPEEDS, checked, rows_of
from analysis.tables import terminal
from pipeline.store.artifacts import Store
from pipeline.store.records import Record

Row = Mapping[str, Any]

QUANTITIES = ("checkpoint", "memory", "prefill")
"""Those that every measurement has, in the order of the columns; `decode@B` follow."""

_IDLE = 0.9
"""Of the time that goes by, what a thread gets of a processor where it is alone."""

_AGAIN = "`krony speed --force` measures again"
_FORMS = {"factored": 0, "materialised": 1}


def load_speeds(store: Store | str, addresses: Sequence[str]) -> pd.DataFrame:
    """The frame of these `speed` artifacts."""
    opened = store if isinstance(store, Store) else Store(store)
    graph = Graph.read(opened)
    return speeds(graph, [graph.records[address] for address in addresses], [])


def speeds(graph: Graph, records: Sequence[Record], problems: list[str]) -> pd.DataFrame:
    """One row per model, side and quantity; of several exports of one run the newest measurement counts."""
    newest: dict[tuple[str, ...], list[Row]] = {}
    for record in sorted(records, key=lambda each: (each.finished, each.address)):
        lineage = graph.lineage(record)
        figures = record.metrics.get("figures") or []
        if lineage is None:
            problems.append(f"{record.address}: the model it measured has no record")
        elif not any(figure.get("side") == "dense" for figure in figures):
            problems.append(f"{record.address}: no dense side, so no ratio; {_AGAIN}")
        else:
            known = cell(record, lineage)
            if lineage.drifted:
                problems.append(
                    f"{record.address}: {', '.join(lineage.drifted)} changed after it was measured; {_AGAIN}"
                )
            shared = {**known, **_conditions(record), **_counted(record)}
            rows: list[Row] = [_row(shared, figure) for figure in figures]
            newest[known["run"] or known["subject"], shared["protocol"], shared["place"]] = rows
    found = [row for rows in newest.values() for row in rows]
    return checked(_in_order(found), SPEEDS)


def _conditions(record: Record) -> dict[str, str]:
    """How and where it was measured, in words."""
    said, place = record.config, record.settings.get("place", {})
    threads = int(said.get("threads", 0))
    protocol = (
        f"{said.get('dtype', '?')}, prefill of {said.get('prompt', '?')} tokens, decoding of "
        f"{said.get('tokens', '?')} behind {said.get('past', '?')}, in batches of "
        f"{'/'.join(map(str, said.get('batches', ['?'])))}"
    )
    on = "" if said.get("device") == "cuda" else f", {threads} thread{'s' if threads != 1 else ''}"
    return {
        "protocol": protocol,
        "place": f"{place.get('chip', 'unknown machine')}{on}, torch {place.get('torch', '?')}",
        "device": str(said.get("device", "")),
    }


def _counted(record: Record) -> dict[str, Mapping[str, Any]]:
    return {key: record.metrics.get(key, {}) for key in ("parameters_by_side", "held")}


def _row(shared: Mapping[str, Any], figure: Mapping[str, Any]) -> dict[str, Any]:
    side = str(figure["side"])
    own = {
        "parameters": shared["parameters_by_side"].get(side),
        "held": shared["held"].get(figure["quantity"]),
    }
    return {**shared, **figure, **own}


def _in_order(rows: Sequence[Row]) -> list[Row]:
    """By teacher, machine and protocol, there larger models first."""
    sizes = {row["address"]: row["parameters"] for row in rows if row["side"] == "factored"}
    return sorted(
        rows,
        key=lambda row: (
            *_block(row),
            -(sizes.get(row["address"]) or 0),
            row["variant"],
            row["address"],
            row["side"] != "dense",
            _FORMS.get(row["side"], 0),
        ),
    )


def _block(row: Row) -> tuple[str, str, str]:
    return row["teacher"], row["place"], row["protocol"]


def speed_table(frame: pd.DataFrame) -> Table:
    """Two rows per model, as it is and multiplied out; before those of one machine their dense teacher."""
    rows = rows_of(frame)
    batches = sorted({int(q.split("@")[1]) for q in frame["quantity"].unique() if q.startswith("decode@")})
    quantities = [*QUANTITIES, *(f"decode@{batch}" for batch in batches)]
    columns = [
        Column("run", is_text=True),
        Column("held", is_text=True),
        Column("machine"),
        Column("parameters"),
    ]
    columns += [Column(quantity) for quantity in quantities]
    heads, body, notes = model_names(rows), [], []
    for number, (_, members) in enumerate(groupby(rows, key=_block), start=1):
        block = list(members)
        on = Cell(f"[{number}]")
        body.append((Cell("teacher"), Cell("dense"), on, *_dense(block, quantities)))
        notes.append(f"[{number}] {_where(block)}")
        for _, each in groupby(block, key=itemgetter("address", "side")):
            figures = {row["quantity"]: row for row in each}
            first = next(iter(figures.values()))
            if first["side"] == "dense":
                continue
            cells = [Cell(heads[first["address"]], _seed(first)), Cell(first["side"]), on]
            cells += [Cell(names.count(first["parameters"]))]
            body.append((*cells, *(ratio_cell(figures.get(quantity)) for quantity in quantities)))
    return Table(tuple(columns), tuple(body), (*notes, _MEANING) if body else ())


_MEANING = (
    "checkpoint and memory (at its peak): share of dense. prefill and decode@B (one more token in each of B "
    "sequences): how many times as fast as dense, the median over rounds in which all sides take turns, and "
    "its 95 % interval. materialised: the model multiplied out, as its stock export is. Every side is run by "
    "the same code."
)


def speed_text(frame: pd.DataFrame) -> str:
    """The table for a terminal."""
    return terminal(speed_table(frame)) if len(frame) else "nothing measured yet"


def model_names(rows: Sequence[Row]) -> dict[str, str]:
    """The name of each measured model, by the address of its measurement; of namesakes with a fingerprint."""
    plain = {row["address"]: str(row["variant"] or row["plain_label"]) for row in rows}
    taken = list(plain.values())
    return {
        address: name if taken.count(name) == 1 else f"{name}@{address.rpartition('-')[2]}"
        for address, name in plain.items()
    }


def _seed(row: Row) -> str:
    return f"seed {row['seed']}" if names.is_number(row["seed"]) and row["seed"] else ""


def _dense(block: Sequence[Row], quantities: Sequence[str]) -> tuple[Cell, ...]:
    """The dense side in its own units: the median over the measurements of a block."""
    dense = [row for row in block if row["side"] == "dense"]
    cells = [Cell(names.count(dense[0]["parameters"]))]
    for quantity in quantities:
        values = [row["value"] for row in dense if row["quantity"] == quantity]
        unit = next((row["unit"] for row in dense if row["quantity"] == quantity), "")
        cells.append(Cell(amount(float(pd.Series(values).median()), unit) if values else names.MISSING))
    return tuple(cells)


def ratio_cell(row: Row | None) -> Cell:
    """`1.21×` with its interval for a speed, `64.2 %` for bytes."""
    if row is None or not names.is_number(row["ratio"]):
        return Cell(names.MISSING)
    if row["unit"] == "bytes":
        return Cell(names.share(row["ratio"]))
    known = names.is_number(row["ratio_low"]) and names.is_number(row["ratio_high"])
    detail = f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}" if known else ""
    return Cell(f"{row['ratio']:.2f}×", detail)


def amount(value: float, unit: str) -> str:
    """A figure with its unit: `17.1 MB`, `9,812 tok/s`, `1.21 ms/token`."""
    if unit == "bytes":
        return f"{value / 1e6:,.1f} MB"
    return f"{value:,.0f} tok/s" if unit == "tokens/s" else f"{1e3 * value:,.2f} ms/token"


def _where(block: Sequence[Row]) -> str:
    """One note per block: machine, protocol, and how far its dense measurements lie apart."""
    first, runs = block[0], len({row["address"] for row in block})
    text = f"{first['teacher'].partition('/')[2]}: {first['place']}; {first['protocol']}"
    if runs > 1:
        apart = ", ".join(_apart(block))
        text += f". Dense is the median of {runs} measurements, which lie apart by {apart}"
    return f"{text}.{_busy(block)}"


def _busy(block: Sequence[Row]) -> str:
    """A warning, where what was timed had to wait for its processor: known of one thread on the CPU alone."""
    held = [row["held"] for row in block if names.is_number(row["held"])]
    if not held or min(held) > _IDLE or block[0]["device"] != "cpu" or ", 1 thread," not in block[0]["place"]:
        return ""
    most = f" to {100 * max(held):.0f}" if len(held) > 1 else ""
    return (
        f" The machine was busy: what was timed had a processor for {100 * min(held):.0f}{most} % of the "
        "time; little of it makes a ratio rough."
    )


def _apart(block: Sequence[Row]) -> Iterator[str]:
    dense = [row for row in block if row["side"] == "dense" and row["unit"] != "bytes"]
    for quantity in dict.fromkeys(row["quantity"] for row in dense):
        values = [row["value"] for row in dense if row["quantity"] == quantity]
        yield f"{100 * (max(values) / min(values) - 1):.0f} % ({quantity})"
