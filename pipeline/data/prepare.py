"""Documents to shards of tokens with Ray, resumable shard by shard.

The plan comes first and is stored; what it lacks is mapped, one Ray Data task per planned shard, and only
sidecars come back. So the bytes are the same for any number of workers and after any interruption, and memory
is bounded by one document and one row group per worker. The only file of the data layer that knows Ray.
"""

import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from pipeline.cluster import connect
from pipeline.config.schema import RayConfig, RunConfig
from pipeline.config.sources import DataConfig
from pipeline.data.corpora import source_of
from pipeline.data.documents import KEY_BYTES, CorpusError
from pipeline.data.encode import Job, encoder_name, finished, make_shard
from pipeline.data.encoder import installed
from pipeline.data.openwebtext import DOCUMENTS, NANOGPT_TOKENS
from pipeline.data.outlook import TokensOutlook
from pipeline.data.plan import (
    FILE,
    REPEATS,
    PlannedShard,
    ShardPlan,
    deduplicates,
    make_plan,
    plan_shards,
    shard_bytes,
)
from pipeline.data.rows import Corpus, Split, window
from pipeline.data.shards import Sidecar
from pipeline.data.splits import Keys, Positions, repeats
from pipeline.errors import DataError, KronyError
from pipeline.progress import Progress
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.location import Location
from pipeline.store.scratch import scratch_folder

T = TypeVar("T")
R = TypeVar("R")


def prepare_tokens(
    config: DataConfig,
    identity: Identity,
    corpus: Artifact,
    tokenizer: Artifact,
    store: Store,
    *,
    ray: RayConfig,
    force: bool = False,
    quiet: bool = False,
) -> Artifact:
    """Encode a corpus into shards `train-*.bin` and `val-*.bin`, a sidecar each; makes only what is missing.

    Raises CorpusError if a side of the split stays without documents.
    """
    if not force and (found := store.find(identity)):
        return found
    with store.attempt(identity, resume=True, force=force) as attempt:
        where, data = attempt.location, Corpus.of(corpus)
        plan = stored_plan(where, corpus=corpus.record.digest, tokenizer=tokenizer.record.digest)
        if plan is None:
            plan = _new_plan(config, data, corpus, tokenizer, where, ray=ray, quiet=quiet)
        job = Job(
            corpus=data,
            tokenizer=tokenizer.location,
            target=where,
            plan=plan.digest,
            split=plan.split,
            fraction=plan.validation_fraction,
            encoder=config.encoder,
        )
        done = {s.index: finished(where, plan=plan.digest, index=s.index) for s in plan.shards}
        sidecars = [sidecar for pair in done.values() if pair for sidecar in pair]
        todo = [shard for shard in plan.shards if not done[shard.index]]
        begin, made, engines = time.monotonic(), 0, set[str]()
        with Progress("tokens", len(plan.shards), unit="shards", quiet=quiet) as progress:
            progress.update(len(plan.shards) - len(todo))
            if todo:
                rows = _rows(plan, todo, _stored_repeats(where, plan))
                with connect(ray, quiet=quiet):
                    for engine, pair in _map(job, rows, at_once=config.tokenize_workers):
                        engines.add(engine)
                        sidecars += pair
                        made += sum(sidecar.tokens for sidecar in pair)
                        rate = made / (time.monotonic() - begin)
                        progress.update(len(sidecars) // 2, tokens_per_s=rate)
        metrics = _metrics(plan, sidecars, tokenizer)
        settings: dict[str, Any] = {
            "tokens_per_s": round(made / (time.monotonic() - begin)),
            "tokens_made": made,
        }
        if engines:  # of what was made now, on any node
            settings["encoder"] = ", ".join(sorted(engines))
        written = {f"{sidecar.shard}.bin": sidecar.sha256 for sidecar in sidecars}
        return attempt.publish(metrics=metrics, settings=settings, written=written)


# --- plan -------------------------------------------------------------------------------------------------


def stored_plan(where: Location, *, corpus: str, tokenizer: str) -> ShardPlan | None:
    """The plan of an unfinished attempt if it was made for these inputs; an attempt for others is emptied."""
    try:
        plan = ShardPlan.from_json(where.read_bytes(FILE), where=f"{where.uri}/{FILE}")
    except FileNotFoundError:
        return None
    if (plan.corpus, plan.tokenizer) == (corpus, tokenizer):
        return plan
    for key in where.list():
        where.delete(key)
    return None


def _new_plan(
    config: DataConfig,
    data: Corpus,
    corpus: Artifact,
    tokenizer: Artifact,
    where: Location,
    *,
    ray: RayConfig,
    quiet: bool,
) -> ShardPlan:
    """Plan the shards and store the plan, the positions of repeats before it."""
    dropped = find_repeats(data, ray=ray, quiet=quiet) if deduplicates(config) else None
    plan = make_plan(
        data.manifest,
        config,
        corpus=corpus.record.digest,
        tokenizer=tokenizer.record.digest,
        repeats=dropped,
    )
    if dropped is not None:
        where.put_bytes(REPEATS, dropped.astype("<i8").tobytes())
    where.put_bytes(FILE, plan.to_json())
    return plan


def find_repeats(data: Corpus, *, ray: RayConfig, quiet: bool = False) -> Positions:
    """Sorted positions of the documents whose text stands earlier in the corpus.

    The keys lie in a memory map, 16 bytes per document; see `splits.repeats` for the memory that is used.
    """
    manifest = data.manifest
    numbers = range(len(manifest.files))
    with scratch_folder() as folder:
        path = folder / "keys"
        keys: Keys = np.memmap(path, dtype=np.uint8, mode="w+", shape=(manifest.documents, KEY_BYTES))
        found = (
            (data.keys(number) for number in numbers)  # reading stored ids is not worth a task
            if manifest.has_ids
            else run_tasks(data.keys, numbers, ray=ray, quiet=quiet, hub=manifest.place == "hub")
        )
        at = 0
        for part in found:
            keys[at : at + len(part)] = part
            at += len(part)
        return repeats(keys)


def _stored_repeats(where: Location, plan: ShardPlan) -> Positions:
    data = where.read_bytes(REPEATS) if plan.dedup else b""
    return np.frombuffer(data, dtype="<i8").astype(np.int64)


def _rows(plan: ShardPlan, todo: Sequence[PlannedShard], dropped: Positions) -> list[dict[str, Any]]:
    """What each task is sent: its shard, and the positions that matter to it."""
    split = Split.of(plan.split, fraction=plan.validation_fraction, documents=plan.documents)
    return [
        {
            "shard": shard.to_json(),
            "validation": window(split.validation, shard.first, shard.documents).tobytes(),
            "repeats": window(dropped, shard.first, shard.documents).tobytes(),
        }
        for shard in todo
    ]


def _metrics(plan: ShardPlan, sidecars: Sequence[Sidecar], tokenizer: Artifact) -> dict[str, Any]:
    sums = {
        f"{side}_{what}": sum(getattr(s, what) for s in sidecars if s.shard.startswith(side))
        for side in ("train", "val")
        for what in ("tokens", "documents", "text_bytes")
    }
    for side, word in (("train", "training"), ("val", "validation")):
        if not sums[f"{side}_documents"]:
            raise CorpusError(
                f"the split {plan.split!r} leaves no {word} document among {plan.documents:,}; change "
                "data.validation_fraction, name corpus.validation_paths or take a larger corpus"
            )
    metrics = {
        **sums,
        "documents": plan.documents,
        "repeats": plan.repeated,
        "shards": len(plan.shards),
        "vocab_size": tokenizer.record.metrics["vocab_size"],
    }
    if plan.split == "nanogpt" and plan.documents == DOCUMENTS and tokenizer.record.name == "gpt2":
        published = {f"{side}_tokens": count for side, count in NANOGPT_TOKENS.items()}
        metrics["equals_nanogpt"] = all(sums[name] == count for name, count in published.items())
    return metrics


def plan_tokens(config: RunConfig, identity: Identity, store: Store) -> TokensOutlook:
    """What `krony prepare` would do, without doing any of it; exact in shards once the corpus is stored."""
    found = store.find(identity.inputs["corpus"])
    source = source_of(config.corpus)
    if found:
        manifest = Corpus.of(found).manifest
        text_bytes, documents = manifest.text_bytes, manifest.documents
        shards = sum(1 for _ in plan_shards(manifest, shard_tokens=config.data.shard_tokens))
    else:
        text_bytes, documents = sum(part.text_bytes for part in source.partitions()), 0
        limit = int(getattr(config.corpus, "max_megabytes", 0) * 1e6)
        text_bytes = min(text_bytes, limit) if limit else text_bytes
        shards = math.ceil(text_bytes / shard_bytes(text_bytes, config.data.shard_tokens))
    return TokensOutlook(
        address=identity.address,
        exact=found is not None,
        documents=documents,
        text_bytes=text_bytes,
        shards=shards,
        cores=config.data.tokenize_workers or os.cpu_count() or 1,
        dedup=deduplicates(config.data),
        engine="gigatoken" if installed(config.data.encoder) else "tiktoken",
    )


# --- Ray --------------------------------------------------------------------------------------------------


def run_tasks(
    function: Callable[[T], R], items: Sequence[T], *, ray: RayConfig, hub: bool = False, quiet: bool = False
) -> Iterator[R]:
    """`function` of every item by Ray tasks of one CPU, in the order of the items, some ahead of the reader.

    A single item is done in this process. `hub` lets the tasks reach the network. When the reader stops
    early, no task is left running.
    """
    if len(items) <= 1:
        yield from map(function, items)
        return
    with connect(ray, quiet=quiet) as library:
        task = library.remote(function).options(num_cpus=1, **_remote_options(hub=hub))
        ahead = max(2, 2 * int(library.cluster_resources().get("CPU", 1)))
        left = iter(items)
        waiting = deque(task.remote(item) for item in itertools.islice(left, ahead))
        try:
            while waiting:
                try:
                    result = library.get(waiting.popleft())
                except library.exceptions.RayTaskError as err:
                    if isinstance(err.cause, KronyError):
                        raise err.cause from err  # as it was raised there, without Ray's traceback
                    raise
                waiting.extend(task.remote(item) for item in itertools.islice(left, 1))
                yield result
        finally:
            for each in waiting:
                library.cancel(each)
            if waiting:
                library.wait([*waiting], num_returns=len(waiting))


def _map(job: Job, rows: list[dict[str, Any]], *, at_once: int) -> Iterator[tuple[str, list[Sidecar]]]:
    """One Ray Data task per planned shard; encoder and sidecars as they are done, in any order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        partial(_make, job),
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=at_once or None),
        **_remote_options(hub=job.corpus.manifest.place == "hub"),
    )
    for row in made.iter_rows():
        yield _made(row)


def _make(job: Job, row: dict[str, Any]) -> dict[str, Any]:
    """A task. Errors for people come back as text: Ray Data would bury them in tracebacks of its own."""
    try:
        sidecars = make_shard(
            job,
            PlannedShard.from_json(row["shard"]),
            validation=np.frombuffer(row["validation"], dtype=np.int64),
            repeats=np.frombuffer(row["repeats"], dtype=np.int64),
        )
    except KronyError as err:
        return {"sidecars": [], "error": str(err), "encoder": ""}
    made = [sidecar.to_json() for sidecar in sidecars]
    return {"sidecars": made, "error": "", "encoder": encoder_name(job)}


def _made(row: dict[str, Any]) -> tuple[str, list[Sidecar]]:
    """Encoder and sidecars of a task's answer; raises DataError for an error that it met."""
    if row["error"]:
        raise DataError(row["error"])
    return row["encoder"], [Sidecar.from_json(data, where="task") for data in row["sidecars"]]


def _remote_options(*, hub: bool) -> dict[str, Any]:
    """Workers are offline unless their task is to fetch."""
    offline = os.environ.get("HF_HUB_OFFLINE", "0")
    return {"runtime_env": {"env_vars": {"HF_HUB_OFFLINE": offline}}} if hub else {}
