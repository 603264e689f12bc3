"""A store as a study leaves it, without the study: real records, losses and histories of invented models.

    python tests/study_store.py STORE

Numbers are drawn from a seed; what records hold, and where files lie, is what the pipeline writes.
"""

import io
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from model.config import GPT2Config, ModelSpec
from pipeline.evaluate.protocols import Protocol, get_protocol
from pipeline.store.artifacts import Artifact, Identity, Store
from pipeline.store.location import Location
from pipeline.tracking.jsonl import HistoryWriter

DENSE = 124_439_808
TEXTS = {
    "krony/wt103": (286_657, 280),
    "krony/wt2": (297_300, 291),
    "lambada/openai_last_word": (440_534, 5_153),
}


@dataclass(frozen=True)
class Invented:
    """One compressed model: what it is, how large, how much worse than the teacher (nats)."""

    name: str
    method: Mapping[str, Any]
    parameters: int
    worse: float
    seed: int = 0
    lr: float = 6e-4
    calibration_seed: int | None = None
    """None: a method that needs no statistics."""

    version: int = 1
    """Of the producer of the run."""

    targets: Literal["mlp", "all_linear"] = "mlp"
    """Which matrices are not dense, if any is."""


MODELS = (
    Invented("dense", {"name": "dense"}, DENSE, -0.02),
    Invented(
        "kron-96m", {"name": "kron_vl", "shape": [768, 1536], "terms": 1, "gauge": "rms"}, 96_128_304, 0.262
    ),
    Invented("prune-95m", {"name": "kron_prune", "shape": [384, 3072], "eps_init": 0.1}, 96_128_304, 0.255),
    Invented(
        "kron-82m", {"name": "kron_vl", "shape": [768, 768], "terms": 1, "gauge": "rms"}, 81_972_576, 0.371
    ),
    Invented(
        "kron-82m-s1",
        {"name": "kron_vl", "shape": [768, 768], "terms": 1, "gauge": "rms"},
        81_972_576,
        0.374,
        1,
    ),
    Invented(
        "random-82m",
        {"name": "random_init", "of": {"name": "kron_vl", "shape": [768, 768], "terms": 1}},
        81_972_576,
        0.96,
    ),
    Invented(
        "kron-67m", {"name": "kron_vl", "shape": [32, 64], "terms": 1, "gauge": "rms"}, 67_893_504, 0.93
    ),
)


def put(
    store: Store, identity: Identity, files: Mapping[str, bytes], metrics: Mapping[str, Any], **settings: Any
) -> Artifact:
    """Publish an artifact with these payload files, unless it is there."""
    if done := store.find(identity):
        return done
    with store.attempt(identity) as attempt:
        for key, data in files.items():
            attempt.location.put_bytes(key, data)
        return attempt.publish(metrics=metrics, settings=settings)


def write_study(
    folder: Path,
    *,
    models: Sequence[Invented] = MODELS,
    protocols: Sequence[str] = ("krony/wt103", "krony/wt2", "lambada/openai_last_word"),
    context: int = 1024,
) -> Store:
    """A store with a teacher, `models`, and a score of each under each protocol."""
    store = Store(folder)
    corpus = Identity("corpus", "openwebtext", {"revision": "f3808c30"})
    tokenizer = Identity("tokenizer", "gpt2", {"name": "gpt2"})
    tokens = Identity(
        "tokens", "openwebtext-gpt2", {"split": "nanogpt"}, {"corpus": corpus, "tokenizer": tokenizer}
    )
    teacher = Identity("teacher", "gpt2", {"id": "openai-community/gpt2"})
    for identity in (corpus, tokenizer, tokens):
        put(store, identity, {"data.bin": identity.name.encode()}, {})
    put(store, teacher, {"model.safetensors": b"teacher"}, sizes(DENSE))
    for protocol in protocols:
        score(store, teacher, tokenizer, get_protocol(protocol).at_context(context), DENSE, worse=0.0)
    for model in models:
        exported = train(store, model, teacher=teacher, tokens=tokens, tokenizer=tokenizer)
        for protocol in protocols:
            followed = get_protocol(protocol).at_context(context)
            score(store, exported, tokenizer, followed, model.parameters, worse=model.worse, seed=model.seed)
    return store


def train(
    store: Store, model: Invented, *, teacher: Identity, tokens: Identity, tokenizer: Identity
) -> Identity:
    """Init, run and model of one invented model; returns the identity of the model."""
    config = {"method": dict(model.method), "budget": {"params": model.parameters}}
    inputs = {"teacher": teacher}
    if model.calibration_seed is not None:
        measured = {"needs": ["input_gram"], "sequences": 128, "seed": model.calibration_seed}
        inputs["stats"] = Identity("stats", "input_gram", measured, {"teacher": teacher, "tokens": tokens})
        put(store, inputs["stats"], {"stats.safetensors": b"stats"}, {})
    init = Identity("init", str(model.method["name"]), config, inputs)
    put(
        store,
        init,
        {"model.safetensors": b"init", "config.json": structure(model), "report.json": matrix_report(model)},
        sizes(model.parameters),
    )
    settings = {"max_steps": 2000, "batch_tokens": 491_520, "seq_len": 1024, "lr": model.lr}
    run = Identity("run", f"{init.name}-s{model.seed}", {"train": settings, "seed": model.seed},
                   {"init": init, "tokens": tokens}, model.version)  # fmt: skip
    if store.find(run) is None:
        with store.attempt(run, resume=True) as attempt:
            attempt.location.put_bytes("model.safetensors", model.name.encode())
            history(attempt.location, model)
            attempt.publish(metrics={"steps": 2000, "tokens": 983_040_000, "val_loss": 3.1 + model.worse},
                            settings={"name": model.name})  # fmt: skip
    exported = Identity("model", run.name, {}, {"run": run, "tokenizer": tokenizer})
    put(store, exported, {"native/config.json": b"{}"}, sizes(model.parameters))
    return exported


def sizes(parameters: int) -> dict[str, int]:
    """Size metrics as the pipeline records them, for the width of GPT-2."""
    return {
        "parameters": parameters,
        "krony_parameters": parameters - 786_432,
        "macs_per_token": parameters - 907_776,
    }


def history(location: Location, model: Invented) -> None:
    """A loss that falls, with a validation every 100 steps."""
    rng = np.random.default_rng(len(model.name))
    with HistoryWriter(location) as writer:
        writer.append({"step": 0, "tokens": 0, "val_loss": 3.1 + 4 * model.worse + 0.5})
        for step in range(20, 2001, 20):
            smooth = 3.1 + model.worse + (3 * model.worse + 0.5) * np.exp(-step / 300)
            row = {"step": step, "tokens": step * 491_520, "loss": smooth + rng.normal(0, 0.03), "lr": 6e-4}
            writer.append(row | ({"val_loss": smooth} if step % 100 == 0 else {}))


def structure(model: Invented) -> bytes:
    """What stands at each matrix, as an init says it; of the right kind, not of the right size."""
    spec = ModelSpec.dense(GPT2Config()).to_json()
    changed = ["mlp_c_fc", "mlp_c_proj"] + (["attn_c_attn"] if model.targets == "all_linear" else [])
    for block in spec["blocks"] if model.method["name"] != "dense" else ():
        block.update({matrix: {"kind": "low_rank", "rank": 8} for matrix in changed})
    return json.dumps({"format": "krony-native", "version": 1, "model": spec}).encode()


def matrix_report(model: Invented) -> bytes:
    """Relative errors that differ by layer and matrix."""
    rng = np.random.default_rng(model.parameters)
    rows = []
    for layer in range(12) if model.method["name"] != "dense" else ():
        for matrix in ("mlp.c_fc", "mlp.c_proj"):
            error = 0.4 + model.worse * 0.4 + 0.02 * layer + rng.normal(0, 0.02)
            rows.append(
                {"name": f"h.{layer}.{matrix}", "energy": 4.0, "achieved_error": 4 * float(error) ** 2}
            )
    return json.dumps(rows).encode()


def score(
    store: Store,
    model: Identity,
    tokenizer: Identity,
    protocol: Protocol,
    parameters: int,
    *,
    worse: float,
    seed: int = 0,
) -> None:
    """One scores artifact; models of one protocol share the difficulty of its units."""
    count, units = TEXTS.get(protocol.id.split("@ctx")[0], (20_000, 40))
    shared, own = (
        np.random.default_rng(3),
        np.random.default_rng([seed, parameters, units, int(abs(worse) * 1e4)]),
    )
    losses = pd.DataFrame({"index": range(units), "tokens": np.full(units, 1023 if units < 1000 else 1)})
    mean = shared.normal(3.2, 0.25, units) + worse + own.normal(0, 0.02, units)
    losses["nll"] = mean * losses["tokens"]
    value, loss = float(np.exp(mean.mean())), float(mean.mean())
    if protocol.metric == "accuracy":
        losses["correct"] = shared.uniform(0, 1, units) < 0.46 * np.exp(-1.4 * worse) + own.normal(
            0, 0.02, units
        )
        value = float(losses["correct"].mean())
    sink = io.BytesIO()
    losses.to_parquet(sink, index=False)
    identity = Identity(
        "scores",
        f"{model.name}-{protocol.id.replace('/', '.').replace('@', '.')}",
        {"protocol": protocol.id, "version": protocol.version, "text": "digest"},
        {"model": model, "tokenizer": tokenizer},
    )
    measured = {
        "protocol": protocol.id, "metric": protocol.metric, "value": value, "loss": loss, "token_loss": loss,
        "weighting": protocol.weighting, "window": protocol.window, "text": protocol.text,
        "text_sha256": "ab" * 32, "tokens_sha256": "cd" * 32, "tokens": count, "windows": units,
        "scored": int(losses["tokens"].sum()), "n_embd": 768, "bits_per_byte": loss / 3,
        "unit": "passage" if protocol.metric == "accuracy" else "window",
    }  # fmt: skip
    settings = {"description": protocol.description, "tokenizer": "gpt2", "device": "cpu"}
    put(store, identity, {"losses.parquet": sink.getvalue()}, measured | sizes(parameters), **settings)


if __name__ == "__main__":
    write_study(Path(sys.argv[1]))
