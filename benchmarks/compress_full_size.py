"""Time and memory of every method on a GPT-2 small of realistic spectrum, each in a process of its own.

    python benchmarks/compress_full_size.py [NAME …] [--threads 2] [--folder FOLDER]

Weights are random with singular values k^-0.35 and norms like GPT-2's; where a file of true GPT-2 tensors is
named, its attention and positions are used. Statistics are invented too, with a decaying spectrum, one loud
coordinate and the null direction of a LayerNorm: what a method costs depends on their sizes, and a little on
how fast it converges on them. `before` is the memory of model and statistics, `peak` the most that was
held; on a busy machine trust the CPU seconds, over all threads, more than the clock.
"""

import argparse
import io
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from model.compress.at_budget import Track, recipes_at
from model.compress.budget import Budget
from model.compress.contract import Stats
from model.compress.kron_recipe import KronAct, KronActPerm, KronFisher, KronPerm, KronPrune, KronVL
from model.compress.methods import make_method, make_plan
from model.compress.named_budgets import NAMED_BUDGETS
from model.compress.recipe import MethodRecipe
from model.config import SIZES, ModelSpec
from model.export import load_native, save_native
from model.gpt2 import GPT2

DECAY = 0.35
CAP = NAMED_BUDGETS["B82"]
FIXED = ("kngpt2", "tqcompressor")
SHAPES: dict[str, MethodRecipe] = {
    "kron_vl 384x1536": KronVL(shape=(384, 1536)),
    "kron_vl 96M": KronVL(shape=(768, 1536)),
    "kron_vl 92M, 4 terms": KronVL(shape=(256, 1024), terms=4),
    "kron_vl 72M, 10 terms": KronVL(shape=(256, 64), terms=10),
    "kron_vl 67M": KronVL(shape=(32, 64)),
    "kron_prune 95M": KronPrune(),
    "kron_perm 384x1536": KronPerm(shape=(384, 1536)),
    "kron_perm 96M, 4 terms": KronPerm(shape=(384, 768), terms=4),
    "kron_fisher 384x1536": KronFisher(shape=(384, 1536)),
    "kron_fisher 72M, 10 terms": KronFisher(shape=(256, 64), terms=10),
    "kron_act 384x1536": KronAct(shape=(384, 1536)),
    "kron_act 96M": KronAct(shape=(768, 1536)),
    "kron_act 72M, 10 terms": KronAct(shape=(256, 64), terms=10),
    "kron_act_perm 96M": KronActPerm(shape=(768, 1536)),
}
"""Sizes and shapes beside the one that every method is given at 82M."""
TRUE_TENSORS = "data/weights/gpt2-small-wpe-h0attn.npz.xz"
STATISTICS = "stats.safetensors"


def spectral(generator: torch.Generator, rows: int, cols: int, *, norm: float) -> Tensor:
    """A random matrix (rows, cols) with singular values k^-0.35 and a Frobenius norm."""
    small, large = sorted((rows, cols))
    left, right = (
        torch.linalg.qr(torch.randn(size, small, generator=generator))[0] for size in (small, large)
    )
    values = torch.arange(1, small + 1).float() ** -DECAY
    matrix = (left * values) @ right.T * (norm / values.norm())
    return matrix if rows == small else matrix.T.contiguous()


def teacher(generator: torch.Generator, true_tensors: Path) -> GPT2:
    """GPT-2 small with such weights; true positions, LayerNorms and attention of block 0 where they are."""
    model = GPT2(ModelSpec.dense(SIZES["gpt2"])).init_weights(seed=0)
    with torch.no_grad():
        for block in model.h:
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                norm = 0.13 * (layer.n_in * layer.n_out) ** 0.5
                layer.weight.copy_(spectral(generator, layer.n_in, layer.n_out, norm=norm))
                layer.bias.normal_(std=0.1, generator=generator)
        if true_tensors.is_file():
            state = model.state_dict()
            with np.load(io.BytesIO(lzma.open(true_tensors).read())) as tensors:
                for name in tensors.files:
                    ours = name.removeprefix("transformer.")
                    if ours in state:
                        state[ours].copy_(torch.from_numpy(tensors[name]))
    return model.eval()


def statistics(generator: torch.Generator) -> dict[str, Tensor]:
    """Invented sums of one token and one sequence, for every weight matrix."""
    sums: dict[str, Tensor] = {}
    for site in ModelSpec.dense(SIZES["gpt2"]).sites():
        rows, cols, name = site.n_in, site.n_out, site.name
        x = _tokens(generator, rows)
        if not name.endswith("c_proj"):  # after a LayerNorm
            x -= x.mean(dim=1, keepdim=True)
        sums[f"gram/{name}"], sums[f"mean/{name}"] = x.T @ x / len(x), x.mean(dim=0)
        sums[f"abs_mean/{name}"] = x.abs().mean(dim=0)
        row, col = (torch.rand(size, generator=generator).double() ** 3 for size in (rows, cols))
        sums[f"row_fisher/{name}"], sums[f"col_fisher/{name}"] = row * col.sum(), col * row.sum()
        if ".mlp." in name:
            noise = torch.randn(rows, cols, generator=generator).double().exp()
            sums[f"full_fisher/{name}"] = row[:, None] * col * noise
        d = _tokens(generator, cols)
        sums[f"delta_gram/{name}"] = d.T @ d / len(d)
    for i in range(SIZES["gpt2"].n_layer):
        sums[f"block_influence/h.{i}"] = torch.tensor(0.9 - 0.02 * i, dtype=torch.float64)
    return sums


def _tokens(generator: torch.Generator, width: int) -> Tensor:
    """Rows with a decaying spectrum and one loud coordinate."""
    x = torch.randn(2 * width, width, generator=generator, dtype=torch.float64)
    x *= torch.arange(1, width + 1, dtype=torch.float64) ** -DECAY
    x[:, width // 2] *= 20
    return x


def recipes() -> dict[str, tuple[MethodRecipe, Budget]]:
    """Every method: at 82M on its tracks, or in its own structure; and Kronecker methods at other shapes."""
    spec, found = ModelSpec.dense(SIZES["gpt2"]), {}
    tracks: tuple[Track, ...] = ("M", "A")
    for track in tracks:
        for label, recipe, plan in recipes_at(spec, CAP, track=track):
            if not isinstance(plan, str):
                found[f"{label}, {track}"] = recipe, Budget(params=CAP)
            elif recipe.name in FIXED:
                found[label] = recipe, Budget()
    return found | {name: (recipe, Budget()) for name, recipe in SHAPES.items()}


def measure(folder: Path, name: str) -> dict[str, float]:
    """Compress once in this process: seconds, MB before and at the peak, mean energy kept."""
    recipe, budget = recipes()[name]
    model, stats = load_native(folder), None
    if recipe.needs:
        wanted = tuple(f"{need}/" for need in recipe.needs) + (("mean/",) if "gram" in recipe.needs else ())
        with safe_open(folder / STATISTICS, framework="pt") as held:
            keys = [key for key in held.keys() if key.startswith(wanted)]  # noqa: SIM118 - no mapping
            sums = {key: held.get_tensor(key).clone() for key in keys}
        stats = Stats(tokens=1, sequences=1, sums=sums)
    before = reset_peak_mb()
    began, used = time.perf_counter(), time.process_time()
    method = make_method(recipe)
    result = method.compress(model, make_plan(method, model, budget, stats), stats, seed=0)
    kept = [row.energy_kept for row in result.report]
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - used,
        "before_mb": before,
        "peak_mb": peak_mb(),
        "parameters": result.model.num_parameters(),
        "energy_kept": sum(kept) / len(kept) if kept else 1.0,
        "is_weights_only": float(not recipe.needs),
    }


def reset_peak_mb() -> float:
    """Start the count of the peak anew; returns what is held now, in MB. Linux only."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_mb()


def peak_mb() -> float:
    """The most memory that this process has held since, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def main() -> None:
    """Build the model once, then one child process per method, one line each."""
    known = recipes()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"some of: {'; '.join(known)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="keep the model here, and take it from here again")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(options.folder, options.child)))
        return
    if odd := [name for name in options.names if name not in known]:
        parser.error(f"no method {odd[0]!r}; choose from {'; '.join(known)}")
    with TemporaryDirectory(prefix="krony-") as scratch:
        folder = options.folder or Path(scratch)
        prepare(folder)
        run = runner(folder, options.threads)
        head = f"{'method':<28}{'needs':>9}{'parameters':>13}{'seconds':>9}{'CPU s':>8}"
        print(f"{head}{'before MB':>11}{'peak MB':>9}{'energy kept':>13}")
        for name in options.names or known:
            row = run(name)
            print(
                f"{name:<28}{'weights' if row['is_weights_only'] else 'data':>9}{row['parameters']:>13,.0f}"
                f"{row['seconds']:>9.1f}{row['cpu_seconds']:>8.1f}{row['before_mb']:>11,.0f}"
                f"{row['peak_mb']:>9,.0f}{row['energy_kept']:>13.3f}",
                flush=True,
            )


def prepare(folder: Path) -> None:
    """Write model and statistics, unless they are there."""
    if (folder / STATISTICS).is_file():
        return
    generator = torch.Generator().manual_seed(0)
    shared = Path(os.environ.get("KRONY_SHARED", "shared"))
    save_native(teacher(generator, shared / TRUE_TENSORS), folder)
    save_file(statistics(generator), folder / STATISTICS)


def runner(folder: Path, threads: int) -> Callable[[str], dict[str, float]]:
    """A function that measures one method in a fresh process."""

    def run(name: str) -> dict[str, float]:
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        done = subprocess.run(
            [*command, "--threads", str(threads)], check=True, capture_output=True, text=True
        )
        row: dict[str, float] = json.loads(done.stdout)
        return row

    return run


if __name__ == "__main__":
    main()
