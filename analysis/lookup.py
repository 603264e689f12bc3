"""A model or run by what people call it: address, beginning of one, name of a variant, or path.

Without a kind the most finished one counts: `kron_vl-s0` is a model before it is a run, and a run before it
is a start. What is not there, or is several things, is one line with what might have been meant.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from analysis.lineage import Graph
from pipeline.errors import StoreError
from pipeline.store.artifacts import Store
from pipeline.store.records import Record

KINDS = ("model", "run", "teacher", "init")
"""What can be compared, the most finished first."""

_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Found:
    """One thing in one store."""

    store: Store
    graph: Graph
    record: Record

    def scores(self) -> list[Record]:
        """All scores of it; of a run also those of the models exported from it."""
        return self.measured("scores")

    def measured(self, kind: str) -> list[Record]:
        """All measurements of one kind of it; of a run also those of the models exported from it."""
        same = {self.record.address}
        if self.record.kind == "run":
            models = self.graph.of_kind("model")
            same |= {each.address for each in models if self.record.address in _inputs(each)}
        return [each for each in self.graph.of_kind(kind) if same & _inputs(each)]


def find(text: str, *, store: Store, graph: Graph) -> Found:
    """What `text` names, in `store` or at a path; raises StoreError if it is nothing or several things."""
    if path := _artifact_folder(text):
        other = Store(path.parents[1])
        address = f"{path.parent.name}/{path.name}"
        there = Graph.read(other)
        if address in there.records:
            return Found(other, there, _comparable(there.records[address], text))
        raise StoreError(f"{text}: its record cannot be read; build it again with --force")
    where, text = store.root.uri, text.strip("/")
    if text in graph.records:
        return Found(store, graph, _comparable(graph.records[text], text))
    known = [record for kind in KINDS for record in graph.of_kind(kind)]
    hits = [record for record in known if record.settings.get("name") == text]
    hits = hits or [record for record in known if record.address.startswith(text) and "/" in text]
    hits = hits or [record for record in known if record.address.partition("/")[2].startswith(text)]
    hits = [record for record in hits if record.kind == hits[0].kind]
    if len(hits) == 1:
        return Found(store, graph, hits[0])
    if hits:
        shown = ", ".join(_with_variant(record, graph) for record in hits[:_SHOWN])
        more = f" and {len(hits) - _SHOWN} more" if len(hits) > _SHOWN else ""
        raise StoreError(f"{where}: {text!r} could be {shown}{more}; write more of the address")
    names = {name: record for record in known for name in (record.address, *_aliases(record)) if name}
    near = [names[name].address for name in difflib.get_close_matches(text, names, n=3, cutoff=0.4)]
    hint = f"did you mean {' or '.join(dict.fromkeys(near))}?" if near else _holds(known)
    raise StoreError(f"{where}: no model, run, teacher or init is called {text!r}; {hint}")


def _comparable(record: Record, text: str) -> Record:
    if record.kind not in KINDS:
        raise StoreError(f"{text} is of kind {record.kind!r}; expected one of: {', '.join(KINDS)}")
    return record


def _aliases(record: Record) -> tuple[str, str]:
    return record.address.partition("/")[2], str(record.settings.get("name", ""))


def _with_variant(record: Record, graph: Graph) -> str:
    variants = [str(each.settings.get("name", "")) for each in graph.path(record) if each.kind == "run"]
    return f"{record.address} ({variants[0]})" if variants and variants[0] else record.address


def _holds(known: list[Record]) -> str:
    if not known:
        return "the store holds none; name another with --store"
    return f"it holds {len(known)}: `krony report` shows them"


def _inputs(record: Record) -> set[str]:
    return {ref.address for ref in record.inputs.values()}


def _artifact_folder(text: str) -> Path | None:
    """The folder of the artifact that a path lies in, if it is one."""
    path = Path(text).expanduser()
    if "://" in text or not path.exists():
        return None
    path = path.resolve()
    return next((each for each in (path, *path.parents) if (each / "record.json").is_file()), None)
