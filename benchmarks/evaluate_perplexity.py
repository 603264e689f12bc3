"""What `krony eval` is worth beside the usual loop over windows with transformers, in turns.

    python -m benchmarks.evaluate_perplexity [--shape 768 768] [--windows 4] [--batch 1] [--device cpu]

Random weights of GPT-2's shape and random tokens. Sides: the loop that everybody writes (a window, `labels`,
`loss`), and ours on the same dense weights and on a compressed model that was never dense, in fp32 and bf16.
Every round is the whole text; ratios are to the loop of equal precision, round by round. The losses of the
dense sides, beside them, must agree.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.table import against, publish
from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.export import save_stock
from model.gpt2 import GPT2
from pipeline.evaluate.perplexity import aggregate, token_losses, windows
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.sequences import TokenSequence
from pipeline.evaluate.turns import take_turns


def transformers_loop(model: Any, ids: np.ndarray, length: int, *, half: bool) -> Callable[[], float]:
    """The mean over windows of the loss that the model itself returns, one window at a time."""
    device = next(model.parameters()).device

    def run() -> float:
        losses = []
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            for begin in range(0, len(ids), length):
                window = torch.from_numpy(ids[begin : begin + length])[None].to(device)
                losses.append(float(model(window, labels=window).loss))
        return statistics.mean(losses)

    return run


def ours(model: GPT2, sequence: TokenSequence, *, batch: int, half: bool) -> Callable[[], float]:
    """The loss of our protocol with the same meaning."""
    protocol = get_protocol("krony/wt103").at_precision("bf16" if half else "fp32")
    plan = windows(len(sequence.ids), protocol)
    device = next(model.parameters()).device

    def run() -> float:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
            losses = token_losses(model, sequence.ids, plan, batch=batch)
        return aggregate(losses, protocol, sequence, plan).loss

    return run


def main() -> None:
    """Time all sides and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 768), metavar=("M1", "N1"))
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1, help="windows per forward pass, ours")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    import transformers

    transformers.logging.disable_progress_bar()
    arch = GPT2Config(n_layer=options.layers)
    dense = GPT2(ModelSpec.dense(arch)).init_weights(seed=0).to(options.device)
    choice = KronChoice(shape=tuple(options.shape), terms=1)
    small = (
        GPT2(with_kron_mlp(ModelSpec.dense(arch), choice, terms=1)).init_weights(seed=0).to(options.device)
    )
    with tempfile.TemporaryDirectory() as folder:
        save_stock(dense, Path(folder))
        stock = transformers.AutoModelForCausalLM.from_pretrained(folder).to(options.device).eval()
    ids = np.random.default_rng(0).integers(0, arch.vocab_size, options.windows * arch.n_ctx)
    sequence = TokenSequence("random", ids, np.ones(arch.vocab_size, dtype=np.int64), "0" * 64, None)
    sides = {}
    for name, half in (("fp32", False), ("bf16", True)):
        sides[f"transformers {name}"] = transformers_loop(stock, ids, arch.n_ctx, half=half)
        sides[f"dense {name}"] = ours(dense, sequence, batch=options.batch, half=half)
        sides[f"compressed {name}"] = ours(small, sequence, batch=options.batch, half=half)
    losses = {name: round(run(), 6) for name, run in sides.items()}  # warms up as well
    took = take_turns(sides, rounds=options.rounds, device=options.device).seconds
    pairs = [(name, f"transformers {name.split()[1]}") for name in sides]
    pairs.append(("dense bf16", "transformers fp32"))
    rows = [
        {
            "side": name,
            "against": base,
            "tokens": len(ids),
            "loss": losses[name],
            **against(took[base], took[name]),
        }
        for name, base in pairs
    ]
    publish(rows, options.csv, device=options.device)


if __name__ == "__main__":
    main()
