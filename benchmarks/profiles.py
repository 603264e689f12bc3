"""Where the time goes, operator by operator: one token of an MLP, its training pass, a whole training step.

    python -m benchmarks.profiles decode|mlp|step [--shapes dense 67M 81M 96M] [--dtype bf16] [--compile]

The sides of `benchmarks.mlp` (one token, or 4,096 forward and backward) and of `benchmarks.training_step`
(1,024 tokens, AdamW), each by itself, so that weights stay in cache if they fit. A row is an operator: how
often one run calls it and its own time, without what it calls, in the quickest of several profiles. `all` is
their sum, `run` what the quickest run takes with the profiler off: what `all` has beyond it is the profiler,
what `run` has beyond `all` is Python.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.mlp import SHAPES, WIDTH, action, dense_mlp, kron_mlp
from benchmarks.table import Row, publish
from benchmarks.training_step import specs, step_of
from pipeline.allocator import keeping_memory

TOKENS = {"decode": 1, "mlp": 4096}
RUNS = {"decode": 10, "mlp": 3, "step": 2}
"""Runs in each profile ..."""

PROFILES = {"decode": 40, "mlp": 3, "step": 2}
"""... and profiles, of which the quickest counts: a busy machine stops threads amid an operator."""


def sides(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], None]]]:
    """Name and action, made one by one: a whole model is dropped before the next."""
    half = options.dtype == "bf16"
    for wanted in options.shapes:
        name = next((each for each in SHAPES if each.startswith(wanted)), "dense")
        if options.what == "step":
            spec = specs(options.layers, [wanted])[name]
            yield wanted, step_of(spec, rows=1, device="cpu", compiled=options.compile, half=half).run
            continue
        mlp = dense_mlp() if name == "dense" else kron_mlp(*SHAPES[name])
        if options.compile:
            mlp = torch.compile(mlp)  # type: ignore[assignment]
        yield wanted, action(mlp, TOKENS[options.what], half=half, width=WIDTH)


def table(name: str, run: Callable[[], None], *, runs: int, profiles: int, top: int) -> list[Row]:
    """The `top` operators by their own time, and the sums, per run in microseconds."""
    for _ in range(3):
        run()
    took = []
    for _ in range(runs * profiles):
        began = time.perf_counter()
        run()
        took.append(time.perf_counter() - began)
    every = [_profiled(run, runs) for _ in range(profiles)]
    total, found = min(
        ((sum(each.self_cpu_time_total for each in one), one) for one in every), key=itemgetter(0)
    )
    found = sorted(found, key=lambda each: -each.self_cpu_time_total)
    rows: list[Row] = [
        {
            "side": name,
            "operator": each.key[:60],
            "calls": each.count / runs,
            "self_us": each.self_cpu_time_total / runs,
            "share": each.self_cpu_time_total / total,
        }
        for each in found[:top]
    ]
    calls = sum(each.count for each in found) / runs
    rows.append({"side": name, "operator": "all", "calls": calls, "self_us": total / runs, "share": 1.0})
    rows.append({"side": name, "operator": "run", "self_us": 1e6 * min(took)})
    return rows


def _profiled(run: Callable[[], None], runs: int) -> list[Any]:
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for _ in range(runs):
            run()
    return list(seen.key_averages())


def main() -> None:
    """Profile side after side, print and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(RUNS))
    parser.add_argument(
        "--shapes", nargs="+", default=["dense", "67M", "81M", "96M"], metavar="SIZE",
        choices=["dense", *(name.split()[0] for name in SHAPES)],
    )  # fmt: skip
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--layers", type=int, default=12, help="blocks of the model of a step")
    parser.add_argument("--top", type=int, default=10, help="operators of each side")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    rows: list[Row] = []
    with keeping_memory("cpu"):
        for name, run in sides(options):
            rows += table(
                name, run, runs=RUNS[options.what], profiles=PROFILES[options.what], top=options.top
            )
    publish(rows, options.csv)


if __name__ == "__main__":
    main()
