"""Seeds of one arm as one row: the mean of what they measured, and all that their records say together.

Two models belong to one arm if all that led to them differs in seeds alone: of training, of compression, of
calibration. A perplexity of several seeds is that of their mean loss.
"""

import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from analysis import names

Row = Mapping[str, Any]

_MEANS = ("loss", "token_loss", "bits_per_byte")
_JOINED = ("address", "run", "init", "subject", "drifted", "missing")
"""Addresses, of which an arm may have several: joined by blanks."""

_SEED_ENDING = re.compile(r"[-_. ](s|seed)=?\d+$")


def arms(rows: Sequence[Row]) -> list[Row]:
    """One row per arm and measure, in the order in which the arms come; an arm of one seed stays as it is."""
    of_arm: dict[str, list[Row]] = {}
    for row in rows:
        of_arm.setdefault(row["arm"], []).append(row)
    found: list[Row] = []
    for cells in of_arm.values():
        members = {row["subject"]: row for row in cells}
        seeds = {(row["seed"], row["calibration_seed"]) for row in members.values()}
        if len(members) == 1 or len(seeds) < len(members):  # namesakes of equal seeds are no seeds of one arm
            found += cells
            continue
        everyone = " ".join(members)
        measure = itemgetter("measure")
        for _, column in groupby(sorted(cells, key=measure), key=measure):
            found.append({**_combined(list(column)), "subject": everyone})
    return found


def relabelled(rows: Sequence[Row]) -> list[Row]:
    """Rows of arms with labels that differ; a label names seeds only where no row has several."""
    firsts = {row["subject"]: row for row in rows}
    dropped = "seed" if any(row["seeds"] > 1 for row in rows) else ""
    labels = [row["plain_label"] for row in firsts.values()]
    for part in ("config", "calibration"):
        configs = [row[part] for row in firsts.values()]
        labels = names.distinct(labels, [{k: v for k, v in c.items() if k != dropped} for c in configs])
    named = dict(zip(firsts, labels, strict=True))
    return [{**row, "label": named[row["subject"]]} for row in rows]


def common_name(variants: Sequence[str]) -> str:
    """What the names of several seeds share: `kron-82m-s0`, `kron-82m-s1` -> `kron-82m`."""
    stems = {_SEED_ENDING.sub("", variant) for variant in variants}
    return stems.pop() if len(stems) == 1 else variants[0]


def _combined(cells: Sequence[Row]) -> Row:
    first = cells[0]
    value = _mean if first["metric"] == "accuracy" else _geometric_mean
    joined = {
        key: " ".join(dict.fromkeys(word for cell in cells for word in str(cell[key]).split()))
        for key in _JOINED
    }
    row = {
        **first,
        **{key: _mean([cell.get(key) for cell in cells]) for key in _MEANS},
        **joined,
        "value": value([cell["value"] for cell in cells]),
        "perplexity": _geometric_mean([cell.get("perplexity") for cell in cells]),
        "variant": common_name([cell["variant"] for cell in cells]),
        "seed": None,
        "calibration_seed": None,
        "seeds": len(cells),
        "dirty": any(cell["dirty"] for cell in cells),
        "finished": max(cell["finished"] for cell in cells),
    }
    if names.is_number(first.get("recovery")):
        ratio = row["value"] / first["value"]
        row["recovery"] = first["recovery"] * (ratio if first["metric"] == "accuracy" else 1 / ratio)
    return row


def _mean(values: Sequence[Any]) -> float | None:
    """The mean; None if any value is not there."""
    return sum(values) / len(values) if all(map(names.is_number, values)) else None


def _geometric_mean(values: Sequence[Any]) -> float | None:
    logs = _mean([math.log(value) if names.is_number(value) and value > 0 else None for value in values])
    return None if logs is None else math.exp(logs)
