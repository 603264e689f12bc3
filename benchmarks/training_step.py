"""A whole training step of a compressed GPT-2 against the dense one: forward, backward, clip, update.

    python -m benchmarks.training_step [--rows 4] [--rounds 7] [--compile] [--device cpu] [--csv step.csv]

GPT-2 small's shape, rows of 1,024 random tokens, bf16 autocast, AdamW (fused), gradient clipping, the loss of
our own `GPT2`: what `krony train` does per step, without data and logs. The sides take turns. Prints how many
times as fast as `dense` each size is (median and 95 % interval over rounds), tokens per second, the peak of
memory where CUDA tells it, and, on CUDA, the share of the card's bf16 peak (`--peak` TFLOP/s) that is used.
"""

import argparse
import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.mlp import SHAPES
from benchmarks.table import against, publish
from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2
from pipeline.allocator import keeping_memory
from pipeline.evaluate.turns import Spread, take_turns

CONTEXT = 1024
H200_PEAK = 989.0
"""Dense bf16 TFLOP/s of an H200, by its data sheet."""


@dataclass(frozen=True, slots=True)
class Step:
    """One model with its optimizer, ready to be called."""

    model: GPT2
    run: Callable[[], None]
    flops: float
    """Of one step: 6 per multiply-accumulate and token, attention scores included."""


def specs(layers: int, names: list[str]) -> dict[str, ModelSpec]:
    """The dense GPT-2, and those with both MLP matrices of every block replaced."""
    dense = ModelSpec.dense(GPT2Config(n_layer=layers, n_ctx=CONTEXT))
    found = {"dense": dense}
    for name, (m1, n1, terms) in SHAPES.items():
        if any(name.startswith(each) for each in names):
            found[name] = with_kron_mlp(dense, KronChoice(shape=(m1, n1), terms=terms), terms=terms)
    return found


def step_of(spec: ModelSpec, *, rows: int, device: str, compiled: bool, half: bool = True) -> Step:
    """A model with random weights, and a function that takes one step on random tokens."""
    torch.manual_seed(0)
    model = GPT2(spec).init_weights(seed=0).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    ids = torch.randint(spec.arch.vocab_size, (rows, CONTEXT + 1), device=device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    forward: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            loss = forward(inputs, targets) / targets.numel()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    scores = 2 * spec.arch.n_layer * spec.arch.n_embd * CONTEXT / 2  # causal: half of the past on average
    return Step(model, run, 6.0 * (spec.macs_per_token("factored") + scores) * targets.numel())


def measure(
    steps: Mapping[str, Step], *, rows: int, rounds: int, device: str, peak: float
) -> list[dict[str, str | float]]:
    """One row per side."""
    for name, step in steps.items():
        began = time.perf_counter()
        step.run()
        step.run()
        if device == "cuda":
            torch.cuda.synchronize()
        print(f"{name}: first two steps {time.perf_counter() - began:.1f} s", flush=True)
    with keeping_memory(device):
        for step in steps.values():
            step.run()
        took = take_turns(
            {name: step.run for name, step in steps.items()}, rounds=rounds, device=device
        ).seconds
    found: list[dict[str, str | float]] = []
    for name, times in took.items():
        seconds = Spread.quartiles(times).middle
        row: dict[str, str | float] = {
            "side": name,
            "parameters": steps[name].model.num_parameters(),
            "tokens_per_s": rows * CONTEXT / seconds,
            **against(took["dense"], times),
        }
        if device == "cuda":
            row["mfu"] = steps[name].flops / seconds / 1e12 / peak
        found.append(row)
    return found


def with_memory(
    rows_found: list[dict[str, str | float]], *, layers: int, rows: int
) -> list[dict[str, str | float]]:
    """The rows with the CUDA memory that each side adds alone: weights, optimizer, a step, not compiled."""
    every = specs(layers, [name.split()[0] for name in SHAPES])
    for row in rows_found:
        gc.collect()
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _two_steps(every[str(row["side"])], rows=rows)
        row["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    return rows_found


def _two_steps(spec: ModelSpec, *, rows: int) -> None:
    step = step_of(spec, rows=rows, device="cuda", compiled=False)
    step.run()
    step.run()
    torch.cuda.synchronize()


def main() -> None:
    """Time all sides, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--sizes", nargs="+", default=["67M", "81M", "96M"], help="sizes of benchmarks/mlp.py"
    )
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=1, help="rows of 1,024 tokens per step")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--peak", type=float, default=H200_PEAK)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    steps = {
        name: step_of(spec, rows=options.rows, device=options.device, compiled=options.compile)
        for name, spec in specs(options.layers, options.sizes).items()
    }
    found = measure(steps, rows=options.rows, rounds=options.rounds, device=options.device, peak=options.peak)
    steps.clear()
    if options.device == "cuda":
        found = with_memory(found, layers=options.layers, rows=options.rows)
    about = {"layers": options.layers, "rows": options.rows, "compiled": str(options.compile)}
    publish([{**about, **row} for row in found], options.csv, device=options.device)


if __name__ == "__main__":
    main()
