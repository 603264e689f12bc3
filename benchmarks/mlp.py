"""The MLP of a compressed block against the dense one: forward and backward, or one token, by turns.

    python -m benchmarks.mlp [--tokens 4096 16 1] [--dtypes fp32 bf16] [--device cpu] [--csv mlp.csv]

Width 768, 4,096 tokens unless said. Sides, in one process and in turns: `dense` (two `nn.Linear` and torch's
GELU), each shape as our models run it, `kept` (the same multiplied out beforehand, for one token), and
`original`, which forms the product of the factors with `torch.kron` on every call, as Krony-PT does. bf16 is
autocast, as in training. With one token only the forward pass is timed. Prints, and writes as CSV, how many
times as fast as `dense` each is: the median over rounds with its 95 % interval.
"""

import argparse
from collections.abc import Callable
from functools import reduce
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.table import Row, against, publish
from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2
from model.layers.structured import set_mode
from pipeline.evaluate.turns import take_turns

WIDTH = 768
SHAPES = {
    "67M (32x64)(24x48)": (32, 64, 1),
    "81M (768x768)(1x4)": (768, 768, 1),
    "82M (384x1536)(2x2)": (384, 1536, 1),
    "96M (768x1536)(1x2)": (768, 1536, 1),
    "95M (384x3072)(2x1)": (384, 3072, 1),
    "72M (256x64)(3x48) r=10": (256, 64, 10),
}
"""First factor of `mlp.c_fc` and terms, by the size of the GPT-2 that they make."""


def dense_mlp() -> nn.Module:
    """Up, GELU, down, as everybody writes it."""
    return nn.Sequential(
        nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(approximate="tanh"), nn.Linear(4 * WIDTH, WIDTH)
    )


def kron_mlp(m1: int, n1: int, terms: int) -> nn.Module:
    """The MLP of a model of ours."""
    arch = GPT2Config(n_layer=1, n_head=12, n_embd=WIDTH, vocab_size=64, n_ctx=8)
    spec = with_kron_mlp(ModelSpec.dense(arch), KronChoice(shape=(m1, n1), terms=terms), terms=terms)
    block: nn.Module = GPT2(spec).init_weights(seed=0).h[0].get_submodule("mlp")
    return block


class Original(nn.Module):
    """Krony-PT's way: the product of the factors anew on each call, then the dense MLP."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.up, self.down = mlp.get_submodule("c_fc"), mlp.get_submodule("c_proj")

    def forward(self, x: Tensor) -> Tensor:
        """(N, C) -> (N, C)."""
        hidden = F.gelu(F.linear(x, self._formed(self.up).mT, self.up.bias), approximate="tanh")
        return F.linear(hidden, self._formed(self.down).mT, self.down.bias)

    @staticmethod
    def _formed(layer: nn.Module) -> Tensor:
        pairs = zip(layer.left, layer.right, strict=True)
        return reduce(torch.add, (torch.kron(a.contiguous(), b.contiguous()) for a, b in pairs))


def action(
    mlp: nn.Module, tokens: int, *, half: bool, device: str = "cpu", width: int = WIDTH
) -> Callable[[], None]:
    """One training pass over so many tokens, or one forward pass of a single one."""
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device)
    grad = torch.randn(tokens, width, generator=torch.Generator().manual_seed(1)).to(device)
    mlp.to(device)

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            mlp(x)

    def train() -> None:
        mlp.zero_grad(set_to_none=True)
        rows = x.requires_grad_()
        rows.grad = None
        with torch.autocast(device, dtype=torch.bfloat16, enabled=half):
            out = mlp(rows)
        out.backward(grad.to(out.dtype))

    mlp.train(tokens > 1)
    return infer if tokens == 1 else train


def sides_at(tokens: int) -> dict[str, nn.Module]:
    """Every MLP that takes part."""
    sides = {"dense": dense_mlp()}
    for name, shape in SHAPES.items():
        mlp = kron_mlp(*shape)
        sides[name] = mlp
        sides[f"original {name}"] = Original(mlp)
        if tokens == 1:
            sides[f"kept {name}"] = kron_mlp(*shape)
            set_mode(sides[f"kept {name}"], "cached")
    return sides


def main() -> None:
    """Time all, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16, 1])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--only", default="", help="sides whose name has this in it; dense is always there")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    for tokens in options.tokens:
        for dtype in options.dtypes:
            mlps = sides_at(tokens)
            sides = {
                name: action(mlp, tokens, half=dtype == "bf16", device=options.device)
                for name, mlp in mlps.items()
                if name == "dense" or options.only in name
            }
            for run in sides.values():
                run()
                run()
            rounds = options.rounds if tokens > 1 else 50 * options.rounds
            took = take_turns(sides, rounds=rounds, device=options.device).seconds
            for name, times in took.items():
                rows.append({"tokens": tokens, "dtype": dtype, "side": name, **against(took["dense"], times)})
    publish(rows, options.csv, device=options.device)


if __name__ == "__main__":
    main()
