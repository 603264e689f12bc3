"""Two models side by side: what differs in how they were made, their sizes, their numbers, their matrices.

Numbers stand side by side only under one measure: the same protocol on the same tokens. Their difference is
the paired one, with its interval; Holm over the protocols. A pair of models has one seed each, so what seeds
do is in no interval: `krony report` combines seeds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from analysis import names
from analysis.differences import Difference, Row, difference, generator, own_interval, resampled
from analysis.frames import cell
from analysis.lineage import Graph
from analysis.lookup import Found, find
from analysis.stats import holm
from analysis.traces import losses, matrix_errors
from analysis.versus_speed import Abreast, abreast
from pipeline.config.identity import differing
from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.records import Record

_SIZES = ("parameters", "krony_parameters", "non_embedding_parameters", "macs_per_token")
SIDES = "AB"
"""What the two are called, in their order."""


@dataclass(frozen=True, slots=True)
class Pair:
    """One thing that both sides have or lack: a setting, a size, or the error of a matrix."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True, slots=True)
class Measure:
    """One protocol under which both were measured."""

    protocol: str
    a: Row
    b: Row
    difference: Difference | None
    """A less B; None where losses per unit are missing."""

    p_adjusted: float | None


@dataclass(frozen=True, slots=True)
class Versus:
    """All that is said about two models."""

    addresses: tuple[str, str]
    labels: tuple[str, str]
    settings: tuple[Pair, ...]
    """Leaves of the configurations that differ."""

    sizes: tuple[Pair, ...]
    measures: tuple[Measure, ...]
    errors: tuple[Pair, ...]
    speeds: tuple[Abreast, ...]
    problems: tuple[str, ...]

    def json(self) -> str:
        """The same as JSON."""
        body = {
            "a": {"address": self.addresses[0], "label": self.labels[0]},
            "b": {"address": self.addresses[1], "label": self.labels[1]},
            "settings": [asdict(pair) for pair in self.settings],
            "sizes": [asdict(pair) for pair in self.sizes],
            "measures": [_measure_json(measure) for measure in self.measures],
            "matrix_errors": [asdict(pair) for pair in self.errors],
            "speeds": [
                {
                    "name": each.name,
                    "place": each.a["place"],
                    "protocol": each.a["protocol"],
                    "a": each.a["ratio"],
                    "b": each.b["ratio"],
                }
                for each in self.speeds
            ],
            "problems": self.problems,
        }
        return json.dumps(body, indent=1)


def versus(first: str, second: str, *, store: Store | str) -> Versus:
    """Compare two models or runs; raises StoreError if one is not there or they have nothing in common."""
    opened = store if isinstance(store, Store) else Store(store)
    graph = Graph.read(opened)
    sides = (find(first, store=opened, graph=graph), find(second, store=opened, graph=graph))
    addresses = (sides[0].record.address, sides[1].record.address)
    if addresses[0] == addresses[1] and sides[0].store.root.uri == sides[1].store.root.uri:
        raise StoreError(f"{first!r} and {second!r} are both {addresses[0]}; name two")
    problems: list[str] = []
    measured = (_measured(sides[0]), _measured(sides[1]))
    errors = _matrices(sides, problems)
    common = sorted(measured[0].keys() & measured[1].keys())
    if not common and not errors:
        scored = " and ".join(
            f"{address} under {', '.join(sorted({row['protocol'] for row in rows.values()})) or 'nothing'}"
            for address, rows in zip(addresses, measured, strict=True)
        )
        raise StoreError(f"nothing in common: {scored} was measured; `krony eval` measures more")
    return Versus(
        addresses=addresses,
        labels=(_label(sides[0], measured[0]), _label(sides[1], measured[1])),
        settings=tuple(
            Pair(path, *values) for path, values in differing(_made(sides[0]), _made(sides[1])).items()
        ),
        sizes=_both(_size(sides[0], measured[0]), _size(sides[1], measured[1])),
        measures=_compared(sides, [(measured[0][key], measured[1][key]) for key in common], problems),
        errors=errors,
        speeds=abreast(sides, problems),
        problems=tuple(problems),
    )


def _measured(side: Found) -> dict[str, Row]:
    """Cells by measure."""
    rows: dict[str, Row] = {}
    for record in side.scores():
        lineage = side.graph.lineage(record)
        if lineage is not None and names.is_number(record.metrics.get("value")):
            row = cell(record, lineage)
            rows.setdefault(row["measure"], {**row, "low": None, "high": None})
    return rows


def _compared(
    sides: Sequence[Found], rows: Sequence[tuple[Row, Row]], problems: list[str]
) -> tuple[Measure, ...]:
    found: list[tuple[Row, Row, Difference | None]] = []
    reads = [partial(losses, side.store) for side in sides]
    for pair in rows:
        arms = resampled(zip(pair, reads, strict=True), problems)
        for arm in arms:
            if ends := own_interval(arm):
                arm.row["low"], arm.row["high"] = ends
        gap = difference(arms[0], arms[1], rng=generator(1)) if len(arms) == len(pair) else None
        found.append((*pair, gap))
    adjusted = iter(holm([gap.gap.p_value for *_, gap in found if gap]))
    return tuple(Measure(a["protocol"], a, b, gap, next(adjusted) if gap else None) for a, b, gap in found)


def _made(side: Found) -> dict[str, Any]:
    """Configurations on the path, by kind: of each the nearest."""
    found: dict[str, Any] = {}
    for record in side.graph.path(side.record):
        found.setdefault(record.kind, dict(record.config))
    return found


def _size(side: Found, rows: Mapping[str, Row]) -> dict[str, int | None]:
    known: dict[str, Any] = {**side.record.metrics, **next(iter(rows.values()), {})}
    return {key: known.get(key) for key in _SIZES}


def _both(a: Mapping[str, Any], b: Mapping[str, Any]) -> tuple[Pair, ...]:
    return tuple(Pair(key, a[key], b[key]) for key in a if a[key] is not None or b[key] is not None)


def _label(side: Found, rows: Mapping[str, Row]) -> str:
    if rows:
        row = next(iter(rows.values()))
        name = f"{row['variant']}: " if row["variant"] else ""
        return f"{name}{row['plain_label']}"
    init = _nearest(side, "init")
    return names.method_label(init.config.get("method", {}), n_embd=None) if init else side.record.name


def _nearest(side: Found, kind: str) -> Record | None:
    return next((record for record in side.graph.path(side.record) if record.kind == kind), None)


def _matrices(sides: Sequence[Found], problems: list[str]) -> tuple[Pair, ...]:
    """Errors of the matrices that both replaced."""
    found: list[dict[tuple[int, str], float | None]] = []
    for side in sides:
        init = _nearest(side, "init")
        try:
            entries = matrix_errors(side.store, init) if init else []
        except (OSError, ValueError) as err:
            problems.append(f"{init.address if init else ''}: errors of its matrices cannot be read ({err})")
            entries = []
        found.append({(entry.layer, entry.matrix): entry.error for entry in entries})
    common = sorted(found[0].keys() & found[1].keys())
    return tuple(Pair(f"h.{key[0]}.{key[1]}", found[0][key], found[1][key]) for key in common)


def _measure_json(measure: Measure) -> dict[str, Any]:
    kept = ("value", "low", "high", "loss")
    body: dict[str, Any] = {
        "protocol": measure.protocol,
        "metric": measure.a["metric"],
        **{side.lower(): {key: row.get(key) for key in kept}
           for side, row in zip(SIDES, (measure.a, measure.b), strict=True)},
    }  # fmt: skip
    if measure.difference:
        found = measure.difference
        ends = {"worse_by": found.gap.estimate, "low": found.gap.low, "high": found.gap.high}
        body |= {"a_against_b": {**ends, "p_value": found.gap.p_value, "p_adjusted": measure.p_adjusted,
                                 "detectable": found.detectable, "test": found.test}}  # fmt: skip
    return body
