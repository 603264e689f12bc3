"""Speed and memory of two models side by side: their ratios to dense, where both were measured alike.

Each was measured against its own teacher, at its own time: ratios of one machine and one protocol stand side
by side, and no difference is taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from analysis.lookup import Found
from analysis.schema import rows_of
from analysis.speed import Row, speeds


@dataclass(frozen=True, slots=True)
class Abreast:
    """One figure of both."""

    name: str
    """`factored.prefill`."""

    a: Row
    b: Row


def abreast(sides: Sequence[Found], problems: list[str]) -> tuple[Abreast, ...]:
    """Figures of both, of one machine and protocol; `problems` says where there are none of that kind."""
    found: list[dict[tuple[str, ...], Row]] = []
    for side in sides:
        records = [record for record in side.measured("speed") if side.record.kind in ("model", "run")]
        rows = rows_of(speeds(side.graph, records, problems))
        found.append(
            {
                (row["place"], row["protocol"], f"{row['side']}.{row['quantity']}"): row
                for row in rows
                if row["side"] != "dense"
            }
        )
    common = [key for key in found[0] if key in found[1]]
    if all(found) and not common:
        problems.append("speed was measured on two machines or by two protocols, which are not compared")
    return tuple(Abreast(key[-1], found[0][key], found[1][key]) for key in common)
