"""A store as a sweep leaves it, without the sweep: real records and losses of invented trials.

    python tests/sweep_store.py STORE

Methods × shapes × seeds, two arms stopped early, one trial failed; what is written is the contract between
the sweep and its report: `trials.json` and `configs.json`.
"""

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from study_store import put, score, sizes

from pipeline.config.load import to_json, validate
from pipeline.evaluate.protocols import get_protocol
from pipeline.store.artifacts import Artifact, Identity, Store

METHODS = {"kron_vl": 0.08, "kron_prune": 0.03, "random_init": 0.45}
SHAPES = {(256, 256): (0.0, 1_200_000), (128, 512): (0.02, 1_350_000), (64, 1024): (0.11, 1_420_000)}
STOPPED = {("random_init", (128, 512)), ("random_init", (64, 1024))}
FAILED = ("kron_vl", (64, 1024), 2)
TOTAL = 1_966_080
RUNGS = tuple(range(196_608, TOTAL + 1, 196_608))
PROTOCOL = "krony/wt103@ctx256"
TEACHER_PARAMETERS = 2_000_000


def method_table(method: str, shape: Sequence[int]) -> dict[str, Any]:
    """The section of a config that a pair of choices makes."""
    if method == "random_init":
        return {"name": method, "of": {"name": "kron_vl", "shape": list(shape)}}
    return {"name": method, "shape": list(shape)} | ({"eps_init": 0.1} if method == "kron_prune" else {})


def config(folder: Path, method: str, shape: Sequence[int], seed: int) -> dict[str, Any]:
    """What such a trial runs."""
    table = {
        "name": f"{method}-{shape[0]}x{shape[1]}-s{seed}",
        "store": str(folder),
        "seed": seed,
        "teacher": {"name": "scratch", "n_layer": 4, "n_head": 4, "n_embd": 256, "n_ctx": 256},
        "calibration": {"seed": seed},
        "method": method_table(method, shape),
        "train": {"max_steps": 240, "batch_tokens": 8192, "seq_len": 256},
    }
    return to_json(validate(table, source="sweep_store"))


def write_sweep(
    folder: Path,
    *,
    name: str = "shapes",
    methods: Sequence[str] = tuple(METHODS),
    shapes: Sequence[tuple[int, int]] = tuple(SHAPES),
    seeds: Sequence[int] = (0, 1, 2),
    noise: float = 0.008,
    unhappy: bool = True,
    scored: bool = True,
    configs: bool = True,
    more: Sequence[Mapping[str, Any]] = (),
) -> Artifact:
    """A store with a teacher, its score, and one published sweep over `methods` × `shapes` × `seeds`.

    `unhappy` stops and fails some trials; `more` are further rows of `trials.json` as they are.
    """
    store = Store(folder)
    tokenizer = Identity("tokenizer", "bpe4096", {"name": "bpe"})
    tokens = Identity("tokens", "pydocs-bpe4096", {"split": "hash"}, {"tokenizer": tokenizer})
    teacher = Identity("teacher", "scratch-4x256", {"n_embd": 256}, {"tokens": tokens})
    for identity in (tokenizer, tokens):
        put(store, identity, {"data.bin": identity.name.encode()}, {})
    put(store, teacher, {"model.safetensors": b"teacher"}, sizes(TEACHER_PARAMETERS))
    protocol = get_protocol("krony/wt103").at_context(256)
    score(store, teacher, tokenizer, protocol, TEACHER_PARAMETERS, worse=0.0)
    rows, resolved = [], {}
    for method, shape, seed in itertools.product(methods, shapes, seeds):
        row, config_of_it = trial(folder, method, shape, seed, noise=noise, unhappy=unhappy)
        if row["state"] == "finished" and scored:
            exported = model(store, row, teacher=teacher, tokens=tokens, tokenizer=tokenizer)
            score(
                store,
                exported,
                tokenizer,
                protocol,
                row["parameters"],
                worse=row["val_loss"] - 3.1,
                seed=seed,
            )
            record = next(r for r in store.records("scores") if r.inputs["model"].address == exported.address)
            row |= {"scores": {PROTOCOL: record.address}, "model": exported.address}
        rows.append(row)
        resolved[row["key"]] = config_of_it
    axes = [["method", list(methods)], ["method.shape", [list(shape) for shape in shapes]]]
    identity = Identity(
        "sweep", name, {"sweep": {"axes": axes, "seeds": list(seeds)}}, {"teacher": teacher, "tokens": tokens}
    )
    states = [row["state"] for row in rows]
    metrics = {
        "trials": len(rows),
        **{state: states.count(state) for state in ("finished", "stopped", "failed")},
        "wall_s": 940.0,
        "train_s": 1710.0,
        "slots": 2,
        "efficiency": 0.91,
    }
    with store.attempt(identity, resume=True) as attempt:
        attempt.location.put_bytes("trials.json", json.dumps([*rows, *more]).encode())
        if configs:
            attempt.location.put_bytes("configs.json", json.dumps(resolved).encode())
        return attempt.publish(metrics=metrics, settings={"name": name})


def trial(
    folder: Path, method: str, shape: tuple[int, int], seed: int, *, noise: float, unhappy: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """One row of `trials.json`, and the config of the trial."""
    worse, size = SHAPES[shape]
    digits = [seed, *shape, *method.encode()]
    final = 3.1 + METHODS[method] + worse + np.random.default_rng(digits).normal(0, noise)
    curve = [
        [tokens, round(float(final + 1.2 * np.exp(-tokens / 4e5) - 1.2 * np.exp(-TOTAL / 4e5)), 6)]
        for tokens in RUNGS
    ]
    arm, initial = f"{method} {shape[0]}x{shape[1]}", 7.9 if method == "random_init" else 5.2
    row = {
        "key": hashlib.sha256(f"{arm} {seed}".encode()).hexdigest()[:10],
        "name": f"{arm} s{seed}",
        "arm": arm,
        "choices": {"method": {"name": method}, "method.shape": list(shape)},
        "seed": seed,
        "state": "finished",
        "reason": "",
        "run": f"run/{method}-s{seed}-{hashlib.sha256(arm.encode()).hexdigest()[:8]}",
        "init": f"init/{method}-{hashlib.sha256(arm.encode()).hexdigest()[:8]}",
        "model": "",
        "scores": {},
        "parameters": size,
        "macs_per_token": size - 300_000 + 40_000 * (shape[0] // 64),
        "tokens": TOTAL,
        "val_loss": curve[-1][1],
        "val_loss_initial": initial,
        "rungs": [[0, initial], *curve],
        "train_s": 61.0,
        "wall_s": 66.0,
    }
    if unhappy and (method, shape) in STOPPED:
        row |= {
            "state": "stopped",
            "reason": "rung 196,608 tokens: place 8 of 9, 3 go on",
            "val_loss": curve[0][1],
        }
        row |= {"tokens": RUNGS[0], "rungs": [[0, initial], *curve[:1]], "train_s": 6.0, "wall_s": 8.0}
    if unhappy and (method, shape, seed) == FAILED:
        reason = "the loss is nan at step 90 (737,280 tokens); lower train.lr or train.grad_clip"
        row |= {"state": "failed", "reason": reason, "val_loss": curve[2][1]}
        row |= {"tokens": RUNGS[2], "rungs": [[0, initial], *curve[:3]], "train_s": 19.0, "wall_s": 22.0}
    return row, config(folder, method, shape, seed)


def model(
    store: Store, row: Mapping[str, Any], *, teacher: Identity, tokens: Identity, tokenizer: Identity
) -> Identity:
    """The exported model of a trial; nothing but its identity matters here."""
    chosen = {"method": row["choices"]["method"]["name"], "shape": row["choices"]["method.shape"]}
    init = Identity("init", chosen["method"], chosen, {"teacher": teacher})
    run = Identity(
        "run", f"{init.name}-s{row['seed']}", {"seed": row["seed"]}, {"init": init, "tokens": tokens}
    )
    put(store, init, {"model.safetensors": b"init"}, {})
    put(store, run, {"model.safetensors": row["name"].encode()}, {"val_loss": row["val_loss"]})
    exported = Identity("model", run.name, {}, {"run": run, "tokenizer": tokenizer})
    put(store, exported, {"native/config.json": b"{}"}, {})
    return exported


if __name__ == "__main__":
    write_sweep(Path(sys.argv[1]))
