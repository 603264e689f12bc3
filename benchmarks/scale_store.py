"""A store of a thousand artifacts listed, a report of ten thousand rows written: seconds, memory, files read.

    python -m benchmarks.scale_store [--artifacts 1000] [--rows 1000] [--out FILE]

Records, losses and histories are those of invented models, published by the store's own code; what reads
them is what `krony status`, `krony report` and an address with a typo call. `--rows 10000` takes minutes. A
record is opened once per listing, or this ends with an error.
"""

import argparse
import importlib.metadata
import io
import itertools
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from analysis.lineage import Graph
from analysis.report import write_report
from model.config import GPT2Config, ModelSpec
from pipeline.errors import StoreError
from pipeline.evaluate.protocols import get_protocol
from pipeline.progress import Progress
from pipeline.store.artifacts import Identity, Store
from pipeline.tracking.jsonl import HistoryWriter

T = TypeVar("T")
PROTOCOLS = ("krony/wt103", "krony/wt2", "raw/wt2@1024", "lambada/openai_last_word")
SEEDS = 5
UNITS = 200
"""Windows of a text; a published one has 280 of them."""

_opened: Counter[str] = Counter()


def _count(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "open" and isinstance(arguments[0], str | Path):
        _opened[Path(arguments[0]).name] += 1


def timed(function: Callable[[], T]) -> tuple[T, float, int]:
    """The result, seconds, and how many records were opened."""
    _opened.clear()
    begin = time.perf_counter()
    result = function()
    return result, time.perf_counter() - begin, _opened["record.json"]


def put(
    store: Store, identity: Identity, files: Mapping[str, bytes], metrics: Mapping[str, Any], **settings: Any
) -> None:
    """Publish an artifact with these files."""
    with store.attempt(identity) as attempt:
        for key, data in files.items():
            attempt.location.put_bytes(key, data)
        attempt.publish(metrics=metrics, settings=settings)


def listing(store: Store, count: int) -> dict[str, float]:
    """A store of `count` small artifacts, and what a look at it costs."""
    begin = time.perf_counter()
    for number in range(count):
        put(
            store, Identity("stats", f"s{number % 7}", {"number": number}), {"a": b"a", "b": b"b"}, {"x": 1.0}
        )
    written = time.perf_counter() - begin
    found, records_s, opened = timed(store.records)
    assert len(found) == count
    assert opened in (0, count), f"{opened:,} opened for {count:,} records"  # 0: not on this disk
    graph, graph_s, opened = timed(lambda: Graph.read(store))
    assert len(graph.records) == count
    assert opened in (0, count), f"{opened:,} opened for {count:,} records"
    lost, lost_s, _ = timed(store.unfinished)
    assert not lost

    def mistaken() -> str:
        try:
            store.open("stats/none-00000000")
        except StoreError as err:
            return str(err)
        raise AssertionError("nothing has this address")

    said, typo_s, _ = timed(mistaken)
    return {
        "artifacts": count,
        "write_s": written,
        "records_s": records_s,
        "graph_s": graph_s,
        "unfinished_s": lost_s,
        "typo_s": typo_s,
        "typo_characters": len(said),
    }


def study(store: Store, rows: int) -> int:
    """A study with `rows` rows of scores: arms of five seeds, four protocols each; returns the arms."""
    corpus, tokenizer = Identity("corpus", "openwebtext", {"r": 1}), Identity("tokenizer", "gpt2", {"n": 1})
    tokens = Identity("tokens", "owt", {"split": "hash"}, {"corpus": corpus, "tokenizer": tokenizer})
    teacher = Identity("teacher", "gpt2", {"id": "openai-community/gpt2"})
    for identity in (corpus, tokenizer, tokens, teacher):
        put(store, identity, {"data": identity.name.encode()}, {"parameters": 124_439_808})
    spec = ModelSpec.dense(GPT2Config()).to_json()
    for block in spec["blocks"]:
        block.update({name: {"kind": "low_rank", "rank": 8} for name in ("mlp_c_fc", "mlp_c_proj")})
    structure = json.dumps({"format": "krony-native", "version": 1, "model": spec}).encode()
    dense = {"parameters": 124_439_808, "macs_per_token": 124_439_808}
    scored(store, teacher, tokenizer, dense, worse=0.0, rng=np.random.default_rng(1))
    arms = max(1, rows // (SEEDS * len(PROTOCOLS)))
    shapes = itertools.cycle(itertools.product((32, 64, 128, 256, 384, 768), (64, 128, 512, 1536, 3072)))
    with Progress("study", arms, unit="arms") as progress:
        for number, shape in zip(range(arms), shapes, strict=False):
            method = {"name": "kron_vl", "shape": list(shape), "terms": 1 + number // 30, "gauge": "rms"}
            sizes = {
                "parameters": 60_000_000 + 97_003 * number,
                "macs_per_token": 60_000_000 + 97_003 * number,
            }
            init = Identity("init", "kron_vl", {"method": method}, {"teacher": teacher})
            errors = [
                {"name": f"h.{layer}.mlp.{matrix}", "energy": 4.0, "achieved_error": 1.0 + layer / 100}
                for layer in range(12)
                for matrix in ("c_fc", "c_proj")
            ]
            files = {"model": b"i", "config.json": structure, "report.json": json.dumps(errors).encode()}
            put(store, init, files, sizes)
            for seed in range(SEEDS):
                trained(store, init, tokens, tokenizer, sizes, number=number, seed=seed)
            progress.update(number + 1)
    return arms


def trained(
    store: Store,
    init: Identity,
    tokens: Identity,
    tokenizer: Identity,
    sizes: Mapping[str, int],
    *,
    number: int,
    seed: int,
) -> None:
    """One run with its history, the model exported from it, and its scores."""
    settings = {"max_steps": 2000, "batch_tokens": 491_520, "seq_len": 1024, "lr": 6e-4}
    run = Identity(
        "run", f"kron_vl-s{seed}", {"train": settings, "seed": seed}, {"init": init, "tokens": tokens}
    )
    rng = np.random.default_rng([number, seed])
    worse = 0.2 + number / 1000 + float(rng.normal(0, 0.003))
    with store.attempt(run, resume=True) as attempt:
        attempt.location.put_bytes("model", b"r")
        with HistoryWriter(attempt.location) as writer:
            for step in range(0, 2001, 100):
                loss = 3.1 + worse + float(np.exp(-step / 300))
                writer.append({"step": step, "tokens": step * 491_520, "loss": loss, "val_loss": loss})
        attempt.publish(
            metrics={"steps": 2000, "tokens": 983_040_000}, settings={"name": f"a{number}-s{seed}"}
        )
    model = Identity("model", run.name, {}, {"run": run, "tokenizer": tokenizer})
    put(store, model, {"native/config.json": b"{}"}, sizes)
    scored(store, model, tokenizer, sizes, worse=worse, rng=rng)


def scored(
    store: Store,
    subject: Identity,
    tokenizer: Identity,
    sizes: Mapping[str, int],
    *,
    worse: float,
    rng: np.random.Generator,
) -> None:
    """Scores of a model that is so many nats worse than the teacher, or of the teacher."""
    for protocol in map(get_protocol, PROTOCOLS):
        losses = pd.DataFrame({"index": range(UNITS), "tokens": np.full(UNITS, 1023)})
        shared = np.random.default_rng(3).normal(3.2, 0.25, UNITS)
        mean = shared + worse + rng.normal(0, 0.02, UNITS)
        losses["nll"] = mean * losses["tokens"]
        value = float(np.exp(mean.mean()))
        if protocol.metric == "accuracy":
            losses["correct"] = shared + rng.normal(0, 0.02, UNITS) < 3.2 - worse / 10
            value = float(losses["correct"].mean())
        sink = io.BytesIO()
        losses.to_parquet(sink, index=False)
        asked = {"protocol": protocol.id, "version": protocol.version, "text": "digest"}
        name = f"{subject.name}-{protocol.id.replace('/', '.').replace('@', '.')}"
        loss = float(mean.mean())
        metrics = {
            "protocol": protocol.id, "metric": protocol.metric, "value": value, "loss": loss,
            "token_loss": loss, "weighting": protocol.weighting, "window": protocol.window,
            "text": protocol.text, "text_sha256": "ab" * 32, "tokens_sha256": "cd" * 32, "tokens": 286_657,
            "windows": UNITS, "scored": UNITS * 1023, "n_embd": 768, "bits_per_byte": loss / 3,
            "unit": "passage" if protocol.metric == "accuracy" else "window", **sizes,
        }  # fmt: skip
        inputs = {"model": subject, "tokenizer": tokenizer}
        put(store, Identity("scores", name, asked, inputs), {"losses.parquet": sink.getvalue()}, metrics)


def reporting(store: Store, folder: Path, rows: int) -> dict[str, float]:
    """A report of the study: what it costs, and what it reads."""
    begin = time.perf_counter()
    arms = study(store, rows)
    written = time.perf_counter() - begin
    report, first_s, opened = timed(lambda: write_report(store, folder / "one"))
    parquets = _opened["losses.parquet"]
    assert len(report.frames.scores) == (arms * SEEDS + 1) * len(PROTOCOLS)
    return {
        "rows": len(report.frames.scores),
        "arms": arms,
        "records": len(report.frames.graph.records),
        "write_s": written,
        "report_s": first_s,
        "records_opened": opened,
        "losses_opened": parquets,
        "page_mb": sum(path.stat().st_size for path in (folder / "one").rglob("*") if path.is_file()) / 1e6,
    }


def main() -> None:
    """Print one line of JSON for each part."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--artifacts", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=1000, help="rows of the report")
    parser.add_argument("--out", type=Path, help="write the JSON here")
    options = parser.parse_args()
    sys.addaudithook(_count)
    parts: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: importlib.metadata.version(name) for name in ("pandas", "matplotlib", "pyarrow")},
    }
    with tempfile.TemporaryDirectory(prefix="krony-scale-") as name:
        folder = Path(name)
        parts["listing"] = listing(Store(folder / "small"), options.artifacts)
        print(json.dumps(parts["listing"]), flush=True)
        parts["report"] = reporting(Store(folder / "study"), folder / "report", options.rows)
        print(json.dumps(parts["report"]))
    parts["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    print(json.dumps({"peak_mb": parts["peak_mb"]}))
    if options.out:
        options.out.write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
