"""What runs and inits left beside their records: loss curves, errors per matrix, losses per unit.

A file that cannot be read becomes a problem for the reader of the report, not an end of it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.lineage import Graph
from analysis.schema import HISTORY, MODULES, checked
from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.location import Location
from pipeline.store.records import Record
from pipeline.tracking.jsonl import read_history

REPORT = "report.json"
"""Where an init keeps the report of its replaced matrices."""


def losses(store: Store, address: str) -> pd.DataFrame:
    """The per-unit losses of a scores artifact: columns index, tokens, nll and maybe correct."""
    return _losses(store.open(address).location)


def known_losses(store: Store, graph: Graph) -> Callable[[str], pd.DataFrame]:
    """The same by address, of records that are read already; each file is read once while this is kept."""
    return lru_cache(maxsize=None)(lambda address: _losses(_payload(store, graph.records[address])))


def _losses(payload: Location) -> pd.DataFrame:
    # For a few hundred rows threads, and buffers read ahead, cost more than they read.
    data = pa.BufferReader(payload.read_bytes("losses.parquet"))
    table: pa.Table = pq.ParquetFile(data, pre_buffer=False).read(use_threads=False)
    found: pd.DataFrame = table.to_pandas(use_threads=False)
    return found


def history(
    store: Store, graph: Graph, table: pd.DataFrame, arms: pd.DataFrame, problems: list[str]
) -> pd.DataFrame:
    """The points of every run behind a score, and of teachers that were trained here."""
    labels = _labels(table, "run") | _labels(table[table["is_dense"]], "subject")
    together = {key: label for column in ("run", "subject") for key, label in _labels(arms, column).items()}
    rows: list[dict[str, Any]] = []
    for address, label in labels.items():
        try:
            points = read_history(_payload(store, graph.records[address]))
        except StoreError as err:
            problems.append(f"{address}: {err}")
            continue
        place = {"run": address, "label": label, "arm": together.get(address, label)}
        rows += [{**place, **point} for point in points]
    return checked(rows, HISTORY)


_SITE = re.compile(r"h\.(\d+)\.(.+)")


def modules(store: Store, graph: Graph, table: pd.DataFrame, problems: list[str]) -> pd.DataFrame:
    """Relative error of every replaced matrix, by layer; of several seeds the first."""
    rows: list[dict[str, Any]] = []
    firsts = {label: address for address, label in reversed(_labels(table, "init").items())}
    for label, address in reversed(firsts.items()):
        record = graph.records[address]
        try:
            errors = matrix_errors(store, record)
        except (OSError, ValueError) as err:
            problems.append(f"{address}/{REPORT}: cannot be read ({err})")
            continue
        rows += [{"init": address, "label": label, **asdict(each)} for each in errors]
    return checked(rows, MODULES)


@dataclass(frozen=True, slots=True)
class MatrixError:
    """How well one replaced matrix was met before training."""

    layer: int
    matrix: str
    error: float | None
    """||W - K|| / ||W|| in the metric of the method; None where its report does not say."""


def matrix_errors(store: Store, init: Record) -> list[MatrixError]:
    """Of an init, by layer; raises OSError or ValueError for a report that cannot be read."""
    if REPORT not in init.files:
        return []
    try:
        entries = json.loads(_payload(store, init).read_bytes(REPORT))
        sites = [(_SITE.fullmatch(str(entry.get("name", ""))), entry) for entry in entries]
        return [
            MatrixError(int(site[1]), site[2], _relative_error(entry))
            for site, entry in sites
            if site is not None
        ]
    except (TypeError, AttributeError, ArithmeticError, RecursionError) as err:
        raise ValueError(f"not a list of matrices: {err}") from err


def _relative_error(entry: Mapping[str, Any]) -> float | None:
    energy, error = entry.get("energy"), entry.get("achieved_error")
    return (max(error, 0.0) / energy) ** 0.5 if energy and error is not None else None


def _payload(store: Store, record: Record) -> Location:
    return store.root.child(f"{record.address}/{record.attempt}")


def _labels(table: pd.DataFrame, column: str) -> dict[str, str]:
    """Label of each address in `column`, of which a cell may hold several or none."""
    pairs = table[[column, "label"]].drop_duplicates(column)
    found: dict[str, str] = {}
    for addresses, label in pairs.itertuples(index=False):
        found |= {address: str(label) for address in str(addresses).split() if address not in found}
    return found
