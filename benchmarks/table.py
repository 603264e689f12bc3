"""What every benchmark leaves behind: a table on the screen, and as CSV with the machine that it came from.

Seconds of two machines are not compared, so each row of a CSV says which one it was, and the versions.
"""

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pipeline.config.speed import FEWEST_ROUNDS
from pipeline.evaluate.speed import place
from pipeline.evaluate.turns import Seconds, Spread
from pipeline.store.provenance import provenance

Row = Mapping[str, str | float]


def against(base: Seconds, times: Seconds) -> dict[str, float]:
    """Seconds of a side (median), and how many times as fast as the base it is, with a 95 % interval.

    Fewer than `FEWEST_ROUNDS` rounds have no such interval, and get none.
    """
    ratio = Spread.of_ratio(base, times)
    found = {"seconds": Spread.quartiles(times).middle, "ratio": ratio.middle}
    return found if len(times) < FEWEST_ROUNDS else {**found, "low": ratio.low, "high": ratio.high}


def publish(rows: Sequence[Row], path: Path | None, *, device: str = "cpu") -> None:
    """Print the rows below each other; write them to `path` too, if there is one."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [columns, *([_text(row.get(name, "")) for name in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    print(", ".join(f"{name} {value}" for name, value in _machine(device).items() if value))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [*columns, *_machine(device)])
            writer.writeheader()
            writer.writerows({**row, **_machine(device)} for row in rows)


def _machine(device: str) -> dict[str, str | int]:
    known = provenance()
    found = place("cuda" if device == "cuda" else "cpu")
    return {
        **found,
        "threads": torch.get_num_threads(),
        "python": sys.version.split()[0],
        "commit": known["commit"][:10],
        "changed": known["dirty"],
    }


def _text(value: str | float) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else str(value)
