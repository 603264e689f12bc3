"""Reading a stored corpus: ranges of its documents, each with the side of the split that it is on.

The only place that decides train or validation: for shards, for the text that a tokenizer is trained on, and
for checks. Touches only the row groups that a range lies in.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.data.documents import Side, document_id, valid_unicode
from pipeline.data.openwebtext import fetch
from pipeline.data.splits import Keys, Positions, is_validation, keys_of, nanogpt_validation
from pipeline.data.tables import FILE, Manifest, TextFile, read_rows
from pipeline.store.artifacts import Artifact
from pipeline.store.location import Location


@dataclass(frozen=True, slots=True)
class Range:
    """Consecutive rows of one file of the corpus."""

    file: int
    start: int
    stop: int

    @property
    def documents(self) -> int:
        """Rows."""
        return self.stop - self.start


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A stored corpus, readable on any node."""

    manifest: Manifest
    payload: Location

    @staticmethod
    def of(artifact: Artifact) -> "Corpus":
        """The corpus that an artifact holds or points to."""
        where = f"{artifact.record.address}/{FILE}"
        manifest = Manifest.from_json(artifact.location.read_bytes(FILE), where=where)
        return Corpus(manifest=manifest, payload=artifact.location)

    def path(self, file: TextFile) -> Path:
        """One of its files as a path on this node, fetched if need be."""
        if self.manifest.place == "payload":
            return self.payload.local(file.name, sha256=file.sha256)
        if self.manifest.place == "hub":
            return fetch(self.manifest.root, self.manifest.revision, file.name)
        return Path(self.manifest.root) / file.name

    def rows(self, part: Range, *, ids: bool = True) -> Iterator[tuple[str, str]]:
        """Id and text of the rows of a range; without `ids` the id is empty and costs nothing."""
        file = self.manifest.files[part.file]
        columns = [self.manifest.text_column, *(["id"] if ids and self.manifest.has_ids else [])]
        for row in read_rows(self.path(file), columns, start=part.start, stop=part.stop):
            text = valid_unicode(row[0] or "")
            yield row[1] if len(row) > 1 else document_id(text) if ids else "", text

    def keys(self, number: int) -> Keys:
        """`(documents, 16)` keys of one file, for deduplication; reads text only where no ids are stored."""
        file = self.manifest.files[number]
        if self.manifest.has_ids:
            return keys_of([row[0] for row in read_rows(self.path(file), ["id"], stop=file.documents)])
        return keys_of([identifier for identifier, _ in self.rows(Range(number, 0, file.documents))])


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which documents are validation: by id, or by position."""

    name: Literal["hash", "nanogpt"]
    fraction: float
    """Share of validation, for `hash`."""

    validation: Positions
    """Sorted positions of the validation documents, for `nanogpt`."""

    @staticmethod
    def of(name: Literal["hash", "nanogpt"], *, fraction: float, documents: int) -> "Split":
        """The split of a corpus of so many documents."""
        by_position = nanogpt_validation(documents) if name == "nanogpt" else np.zeros(0, dtype=np.int64)
        return Split(name=name, fraction=fraction, validation=by_position)


def window(positions: Positions, first: int, count: int) -> Positions:
    """Those of the sorted `positions` that lie in `[first, first + count)`."""
    low, high = np.searchsorted(positions, [first, first + count])
    return positions[low:high].copy()


def sided_texts(
    corpus: Corpus, ranges: Sequence[Range], *, first: int, split: Split, repeats: Positions
) -> Iterator[tuple[Side, str]]:
    """Side and text of the documents of `ranges`, in order, without those at `repeats`.

    `first` is the position in the corpus of the first of them. A file that is bound to a side decides alone.
    """
    by_id = split.name == "hash"
    held_out, dropped = frozenset(split.validation.tolist()), frozenset(repeats.tolist())
    position = first
    for part in ranges:
        bound = corpus.manifest.files[part.file].side
        for identifier, text in corpus.rows(part, ids=by_id and not bound):
            here, position = position, position + 1
            if here in dropped:
                continue
            is_val = is_validation(identifier, split.fraction) if by_id and not bound else here in held_out
            yield bound or ("val" if is_val else "train"), text
