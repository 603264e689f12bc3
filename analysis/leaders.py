"""Which models a page shows where a store holds more than a reader can use.

The best of each size and track come first, then the second of each, and so on; where not all of one rank fit,
they are spread evenly over the sizes. Dense teachers are always there. What is left out stands in the files
beside the page, and the page says so.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

ROWS = 100
"""Models in the tables of a page."""

MAPPED = 50
"""Models in a map of errors."""

SENTENCES = 12
"""Sizes and tracks of which a page opens with a sentence."""


def leaders(rows: Sequence[Mapping[str, Any]], count: int) -> frozenset[str]:
    """Subjects of dense teachers, and of `count` others; `rows` of `arms` in the order of the table."""
    contests: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        place = ("dense",) if row["is_dense"] else (row["teacher"], str(row["group"]), row["track"])
        contests.setdefault(place, {})[row["subject"]] = None
    dense = frozenset(contests.pop(("dense",), {}))
    ranked = [list(members) for members in contests.values()]
    chosen: list[str] = []
    for rank in range(max(map(len, ranked), default=0)):
        level = [members[rank] for members in ranked if rank < len(members)]
        chosen += spread(level, count - len(chosen))
        if len(chosen) == count:
            break
    return frozenset(chosen) | dense


def spread(values: Sequence[T], count: int) -> list[T]:
    """At most `count` of them, evenly, the first and the last among them."""
    if len(values) <= count:
        return list(values)
    if count < 2:
        return list(values[:count])
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]
