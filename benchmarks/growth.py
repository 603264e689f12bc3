"""How the time per token grows with the width, with the number of terms and with the tokens of a step.

    python -m benchmarks.growth [--rounds 7] [--svg growth.svg]

One MLP, forward and backward, fp32, against the dense one by turns. Width: (C x C)(1 x 4), whose cost is C²
per token as dense's. Terms: the 67M shape with 1 to 16 of them. Tokens: the 81M shape, 64 to 16,384 tokens
per call. On two logarithmic axes powers are straight lines; the slope of each is fitted and printed.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from benchmarks.mlp import action
from benchmarks.table import publish
from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2
from pipeline.evaluate.turns import Spread, take_turns

WIDTHS = (256, 512, 768, 1024, 1280, 1600)
TERMS = (1, 2, 4, 8, 16)
TOKENS = (64, 256, 1024, 4096, 16_384)
USUAL = 2048


def mlp_of(width: int, shape: tuple[int, int] | None, terms: int = 1) -> nn.Module:
    """The MLP of a model of ours, dense without a shape."""
    arch = GPT2Config(n_layer=1, n_head=width // 64, n_embd=width, vocab_size=64, n_ctx=8)
    spec = ModelSpec.dense(arch)
    if shape is not None:
        spec = with_kron_mlp(spec, KronChoice(shape=shape, terms=terms), terms=terms)
    block: nn.Module = GPT2(spec).init_weights(seed=0).h[0].get_submodule("mlp")
    return block


def sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per axis, value and side."""
    cases: list[tuple[str, int, int, dict[str, nn.Module]]] = []
    for width in WIDTHS:
        sides = {"dense": mlp_of(width, None), "(C x C)(1 x 4)": mlp_of(width, (width, width))}
        cases.append(("width", width, USUAL, sides))
    for terms in TERMS:
        sides = {"dense": mlp_of(768, None), "(32 x 64)(24 x 48)": mlp_of(768, (32, 64), terms)}
        cases.append(("terms", terms, USUAL, sides))
    for tokens in TOKENS:
        sides = {"dense": mlp_of(768, None), "(768 x 768)(1 x 4)": mlp_of(768, (768, 768))}
        cases.append(("tokens", tokens, tokens, sides))
    rows: list[dict[str, Any]] = []
    for axis, value, tokens, mlps in cases:
        runs = {name: action(mlp, tokens, half=False, width=mlp_width(mlp)) for name, mlp in mlps.items()}
        for run in runs.values():
            run()
            run()
        rounds = options.rounds * max(1, 1024 // tokens)
        took = take_turns(runs, rounds=rounds, fewest=options.rounds, seconds=options.seconds).seconds
        for side, times in took.items():
            ratio = Spread.of_ratio(took["dense"], times)
            rows.append(
                {
                    "axis": axis,
                    "value": value,
                    "side": side,
                    "us_per_token": 1e6 * Spread.quartiles(times).middle / tokens,
                    "times_dense": ratio.middle,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )
    return rows


def mlp_width(mlp: nn.Module) -> int:
    """What goes in."""
    return int(mlp.get_submodule("c_fc").n_in)  # type: ignore[arg-type]


def slopes(rows: list[dict[str, Any]]) -> dict[tuple[str, str], tuple[float, float]]:
    """Exponent of each line, and the share of the spread that the line explains."""
    found = {}
    for axis, side in dict.fromkeys((row["axis"], row["side"]) for row in rows):
        mine = [row for row in rows if (row["axis"], row["side"]) == (axis, side)]
        x, y = (np.log([row[name] for row in mine]) for name in ("value", "us_per_token"))
        slope, start = np.polyfit(x, y, 1)
        spread = float(((y - y.mean()) ** 2).sum())
        left = float(((y - slope * x - start) ** 2).sum())
        found[axis, side] = float(slope), 1 - left / spread if spread else 1.0
    return found


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Three panels, time per token against each axis."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axes, axis in zip(figure.subplots(1, 3), ("width", "terms", "tokens"), strict=True):
        for side in dict.fromkeys(row["side"] for row in rows if row["axis"] == axis):
            mine = [row for row in rows if (row["axis"], row["side"]) == (axis, side)]
            x, y = ([row[name] for row in mine] for name in ("value", "us_per_token"))
            axes.loglog(x, y, marker="o", label=side, color="#888888" if side == "dense" else "#1f5fa8")
        axes.set_xticks([row["value"] for row in rows if row["axis"] == axis and row["side"] == "dense"])
        axes.set_xticklabels([f"{t:g}" for t in axes.get_xticks()], fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel({"width": "width C", "terms": "terms r", "tokens": "tokens per call"}[axis])
        axes.set_ylabel("µs per token, forward and backward")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Time all, print the table and the slopes, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=10.0, help="longest time for one comparison")
    parser.add_argument("--svg", type=Path)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    rows = sweep(options)
    publish(rows, options.csv)
    for (axis, side), (slope, explained) in slopes(rows).items():
        print(f"{axis:<8}{side:<22}time per token ~ {axis}^{slope:.2f}, R² {explained:.3f}")
    if options.svg:
        draw(rows, options.svg)


if __name__ == "__main__":
    main()
