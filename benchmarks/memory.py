"""Memory of training: what each MLP keeps for its backward pass, and the peak of a whole step.

    python -m benchmarks.memory [--tokens 4096] [--layers 12] [--rows 2]

`kept` counts the bytes that autograd saves per token in one MLP of GPT-2 small's width, weights left out: a
property of the code, equal on every machine. `peak` is the resident memory that a fresh process adds by two
training steps of the whole model (weights, gradients, AdamW, activations), not compiled; only on Linux.
"""

import argparse
import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from benchmarks.mlp import SHAPES, WIDTH, Original, dense_mlp, kron_mlp
from benchmarks.table import publish
from benchmarks.training_step import specs, step_of
from pipeline.allocator import give_back, keeping_memory


@contextmanager
def saved(weights: list[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd saves in the block, by its address; not those of `weights`."""
    known = {each.untyped_storage().data_ptr() for each in weights}
    found: dict[int, Any] = {}
    bytes_of: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = tensor  # kept, so that no address comes twice
            bytes_of[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield bytes_of


def kept(mlp: nn.Module, tokens: int, *, half: bool) -> float:
    """Bytes per token that one MLP keeps, its input included."""
    x = torch.randn(tokens, WIDTH, requires_grad=True)
    with saved(list(mlp.parameters())) as found, torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        mlp(x)
    weights = (
        sum(2 * p.numel() for p in mlp.parameters()) if half else 0
    )  # autocast keeps bf16 copies of them
    return (sum(found.values()) - weights) / tokens


CLEAR = Path("/proc/self/clear_refs")
"""Writing here makes the peak of a process begin anew; Linux alone has it."""


def peak(size: str, *, layers: int, rows: int) -> float:
    """MB that two steps add to a process that has done a smaller step before."""
    warm = step_of(specs(1, [])["dense"], rows=1, device="cpu", compiled=False)
    warm.run()
    del warm
    gc.collect()
    give_back()
    CLEAR.write_text("5")
    before = psutil.Process().memory_info().rss
    spec = next(s for name, s in specs(layers, [size]).items() if name.startswith(size))
    step = step_of(spec, rows=rows, device="cpu", compiled=False)
    with keeping_memory("cpu"):  # as a training does
        step.run()
        step.run()
    lines = Path("/proc/self/status").read_text().splitlines()
    highest = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return (highest - before) / 1e6


def main() -> None:
    """Print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=2, help="rows of 1,024 tokens of the whole step")
    parser.add_argument(
        "--sizes", nargs="*", default=["dense", "67M", "81M", "96M"], help="of the whole step"
    )
    parser.add_argument("--peak", help="only measure this size (used by itself)")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.peak:
        print(peak(options.peak, layers=options.layers, rows=options.rows))
        return
    mlps = {"dense": dense_mlp()}
    for name, shape in SHAPES.items():
        mlps[name] = kron_mlp(*shape)
        mlps[f"original {name}"] = Original(kron_mlp(*shape))
    rows: list[dict[str, Any]] = []
    for name, mlp in mlps.items():
        row: dict[str, Any] = {"side": name}
        for dtype in ("fp32", "bf16"):
            row[f"kept_{dtype}"] = kept(mlp, options.tokens, half=dtype == "bf16")
        rows.append(row)
    for row in rows:
        for dtype in ("fp32", "bf16"):
            row[f"of_dense_{dtype}"] = row[f"kept_{dtype}"] / rows[0][f"kept_{dtype}"]
        size = str(row["side"]).split()[0]
        if size in options.sizes and CLEAR.exists():
            command = [sys.executable, "-m", "benchmarks.memory", "--peak", size]
            command += ["--layers", str(options.layers), "--rows", str(options.rows)]
            done = subprocess.run(command, capture_output=True, check=True, text=True)
            row["peak_MB"] = float(done.stdout.splitlines()[-1])
            row["peak_of_dense"] = row["peak_MB"] / rows[0].get("peak_MB", float("nan"))
    publish(rows, options.csv)


if __name__ == "__main__":
    main()
