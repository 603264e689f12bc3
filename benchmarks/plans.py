"""Is the way in which a layer chooses to multiply the fastest one? Every way, by turns, against the choice.

    python -m benchmarks.plans [--tokens 1 16 256 4096] [--rounds 9] [--device cpu]

One `mlp.c_fc` of GPT-2 small per shape. Training: forward and backward by either order of the factors, and by
forming the matrix. Inference: the same, and the matrix kept. `regret` is the time of what `auto` does over
that of the fastest; 1 is a perfect choice. What decides is the cost model of `model/layers/choice.py` and the
shape's `cheaper_order` (`OneToken.order_of` for one token); both can be forced (`mode`, `order`), and
`print(model)` shows them.
"""

import argparse
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from benchmarks.mlp import SHAPES, WIDTH
from benchmarks.table import publish
from model.algebra.shapes import Order
from model.config import Kron, LowRank
from model.layers.kronecker import KroneckerLinear
from model.layers.low_rank import LowRankLinear
from model.layers.structured import Mode, StructuredLinear
from pipeline.evaluate.turns import Spread, take_turns

HIDDEN = 4 * WIDTH
MORE = {
    "67M r=4": (32, 64, 4),
    "67M r=8": (32, 64, 8),
    "67M r=16": (32, 64, 16),
    "81M r=2": (768, 768, 2),
    "82M 2x2 r=2": (384, 1536, 2),
    "80M 3x3 r=2": (256, 1024, 2),
    "92M 3x3 r=4": (256, 1024, 4),
}
RANKS = (96, 307, 576)


def matrices() -> dict[str, Kron | LowRank]:
    """What may stand at `mlp.c_fc`."""
    found: dict[str, Kron | LowRank] = {}
    for name, (m1, n1, terms) in {**SHAPES, **MORE}.items():
        found[name] = Kron(m1=m1, n1=n1, m2=WIDTH // m1, n2=HIDDEN // n1, terms=terms)
    return found | {f"rank {rank}": LowRank(rank=rank) for rank in RANKS}


def layer_of(matrix: Kron | LowRank) -> StructuredLinear:
    """The layer, with all parameters zero."""
    if isinstance(matrix, Kron):
        return KroneckerLinear(matrix, WIDTH, HIDDEN, n_bias=HIDDEN)
    return LowRankLinear(matrix, WIDTH, HIDDEN, n_bias=HIDDEN)


def ways(layer: StructuredLinear, *, training: bool) -> dict[str, StructuredLinear]:
    """A copy of the layer for each way to multiply, `auto` first: what one prepares is its own."""

    def copy(mode: Mode, order: Order | Literal["auto"] = "auto") -> StructuredLinear:
        made = deepcopy(layer)
        made.mode = mode
        if isinstance(made, KroneckerLinear):
            made.order = order
        return made.train(training)

    found = {"auto": copy("auto"), "form": copy("materialize")}
    if isinstance(layer, KroneckerLinear):
        found |= {"a_first": copy("factored", "a_first"), "b_first": copy("factored", "b_first")}
    else:
        found["factored"] = copy("factored")
    return found if training else found | {"kept": copy("cached")}


def call(layer: StructuredLinear, x: Tensor, *, training: bool, half: bool) -> Callable[[], None]:
    """One product, with its gradients in training."""
    grad = torch.randn(len(x), HIDDEN, device=x.device)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            layer(x)

    def train() -> None:
        layer.zero_grad(set_to_none=True)
        rows = x.detach().requires_grad_()
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
            out = layer(rows)
        out.backward(grad.to(out.dtype))

    return train if training else infer


def main() -> None:
    """Time all, print and write the table, and the worst choices."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 256, 4096])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="longest time for one comparison")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, matrix in matrices().items():
        layer = layer_of(matrix).to(options.device)
        layer.init_weights(std=0.02, generator=torch.Generator().manual_seed(0))
        for tokens in options.tokens:
            for half in (dtype == "bf16" for dtype in options.dtypes):
                for training in (True, False) if tokens > 1 else (False,):
                    about = {"matrix": name, "of_dense": layer.cost.macs / (WIDTH * HIDDEN), "tokens": tokens}
                    about |= {"dtype": "bf16" if half else "fp32", "work": "train" if training else "infer"}
                    rows.append(about | compare(layer, tokens, training=training, half=half, options=options))
    worst = sorted(rows, key=lambda row: -cast("float", row["regret"]))
    publish(worst, options.csv, device=options.device)
    regrets = torch.tensor([row["regret"] for row in rows])
    near = (regrets <= 1.1).float().mean()
    print(f"{len(rows)} choices: {near:.0%} within 10 % of the fastest, the worst {regrets.max():.2f}")


def compare(
    layer: StructuredLinear, tokens: int, *, training: bool, half: bool, options: argparse.Namespace
) -> dict[str, str | float]:
    """Milliseconds of the choice, the fastest way and the regret."""
    x = torch.randn(tokens, WIDTH, device=options.device)
    layers = ways(layer, training=training)
    sides = {name: call(each, x, training=training, half=half) for name, each in layers.items()}
    for side in sides.values():
        side()
        side()
    took = take_turns(
        sides,
        rounds=options.rounds * max(1, 2048 // tokens),
        fewest=options.rounds,
        seconds=options.seconds,
        device=options.device,
    ).seconds
    medians = {name: Spread.quartiles(times).middle for name, times in took.items()}
    fastest = min((name for name in medians if name != "auto"), key=medians.__getitem__)
    # a ratio within each round, so that what else the machine does meets both
    regret = max(1.0, Spread.of_ratio(took["auto"], took[fastest]).middle)
    auto = layers["auto"]
    chosen = auto.resolve_mode(tokens) if training else _inferred(auto, tokens, half=half)
    return {"auto_ms": 1000 * medians["auto"], "auto": chosen, "fastest": fastest, "regret": regret}


def _inferred(layer: StructuredLinear, tokens: int, *, half: bool) -> str:
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
        return layer.resolve_mode(tokens)


if __name__ == "__main__":
    main()
