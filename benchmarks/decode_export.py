"""What a factored export is worth to who opens it with transformers: decode, prefill and bytes over dense.

    python -m benchmarks.decode_export [--shape 768 768] [--terms 1] [--batches 1 32] [--device cpu]

Random weights, the MLP matrices as Kronecker sums; both folders are opened by `AutoModelForCausalLM` and take
turns, token by token, in one process. The ratio of the medians, factored over dense, is what counts.
"""

import argparse
import json
import platform
import shutil
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch

from model.compress.kron_plan import KronChoice, with_kron_mlp
from model.config import GPT2Config, ModelSpec
from model.export import save_factored, save_stock
from model.gpt2 import GPT2
from pipeline.compress.folders import CODE, SOURCES
from pipeline.evaluate.turns import Decoding, Spread, take_turns


def write(folder: Path, options: argparse.Namespace) -> None:
    """Both folders of one random model."""
    width = options.width
    arch = GPT2Config(n_layer=options.layers, n_head=width // 64, n_embd=width)
    choice = KronChoice(shape=tuple(options.shape), terms=options.terms)
    model = GPT2(with_kron_mlp(ModelSpec.dense(arch), choice, terms=options.terms)).init_weights(seed=0)
    save_factored(model, folder / "factored")
    save_stock(model, folder / "dense")
    for name in CODE:
        shutil.copyfile(SOURCES / name, folder / "factored" / name)


def main() -> None:
    """Time both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=2, default=(768, 768), metavar=("M1", "N1"))
    parser.add_argument("--terms", type=int, default=1)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="sequences at once")
    parser.add_argument("--tokens", type=int, default=64, help="decoded per side and batch")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    import transformers

    transformers.logging.disable_progress_bar()
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name)
        write(folder, options)
        models = {
            side: transformers.AutoModelForCausalLM.from_pretrained(folder / side, trust_remote_code=True)
            .to(options.device)
            .eval()
            for side in ("factored", "dense")
        }
        sizes = {side: (folder / side / "model.safetensors").stat().st_size for side in models}
        for batch in options.batches:
            prompt = torch.randint(50257, (batch, 128), device=options.device)
            tokens, device = options.tokens, options.device
            steps = {side: Decoding(model, prompt, tokens=tokens) for side, model in models.items()}
            took = {"decode": take_turns(steps, rounds=tokens, device=device)}
            reads = {side: partial(model, prompt, logits_to_keep=1) for side, model in models.items()}
            took["prefill"] = take_turns(reads, rounds=max(3, tokens // 8), device=device)
            for kind, turns in took.items():
                median = {side: Spread.quartiles(times).middle for side, times in turns.seconds.items()}
                rows[f"{kind}@{batch}"] = {
                    **{f"{side}_ms": round(1000 * value, 3) for side, value in median.items()},
                    "ratio": round(median["factored"] / median["dense"], 3),
                }
    parameters = {side: sum(p.numel() for p in model.parameters()) for side, model in models.items()}
    place = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor()
    print(
        json.dumps(
            {
                "shape": [*options.shape, options.terms],
                "parameters": parameters,
                "bytes": sizes,
                "bytes_ratio": round(sizes["factored"] / sizes["dense"], 3),
                **rows,
                "device": place or options.device,
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
