"""The shard plan: which documents make which shard, decided before anything is encoded, and stored.

Each planned shard is a contiguous range of documents of the corpus, in whole row groups where they are small
enough. It gives two files of one number, `train-00007.bin` and `val-00007.bin`, so every document is read
once; one of them may be empty. The plan depends on the corpus and the settings alone, never on the number of
workers: that is why the bytes do not either.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from model.decode import decode, parse_json
from pipeline.config.sources import DataConfig
from pipeline.data.rows import Range
from pipeline.data.shards import ShardError
from pipeline.data.splits import Positions
from pipeline.data.tables import Manifest

FILE = "plan.json"
REPEATS = "repeats.i64"
"""Positions of the dropped repeats, int64, sorted; there only if documents are deduplicated."""

FORMAT = 1
SMALL_BYTES = 1 << 20
SMALL_SHARDS = 64
"""A corpus is cut into 64 shards, but none below 1 MiB of text: enough for all cores, not too many tasks."""


@dataclass(frozen=True, slots=True)
class PlannedShard:
    """One task: ranges that follow each other, and the position of their first document in the corpus."""

    index: int
    first: int
    ranges: tuple[Range, ...]
    text_bytes: int

    @property
    def documents(self) -> int:
        """Documents before splitting and deduplication."""
        return sum(part.documents for part in self.ranges)

    def to_json(self) -> str:
        """As a task is sent it."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "PlannedShard":
        """As a task reads it."""
        return PlannedShard.of(parse_json(text))

    @staticmethod
    def of(raw: Mapping[str, Any]) -> "PlannedShard":
        """From its JSON object."""
        shard: PlannedShard = decode(PlannedShard, raw, "shard")
        return shard


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardPlan:
    """All shards of a tokens artifact, and everything else that decides their bytes."""

    corpus: str
    """Digest of the corpus payload."""

    tokenizer: str
    """Digest of the tokenizer payload."""

    split: Literal["hash", "nanogpt"]
    validation_fraction: float
    dedup: bool

    repeats: str
    """Digest of the positions that are dropped; empty without deduplication."""

    repeated: int
    """Documents that are dropped."""

    documents: int
    """Documents before anything is dropped."""

    shards: tuple[PlannedShard, ...]

    def to_json(self) -> bytes:
        """The plan as a file; equal plans give equal bytes."""
        return (json.dumps({"format": FORMAT, **asdict(self)}) + "\n").encode()

    @property
    def digest(self) -> str:
        """sha256 of the stored plan; every sidecar names it."""
        return hashlib.sha256(self.to_json()).hexdigest()

    @staticmethod
    def from_json(data: bytes, *, where: str) -> "ShardPlan":
        """Read a plan; raises ShardError, with `where`, for anything that is not one."""
        try:
            raw: dict[str, Any] = parse_json(data)
            if (found := raw.pop("format")) != FORMAT:
                raise ShardError(f"{where}: plan format {found}, expected {FORMAT}; use a matching krony")
            plan: ShardPlan = decode(ShardPlan, raw, "plan")
            return plan
        except (ValueError, TypeError, KeyError, AttributeError) as err:
            raise ShardError(f"{where}: not a shard plan ({err}); run `krony prepare … --force`") from err


def make_plan(
    manifest: Manifest, config: DataConfig, *, corpus: str, tokenizer: str, repeats: Positions | None
) -> ShardPlan:
    """The plan for a corpus; `repeats` are the positions to drop, None where nothing is deduplicated."""
    dropped = b"" if repeats is None else repeats.astype("<i8").tobytes()
    return ShardPlan(
        corpus=corpus,
        tokenizer=tokenizer,
        split=config.split,
        validation_fraction=config.validation_fraction,
        dedup=repeats is not None,
        repeats="" if repeats is None else hashlib.sha256(dropped).hexdigest(),
        repeated=0 if repeats is None else len(repeats),
        documents=manifest.documents,
        shards=tuple(plan_shards(manifest, shard_tokens=config.shard_tokens)),
    )


def deduplicates(config: DataConfig) -> bool:
    """Whether repeats are dropped; nanoGPT's split keeps them."""
    return config.dedup and config.split != "nanogpt"


def shard_bytes(text_bytes: int, shard_tokens: int) -> int:
    """Bytes of text per shard of a corpus of so many."""
    return min(max(SMALL_BYTES, math.ceil(text_bytes / SMALL_SHARDS)), shard_tokens)


def plan_shards(manifest: Manifest, *, shard_tokens: int) -> Iterator[PlannedShard]:
    """Cut a corpus into shards of at most `shard_tokens` bytes and documents together.

    A token holds at least one byte and a document gets one token more, so no shard has more tokens than that,
    unless one document alone has.
    """
    bound = shard_bytes(manifest.text_bytes, shard_tokens)
    ranges: list[Range] = []
    size = index = first = documents = 0
    for part, part_bytes in _pieces(manifest, bound):
        if ranges and size + documents + part_bytes + part.documents > bound:
            yield PlannedShard(index, first, tuple(ranges), size)
            index, first = index + 1, first + documents
            ranges, size, documents = [], 0, 0
        if ranges and ranges[-1].file == part.file:
            ranges[-1] = Range(part.file, ranges[-1].start, part.stop)
        else:
            ranges.append(part)
        size, documents = size + part_bytes, documents + part.documents
    if ranges:
        yield PlannedShard(index, first, tuple(ranges), size)


def _pieces(manifest: Manifest, bound: int) -> Iterator[tuple[Range, int]]:
    """Row groups with their bytes of text; one that is larger than `bound` in equal parts."""
    for number, file in enumerate(manifest.files):
        start = 0
        for rows, size in file.groups:
            parts = max(1, min(rows, math.ceil((size + rows) / (bound - 2))))  # parts are rounded up
            cuts = [start + rows * i // parts for i in range(parts + 1)]
            for low, high in itertools.pairwise(cuts):
                yield Range(number, low, high), math.ceil(size / parts)
            start += rows
