"""One training step of ours against the same step of nanoGPT, of transformers and of the original Krony-PT.

    python -m benchmarks.peers --nanogpt CHECKOUT [--krony-pt CHECKOUT] [--rows 1] [--rounds 6] [--sides …]

GPT-2 small's shape, rows of 1,024 random tokens, one process, sides by turns, two steps in a row of which
the second counts. Each peer brings its own model and its own optimizer (`configure_optimizers`), in the
precision and with or without the compiler as a side says; `-best` is its step with everything that torch
offers it (compiled, bf16, fused AdamW), which its own script does not use on a CPU. Nothing of a checkout is
changed or kept. A side with a name of ours is `krony-dense`, `krony-81M`, `krony-96M`; `-eager` and `-fp32`
are appended where that is meant. Ours keep freed memory, as our training loop does (`pipeline.allocator`).
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.table import against, publish
from benchmarks.training_step import CONTEXT, specs, step_of
from pipeline.allocator import keeping_memory
from pipeline.evaluate.turns import take_turns

VOCABULARY = 50257
ORIGINAL = {"81M": (768, 768), "95M": (384, 3072)}
"""`dim_1` and `dim_2` of Krony-PT's configurations."""


def load(checkout: Path, name: str) -> ModuleType:
    """`model.py` of a checkout, under a name of its own."""
    spec = importlib.util.spec_from_file_location(name, checkout / "model.py")
    if spec is None or spec.loader is None or not (checkout / "model.py").is_file():
        raise SystemExit(f"{checkout}: no model.py there; name a checkout of the repository")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def nanogpt(checkout: Path) -> nn.Module:
    """Its GPT-2 small, as its configuration for training GPT-2 has it, with GPT-2's vocabulary."""
    module = load(checkout, "peer_nanogpt")
    sizes = {"block_size": CONTEXT, "vocab_size": VOCABULARY, "n_layer": 12, "n_head": 12, "n_embd": 768}
    model: nn.Module = module.GPT(module.GPTConfig(**sizes, dropout=0.0, bias=True))
    return model


def krony_pt(checkout: Path, size: str) -> nn.Module:
    """The original's compressed GPT-2 of a size."""
    module = load(checkout, "peer_krony_pt")
    first, second = ORIGINAL[size]
    sizes = {"block_size": CONTEXT, "vocab_size": VOCABULARY, "n_layer": 12, "n_head": 12, "n_embd": 768}
    config = module.KronyGPTConfig(**sizes, dim_1=first, dim_2=second)
    model: nn.Module = module.KronyGPT(config)
    return model


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[..., Any], *, rows: int, half: bool
) -> Callable[[], None]:
    """A step as nanoGPT's script takes it; `loss(inputs, targets)` is the mean over tokens."""
    ids = torch.randint(VOCABULARY, (rows, CONTEXT + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def run() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            found = loss(inputs, targets)
        found.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def of_peer(model: nn.Module, *, rows: int, compiled: bool, half: bool, fused: bool) -> Callable[[], None]:
    """A step of nanoGPT or of what was made from it, with its own groups of parameters."""
    with redirect_stdout(StringIO()):
        optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), "cpu")  # type: ignore[operator]
    if fused:
        groups = [
            {name: group[name] for name in ("params", "weight_decay")} for group in optimizer.param_groups
        ]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward: Any = torch.compile(model) if compiled else model
    return step(model, optimizer, lambda x, y: forward(x, y)[1], rows=rows, half=half)


def of_transformers(*, rows: int, half: bool, compiled: bool) -> Callable[[], None]:
    """A step of transformers' GPT-2, without dropout, with its fused AdamW."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), fused=True)
    forward: Any = torch.compile(model) if compiled else model
    return step(
        model,
        optimizer,
        lambda x, y: torch.nn.functional.cross_entropy(forward(x).logits.flatten(0, 1).float(), y.flatten()),
        rows=rows,
        half=half,
    )


def build(side: str, options: argparse.Namespace) -> Callable[[], None]:
    """The step of a side, by its name."""
    compiled, half = not side.endswith(("-eager", "-fp32")), not side.endswith("-fp32")
    name = side.removesuffix("-eager").removesuffix("-fp32")
    if name.startswith("krony-pt-"):
        model = krony_pt(options.krony_pt, name.removeprefix("krony-pt-").removesuffix("-best"))
        fused = name.endswith("-best")
        return of_peer(model, rows=options.rows, compiled=compiled, half=half, fused=fused)
    if name.startswith("krony-"):
        size = name.removeprefix("krony-")
        spec = next(s for key, s in specs(12, [size]).items() if key.startswith(size))
        return step_of(spec, rows=options.rows, device="cpu", compiled=compiled, half=half).run
    if name.startswith("nanogpt"):
        return of_peer(
            nanogpt(options.nanogpt),
            rows=options.rows,
            compiled=compiled,
            half=half,
            fused=name.endswith("best"),
        )
    if name == "transformers":
        return of_transformers(rows=options.rows, half=half, compiled=compiled)
    raise SystemExit(f"side {side!r} is unknown; see the head of this file")


@contextmanager
def compiler() -> Iterator[None]:
    """Krony-PT tells the compiler to hide its failures; ours shall be seen."""
    import torch._dynamo

    before = torch._dynamo.config.suppress_errors  # noqa: SLF001
    try:
        yield
    finally:
        torch._dynamo.config.suppress_errors = before  # noqa: SLF001


def by_turns(runs: dict[str, Callable[[], None]], *, rounds: int) -> dict[str, Any]:
    """Seconds of every second of two steps, by rounds; only our sides keep freed memory, as our loop does."""
    names, took = list(runs), {name: [] for name in runs}
    for number in range(rounds):
        for place in range(len(names)):
            side = names[(number + place) % len(names)]
            ours = side.startswith("krony-") and not side.startswith("krony-pt-")
            with keeping_memory("cpu") if ours else nullcontext():
                took[side].append(float(take_turns({side: runs[side]}, rounds=2).seconds[side][-1]))
    return {name: np.array(seconds) for name, seconds in took.items()}


def main() -> None:
    """Time the sides by turns; the first one is the base of the ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nanogpt", type=Path, default=Path("nanoGPT"))
    parser.add_argument("--krony-pt", type=Path, default=Path("krony-PT"))
    parser.add_argument(
        "--sides",
        nargs="+",
        default=["nanogpt", "nanogpt-best", "nanogpt-fp32", "transformers-eager", "krony-dense"],
    )
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    runs: dict[str, Callable[[], None]] = {}
    for side in options.sides:
        with compiler():
            runs[side] = build(side, options)
        runs[side]()
        runs[side]()
        print(f"{side}: ready", flush=True)
    took = by_turns(runs, rounds=options.rounds)
    base = options.sides[0]
    rows = [
        {
            "side": side,
            "tokens_per_s": options.rows * CONTEXT / float(np.median(times)),
            **against(took[base], times),
        }
        for side, times in took.items()
    ]
    print(f"ratio: times as fast as {base}, by turns")
    publish(rows, options.csv)


if __name__ == "__main__":
    main()
