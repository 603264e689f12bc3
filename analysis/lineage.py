"""Records as a graph: from scores back to model, run, init and teacher, and whether the path still holds.

Everything is read from records alone, and what cannot be read is said, not raised: a report of half a store
is a report of half a store. A link drifts when the input's payload is no longer the one that was recorded;
a result is dirty when it was made from a work tree with changes that no commit holds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.records import KINDS, Record


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where one scored model comes from."""

    subject: Record
    """What was scored: a model, run, init or teacher."""

    run: Record | None
    init: Record | None
    teacher: Record | None
    drifted: tuple[str, ...]
    """Addresses on the path whose payload changed after it was used."""

    missing: tuple[str, ...]
    """Addresses on the path that have no record any more."""

    dirty: bool
    """Whether any step on the path was made from uncommitted code."""


class Graph:
    """All records of a store by address, and what could not be read."""

    def __init__(self, records: Mapping[str, Record], problems: tuple[str, ...] = ()) -> None:
        """Hold what was read; `problems` are lines for the reader of a report."""
        self.records = dict(records)
        self.problems = problems

    @staticmethod
    def read(store: Store) -> "Graph":
        """Every record of a store; a damaged one becomes a problem."""
        records: dict[str, Record] = {}
        problems: list[str] = []
        for kind in KINDS:
            for name in store.root.folders(kind):
                address = f"{kind}/{name}"
                try:
                    data = store.root.read_bytes(f"{address}/record.json")
                    records[address] = Record.from_json(data, where=f"{address}/record.json")
                except FileNotFoundError:
                    problems.append(f"{address}: started, not finished")
                except StoreError as err:
                    problems.append(str(err))
        return Graph(records, tuple(problems))

    def of_kind(self, kind: str) -> list[Record]:
        """Records of one kind, sorted by address."""
        return [record for address, record in sorted(self.records.items()) if record.kind == kind]

    def lineage(self, scores: Record) -> Lineage | None:
        """The path behind a scores record; None if what it scored has no record."""
        subject = self.records.get(scores.inputs["model"].address) if "model" in scores.inputs else None
        if subject is None:
            return None
        path = list(self._ancestors(subject))
        drifted, missing = [], []
        for record in (scores, *path):
            for ref in record.inputs.values():
                found = self.records.get(ref.address)
                if found is None:
                    missing.append(ref.address)
                elif ref.digest and found.digest != ref.digest:
                    drifted.append(ref.address)
        return Lineage(
            subject=subject,
            run=_first(path, "run"),
            init=_first(path, "init"),
            teacher=_first(path, "teacher"),
            drifted=tuple(dict.fromkeys(drifted)),
            missing=tuple(dict.fromkeys(missing)),
            dirty=any(record.provenance.get("dirty") for record in (scores, *path)),
        )

    def _ancestors(self, record: Record) -> Iterator[Record]:
        """The record and all it was made from, nearest first, each once."""
        queue, seen = [record], {record.address}
        while queue:
            current = queue.pop(0)
            yield current
            for ref in current.inputs.values():
                found = self.records.get(ref.address)
                if found is not None and ref.address not in seen:
                    seen.add(ref.address)
                    queue.append(found)


def _first(path: list[Record], kind: str) -> Record | None:
    return next((record for record in path if record.kind == kind), None)
