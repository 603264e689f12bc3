"""What one task does: read a planned shard's documents, encode them, publish two files, say what is in them.

No token leaves the task. Memory holds one row group and one document. The bytes depend on the plan alone, so
a task that runs twice, here or on another node, changes nothing. Nothing here knows Ray.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from pipeline.data.documents import Side
from pipeline.data.encoder import Choice, Encoder
from pipeline.data.plan import PlannedShard
from pipeline.data.rows import Corpus, Split, sided_texts
from pipeline.data.shards import HEADER_BYTES, TOKEN_BYTES, ShardError, ShardWriter, Sidecar
from pipeline.data.splits import Positions
from pipeline.data.tokenizer import load_tokenizer
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder

SIDES: tuple[Side, ...] = ("train", "val")


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What all tasks of one tokens artifact share."""

    corpus: Corpus
    tokenizer: Location
    target: Location
    plan: str
    """Digest of the plan."""

    split: Literal["hash", "nanogpt"]
    fraction: float
    """Share of validation, for the split `hash`."""

    encoder: Choice
    """The library that may do the work."""


def make_shard(
    job: Job, shard: PlannedShard, *, validation: Positions, repeats: Positions
) -> tuple[Sidecar, ...]:
    """Encode one planned shard and publish its two files, each followed by its sidecar.

    `validation` and `repeats` are the positions in the corpus of the documents of this shard that the split
    holds out by position, and of those that are dropped.
    """
    encoder = _encoder(job.tokenizer, job.encoder)
    split = Split(name=job.split, fraction=job.fraction, validation=validation)
    sizes = dict.fromkeys(SIDES, 0)
    with scratch_folder() as folder:
        paths = {side: folder / f"{shard_name(side, shard.index)}.bin" for side in SIDES}
        with ShardWriter(paths["train"]) as train, ShardWriter(paths["val"]) as val:
            writers = {"train": train, "val": val}
            for side, text in sided_texts(
                job.corpus, shard.ranges, first=shard.first, split=split, repeats=repeats
            ):
                writers[side].add(encoder.document(text))
                sizes[side] += len(text.encode())
        files = job.corpus.manifest.files
        made = []
        for side in SIDES:
            sidecar = Sidecar(
                shard=shard_name(side, shard.index),
                plan=job.plan,
                tokens=writers[side].tokens,
                documents=writers[side].documents,
                text_bytes=sizes[side],
                sha256=sha256_file(paths[side]),
                source=tuple((files[part.file].name, part.start, part.stop) for part in shard.ranges),
            )
            job.target.put_file(f"{sidecar.shard}.bin", paths[side], move=True)
            job.target.put_bytes(f"{sidecar.shard}.json", sidecar.to_json())
            made.append(sidecar)
    return tuple(made)


def encoder_name(job: Job) -> str:
    """The library that encodes for a job in this process, and its version."""
    return _encoder(job.tokenizer, job.encoder).name


def shard_name(side: str, index: int) -> str:
    """`train-00007`."""
    return f"{side}-{index:05d}"


def finished(target: Location, *, plan: str, index: int) -> tuple[Sidecar, ...] | None:
    """The sidecars of a planned shard if both of its files are there, whole and of this plan; else None."""
    found = []
    for side in SIDES:
        name = shard_name(side, index)
        try:
            sidecar = Sidecar.from_json(target.read_bytes(f"{name}.json"), where=f"{target.uri}/{name}.json")
            size = target.size(f"{name}.bin")
        except (FileNotFoundError, ShardError):
            return None
        if sidecar.plan != plan or size != HEADER_BYTES + TOKEN_BYTES * sidecar.tokens:
            return None
        found.append(sidecar)
    return tuple(found)


@lru_cache(maxsize=2)
def _encoder(tokenizer: Location, choice: Choice) -> Encoder:
    """One per process: tasks come one after the other."""
    return Encoder(load_tokenizer(tokenizer.local_folder()), choice=choice)
