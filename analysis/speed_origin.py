"""Where one figure of speed or memory comes from: `krony report --explain ROW:factored.decode@32`."""

import difflib

import pandas as pd

from analysis import names
from analysis.lineage import Graph
from analysis.provenance import Provenance, Source, commands_of, settings_of, steps_of
from analysis.schema import rows_of
from analysis.speed import amount, model_names, ratio_cell
from pipeline.errors import ConfigError

_SIDES = ("dense.", "factored.", "materialised.")


def is_figure(cell: str) -> bool:
    """Whether `ROW:COLUMN` names a figure of speed or memory, and no score."""
    return cell.rpartition(":")[2].startswith(_SIDES)


def explain_figure(graph: Graph, frame: pd.DataFrame, text: str, *, store: str) -> Provenance:
    """The provenance of the figure `ROW:SIDE.QUANTITY`; raises ConfigError listing what there is."""
    rows = rows_of(frame)
    head, _, column = text.rpartition(":")
    addresses = {name: address for address, name in model_names(rows).items()}
    if head not in addresses:
        near = difflib.get_close_matches(head, addresses, n=3)
        there = ", ".join(addresses) or "none"
        hint = f"did you mean {' or '.join(near)}?" if near else f"there are: {there}"
        raise ConfigError(f"--explain {text!r}: speed was measured of no row called {head!r}; {hint}")
    figures = {f"{row['side']}.{row['quantity']}": row for row in rows if row["address"] == addresses[head]}
    if column not in figures:
        there = ", ".join(figures)
        raise ConfigError(f"--explain {text!r}: no column is called {column!r}; there are: {there}")
    row = figures[column]
    record = graph.records[addresses[head]]
    path = graph.path(record)
    ratio = ratio_cell(row)
    of = "of dense" if row["unit"] == "bytes" else "as fast as dense"
    ends = f" (95 % {ratio.detail})" if ratio.detail else ""
    calls = f"{row['rounds']} rounds in which all sides took turns" if names.is_number(row["rounds"]) else ""
    value = amount(row["value"], row["unit"])
    if names.is_number(row["low"]) and names.is_number(row["high"]):
        value += f" (quartiles {amount(row['low'], row['unit'])} to {amount(row['high'], row['unit'])})"
    return Provenance(
        cell=text,
        label=f"{row['plain_label']}, {row['side']}",
        value=f"{ratio.text}{ends} {of}: {value}",
        protocol=str(row["protocol"]),
        counts=f"{calls or 'one measurement of each side'}; {row['place']}",
        digests=(),
        settings=tuple(settings_of([path])),
        sources=(
            Source(
                value=float(row["ratio"]),
                seed=int(row["seed"]) if names.is_number(row["seed"]) else None,
                calibration_seed=None,
                steps=steps_of(path),
                warnings=(f"changed after use: {row['drifted']}",) if row["drifted"] else (),
            ),
        ),
        repeat=tuple(commands_of([record], store)),
    )
