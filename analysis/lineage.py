"""Records as a graph: from scores back to model, run, init and teacher, and whether the path still holds.

Everything is read from records alone, and what cannot be read is said, not raised: a report of half a store
is a report of half a store. A link drifts when the input's payload is no longer the one that was recorded;
a result is dirty when it was made from a work tree with changes that no commit holds.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.records import KINDS, Record

SEEDED = ("model", "run", "init", "stats")
"""Kinds in which `seed` says which try it is: of training, of compression, of calibration."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where one scored model comes from."""

    subject: Record
    """What was scored: a model, run, init or teacher."""

    run: Record | None
    init: Record | None
    stats: Record | None
    teacher: Record | None
    arm: str
    """What was scored, seeds aside: equal for two models that differ in seeds alone."""

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
            begun: list[str] = []
            for address, record in store.scan(kind):
                if record is None:
                    begun.append(address)
                elif isinstance(record, StoreError):
                    problems.append(str(record))
                else:
                    records[address] = record
            problems += _begun(kind, begun)
        return Graph(records, tuple(problems))

    def of_kind(self, kind: str) -> list[Record]:
        """Records of one kind, sorted by address."""
        return [record for address, record in sorted(self.records.items()) if record.kind == kind]

    def lineage(self, scores: Record) -> Lineage | None:
        """The path behind a scores record; None if what it scored has no record."""
        subject = self.records.get(scores.inputs["model"].address) if "model" in scores.inputs else None
        if subject is None:
            return None
        path = self.path(subject)
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
            stats=_first(path, "stats"),
            teacher=_first(path, "teacher"),
            arm=self._arm(subject.address),
            drifted=tuple(dict.fromkeys(drifted)),
            missing=tuple(dict.fromkeys(missing)),
            dirty=any(record.provenance.get("dirty") for record in (scores, *path)),
        )

    def _arm(self, address: str) -> str:
        """Digest of a model and what it was made from, without the seeds on the way to its teacher."""
        record = self.records.get(address)
        if record is None or record.kind not in SEEDED:
            return address
        body = {
            "kind": record.kind,
            "config": {key: value for key, value in record.config.items() if key != "seed"},
            "inputs": {role: self._arm(ref.address) for role, ref in record.inputs.items()},
        }
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:10]

    def path(self, record: Record) -> tuple[Record, ...]:
        """The record and all it was made from, nearest first, each once."""
        return tuple(self._ancestors(record))

    def _ancestors(self, record: Record) -> Iterator[Record]:
        queue, seen = [record], {record.address}
        while queue:
            current = queue.pop(0)
            yield current
            for ref in current.inputs.values():
                found = self.records.get(ref.address)
                if found is not None and ref.address not in seen:
                    seen.add(ref.address)
                    queue.append(found)


def _begun(kind: str, addresses: list[str]) -> list[str]:
    """A line for each artifact on its way; one for all where a sweep stopped many."""
    if len(addresses) <= _SHOWN:
        return [f"{address}: started, not finished" for address in addresses]
    return [f"{kind}: {len(addresses)} started, not finished: {', '.join(addresses[:3])}, …"]


def _first(path: Sequence[Record], kind: str) -> Record | None:
    return next((record for record in path if record.kind == kind), None)
