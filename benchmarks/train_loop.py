"""What the training loop costs beside the shortest loop over the same model, batches and optimizer.

    python benchmarks/train_loop.py [--steps 30] [--layers 4] [--width 128] [--vocabulary 4096] [--device cpu]

Both sides take turns, step by step, in one process; the ratio of their medians is what counts. The bare loop
makes whole batches from the same rows, calls `clip_grad_norm_` and a fused AdamW, and reads nothing back.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from model.config import GPT2Config, ModelSpec
from model.export import load_native, save_native
from model.gpt2 import GPT2
from pipeline.config.training import TrainConfig
from pipeline.data.batches import Batches, TokenStream
from pipeline.data.shards import ShardWriter
from pipeline.store.location import Location
from pipeline.train.request import FitRequest
from pipeline.train.schedule import micro_batches, rate_at
from pipeline.train.session import Session
from pipeline.train.topology import Topology, choose_device


def prepare(folder: Path, options: argparse.Namespace) -> FitRequest:
    """Write a random model and random shards."""
    arch = GPT2Config(
        n_layer=options.layers, n_head=4, n_embd=options.width, n_ctx=256, vocab_size=options.vocabulary
    )
    save_native(GPT2(ModelSpec.dense(arch)).init_weights(seed=0), folder / "init")
    (folder / "tokens").mkdir()
    random = np.random.default_rng(0)
    for name in ("train", "val"):
        with ShardWriter(folder / "tokens" / f"{name}.bin") as shard:
            shard.add(random.integers(0, options.vocabulary, 500_000))
    return FitRequest(
        train=TrainConfig(
            batch_tokens=options.batch_tokens, micro_batch=8, max_steps=10_000, device=options.device
        ),
        seed=0,
        init=Location(str(folder / "init")),
        tokens=Location(str(folder / "tokens")),
        shards=("train.bin",),
        val_shards=("val.bin",),
        run=Location(str(folder / "run")),
        fingerprint="0" * 64,
    )


def bare_step(folder: Path, request: FitRequest, device: torch.device) -> Callable[[int], None]:
    """One step of the loop that one would write by hand."""
    config = request.train
    model = load_native(folder / "init").to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.95), fused=True)
    stream = TokenStream([folder / "tokens" / "train.bin"])
    batches = Batches(stream, seq_len=config.seq_len, batch_tokens=config.batch_tokens, seed=0)

    def step(number: int) -> None:
        inputs, targets = (torch.from_numpy(rows).to(device) for rows in batches.batch(number))
        optimizer.zero_grad()
        for part in micro_batches(len(inputs), config.micro_batch):
            (model(inputs[part], targets[part]) / config.batch_tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(number, config)
        optimizer.step()

    return step


def main() -> None:
    """Time both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (
        ("steps", 30),
        ("layers", 4),
        ("width", 128),
        ("vocabulary", 4096),
        ("batch-tokens", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    device = choose_device(options.device)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        request = prepare(Path(name), options)
        bare = bare_step(Path(name), request, device)
        session = Session(request, Topology(rank=0, world=1, device=device))
        seconds: dict[str, list[float]] = {"bare": [], "loop": []}
        for number in range(options.steps + 3):
            for side, step in (("bare", lambda: bare(number)), ("loop", session.advance)):  # noqa: B023
                begin = clock()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if number >= 3:
                    seconds[side].append(clock() - begin)
    medians = {side: statistics.median(values) for side, values in seconds.items()}
    print(
        json.dumps(
            {
                "model": f"{options.layers} x {options.width}, {options.vocabulary} tokens",
                "batch_tokens": options.batch_tokens,
                "threads": torch.get_num_threads(),
                "seconds_per_step": {side: round(value, 5) for side, value in medians.items()},
                "loop_over_bare": round(medians["loop"] / medians["bare"], 4),
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
