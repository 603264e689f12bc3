"""Everything that waits for a GPU, in one command; no part is begun after eight minutes.

    python -m benchmarks.gpu --out gpu.json [--minutes 8] [--device cuda] [--layers 12]

First whether the layers are right there (fp32 without TF32 and bf16, against the dense matrix they stand for,
gradients too), then the MLP alone (S1, S2), one token (S3), whole training steps compiled and not, with the
share of the card's peak (S4, S5), attention and cross-entropy each in two ways, and decoding of an export
(S12). Plain torch, no Ray. `--device cpu --layers 1 --rows 1 --tokens 256 --rounds 1` tries the script.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import model.gpt2
from benchmarks import training_step
from benchmarks.mlp import SHAPES, WIDTH, action, dense_mlp, kron_mlp
from model.layers.structured import set_mode
from pipeline.evaluate.turns import Spread, take_turns

AGREE = {"fp32": 1e-4, "bf16": 3e-2}
"""Largest relative error against the materialised layers in fp32."""


def correctness(device: str) -> dict[str, Any]:
    """Relative error of output and gradients of every shape, and whether all are within `AGREE`."""
    found: dict[str, Any] = {}
    torch.backends.cuda.matmul.allow_tf32 = False
    for name, shape in SHAPES.items():
        mlp = kron_mlp(*shape).to(device)
        x = torch.randn(512, WIDTH, device=device)
        truth = _results(mlp, x, mode="materialize", half=False)
        for dtype in ("fp32", "bf16"):
            mine = _results(mlp, x, mode="factored", half=dtype == "bf16")
            errors = [float((a.float() - b).norm() / b.norm()) for a, b in zip(mine, truth, strict=True)]
            found[f"{name} {dtype}"] = max(errors)
            found["right"] = found.get("right", True) and max(errors) <= AGREE[dtype]
    return found


def _results(mlp: torch.nn.Module, x: torch.Tensor, *, mode: Any, half: bool) -> list[torch.Tensor]:
    set_mode(mlp, mode)
    mlp.zero_grad()
    rows = x.clone().requires_grad_()
    with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=half):
        out = mlp(rows)
    out.float().square().sum().backward()
    assert rows.grad is not None
    return [out.detach(), rows.grad, *(p.grad for p in mlp.parameters() if p.grad is not None)]


def mlps(device: str, *, tokens: int, compiled: bool, rounds: int) -> dict[str, Any]:
    """How many times as fast as the dense MLP each shape is, in bf16."""
    built = {"dense": dense_mlp(), **{name: kron_mlp(*shape) for name, shape in SHAPES.items()}}
    sides: dict[str, Callable[[], None]] = {}
    for name, mlp in built.items():
        run = torch.compile(mlp) if compiled else mlp
        sides[name] = action(run, tokens, half=True, device=device)  # type: ignore[arg-type]
    for run in sides.values():
        run()
        run()
    took = take_turns(sides, rounds=rounds, seconds=20.0, fewest=min(6, rounds), device=device).seconds
    return {name: _ratio(took["dense"], times) for name, times in took.items()}


def steps(device: str, *, layers: int, rows: int, compiled: bool, rounds: int) -> list[dict[str, Any]]:
    """Whole training steps of dense, 67M, 81M and 96M."""
    built = {
        name: training_step.step_of(spec, rows=rows, device=device, compiled=compiled)
        for name, spec in training_step.specs(layers, ["67M", "81M", "96M"]).items()
    }
    found = training_step.measure(
        built, rows=rows, rounds=rounds, device=device, peak=training_step.H200_PEAK
    )
    built.clear()
    return found if device == "cpu" else training_step.with_memory(found, layers=layers, rows=rows)


def two_ways(device: str, *, layers: int, rows: int, rounds: int) -> dict[str, Any]:
    """The dense step with flash or plain attention, and logits whole, in pieces of 2^27 (usual) or 2^24."""
    spec = training_step.specs(layers, [])["dense"]
    whole = training_step.step_of(spec, rows=rows, device=device, compiled=False)

    def plain() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            whole.run()

    def at_most(max_logits: int) -> None:
        usual = model.gpt2.chunked_cross_entropy_sum
        model.gpt2.chunked_cross_entropy_sum = partial(usual, max_logits=max_logits)
        try:
            whole.run()
        finally:
            model.gpt2.chunked_cross_entropy_sum = usual

    sides = {"usual": whole.run, "plain attention": plain}
    sides |= {"logits whole": partial(at_most, 2**40), "logits in small pieces": partial(at_most, 2**24)}
    for run in sides.values():
        run()
    took = take_turns(sides, rounds=rounds, seconds=20.0, fewest=min(6, rounds), device=device).seconds
    return {name: _ratio(took["usual"], times) for name, times in took.items()}


def decoding(device: str, *, layers: int) -> Any:
    """An exported model against dense ones, all opened by transformers, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "decode.csv"
        command = [sys.executable, "-m", "benchmarks.decode_export", "--device", device, "--tokens", "32"]
        command += ["--layers", str(layers), "--csv", str(table)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
        if done.returncode:
            return done.stderr[-2000:]
        with table.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def _ratio(above: Any, below: Any) -> dict[str, float]:
    found = Spread.of_ratio(above, below)
    return {
        "ms": 1000 * Spread.quartiles(below).middle,
        "times": found.middle,
        "low": found.low,
        "high": found.high,
    }


def main() -> None:
    """Run the parts in their order while there is time; write all that is known after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rows", type=int, default=32, help="rows of 1,024 tokens per training step")
    parser.add_argument("--tokens", type=int, default=16_384, help="tokens of the MLP alone")
    parser.add_argument("--rounds", type=int, default=20, help="most turns of a comparison")
    options = parser.parse_args()
    device, layers, rows, rounds = options.device, options.layers, options.rows, options.rounds
    many = f"MLP, {options.tokens:,} tokens"
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return
    parts: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(device),
        "step, compiled": lambda: steps(device, layers=layers, rows=rows, compiled=True, rounds=rounds),
        f"{many}, compiled": lambda: mlps(device, tokens=options.tokens, compiled=True, rounds=rounds),
        many: lambda: mlps(device, tokens=options.tokens, compiled=False, rounds=rounds),
        "MLP, one token": lambda: mlps(device, tokens=1, compiled=False, rounds=rounds),
        "decoding of an export": lambda: decoding(device, layers=layers),
        "step": lambda: steps(device, layers=layers, rows=rows, compiled=False, rounds=rounds),
        "two ways": lambda: two_ways(device, layers=layers, rows=rows, rounds=rounds),
    }
    place = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    found: dict[str, Any] = {"device": place, "torch": torch.__version__, "layers": layers, "rows": rows}
    began = time.perf_counter()
    for name, part in parts.items():
        if time.perf_counter() - began > 60 * options.minutes:
            found[name] = "no time left"
            continue
        start = time.perf_counter()
        try:
            found[name] = part()
        except Exception as err:  # noqa: BLE001 - the other parts are worth their time
            found[name] = f"failed: {type(err).__name__}: {err}"
        found.setdefault("seconds", {})[name] = round(time.perf_counter() - start, 1)
        options.out.write_text(json.dumps(found, indent=1))
        print(f"{name}: {found['seconds'][name]} s", flush=True)
    print(json.dumps(found, indent=1))
    if not (isinstance(found["correctness"], dict) and found["correctness"]["right"]):
        raise SystemExit("the layers are not right on this device: see `correctness`")


if __name__ == "__main__":
    main()
