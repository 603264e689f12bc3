"""What a factored export is worth to who opens it with transformers: decode, prefill and bytes over dense.

    python -m benchmarks.decode_export [--shape 768 768] [--terms 1] [--batches 1 32] [--device cpu]

Random weights, the MLP matrices as Kronecker sums, against GPT-2 itself and against a dense one of half of
its blocks (DistilGPT2's size). All folders are opened by `AutoModelForCausalLM` and take turns, token by
token, in one process. Ratios are over `dense`.
"""

import argparse
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.table import Row, against, publish
from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.export import save_factored, save_stock
from model.gpt2 import GPT2
from pipeline.compress.folders import CODE, SOURCES
from pipeline.evaluate.turns import Decoding, take_turns


def write(folder: Path, options: argparse.Namespace) -> None:
    """The folders of random models."""
    width = options.width
    arch = GPT2Config(n_layer=options.layers, n_head=width // 64, n_embd=width)
    choice = KronChoice(shape=tuple(options.shape), terms=options.terms)
    model = GPT2(with_kron_mlp(ModelSpec.dense(arch), choice, terms=options.terms)).init_weights(seed=0)
    save_factored(model, folder / "factored")
    for name in CODE:
        shutil.copyfile(SOURCES / name, folder / "factored" / name)
    save_stock(model, folder / "dense")
    half = GPT2Config(n_layer=max(1, options.layers // 2), n_head=width // 64, n_embd=width)
    save_stock(GPT2(ModelSpec.dense(half)).init_weights(seed=0), folder / "half of the blocks")


def main() -> None:
    """Time all and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 768), metavar=("M1", "N1"))
    parser.add_argument("--terms", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences at once")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per side and batch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    import transformers

    transformers.logging.disable_progress_bar()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        write(folder, options)
        models: dict[str, Any] = {
            side: transformers.AutoModelForCausalLM.from_pretrained(folder / side, trust_remote_code=True)
            .to(options.device)
            .eval()
            for side in ("dense", "factored", "half of the blocks")
        }
        sizes = {side: (folder / side / "model.safetensors").stat().st_size for side in models}
        for batch in options.batches:
            prompt = torch.randint(50257, (batch, 128), device=options.device)
            tokens, device = options.tokens, options.device
            steps = {side: Decoding(model, prompt, tokens=tokens) for side, model in models.items()}
            took = {"decode": take_turns(steps, rounds=tokens, device=device).seconds}
            reads = {side: partial(model, prompt, logits_to_keep=1) for side, model in models.items()}
            took["prefill"] = take_turns(reads, rounds=max(6, tokens // 8), device=device).seconds
            for kind, seconds in took.items():
                for side, times in seconds.items():
                    about = {
                        "side": side,
                        "what": f"{kind}@{batch}",
                        "of_bytes": sizes[side] / sizes["dense"],
                    }
                    rows.append({**about, **against(seconds["dense"], times)})
    publish(rows, options.csv, device=options.device)


if __name__ == "__main__":
    main()
