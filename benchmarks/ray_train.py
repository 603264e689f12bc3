"""What Ray Train costs beside the plain loop: per step and per start.

    python -m benchmarks.ray_train [--steps 120] [--rounds 3] [--width 256] [--layers 4]

The same training (one process, the same step, no compiler) once by `pipeline.train.local` and once by
`pipeline.train.distributed` with one worker of as many threads, by turns, each in its own run. Steady state
is the median time between the rows of two logged steps, after the first ones; the start is the time from the
call to the first row, less as many of those steps. Ray itself is started beforehand, and timed apart.
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.table import against, publish
from benchmarks.train_loop import prepare
from pipeline.cluster import connect
from pipeline.config.schema import RayConfig
from pipeline.config.training import TrainConfig
from pipeline.store.location import Location
from pipeline.train import distributed, local
from pipeline.train.request import FitRequest, Row

EVERY = 5
"""Steps between two rows."""

WARM = 4
"""Rows left out at the beginning."""


def request(folder: Path, options: argparse.Namespace) -> FitRequest:
    """The random model and shards of `train_loop`, trained for so many steps with a row every few."""
    prepared = prepare(folder, options)
    train = TrainConfig(
        batch_tokens=options.batch_tokens,
        micro_batch=options.batch_tokens // prepared.train.seq_len,
        max_steps=options.steps,
        log_every=EVERY,
        val_every=options.steps,
        val_tokens=4096,
        checkpoint_every=options.steps,
        device=options.device,
    )
    return dataclasses.replace(prepared, train=train)


def timed(side: str, asked: FitRequest, *, threads: int) -> tuple[float, np.ndarray]:
    """Seconds before the first step, and seconds per step between rows."""
    rows: list[tuple[int, float, float]] = []
    began = time.perf_counter()

    def on_log(row: Row) -> None:
        rows.append((int(row["step"]), float(row.get("tokens_per_s", np.nan)), time.perf_counter()))

    if side == "plain":
        local.fit(asked, on_log=on_log, should_stop=lambda: False)
    else:
        config = RayConfig(workers=1, cpus_per_worker=threads)
        distributed.fit(asked, config, on_log=on_log, should_stop=lambda: False)
    # the rate in a row was measured where the step was made, from the row before
    seconds = np.array(
        [asked.train.batch_tokens / rate for step, rate, _ in rows if step and np.isfinite(rate)]
    )
    first_step, _, first_at = next(row for row in rows if row[0] > 0)
    steady = seconds[WARM:]
    return first_at - began - first_step * float(np.median(steady)), steady


def main() -> None:
    """Both sides by turns; prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("steps", 120),
        ("rounds", 6),
        ("layers", 4),
        ("width", 256),
        ("vocabulary", 8192),
        ("batch-tokens", 4096),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--csv", type=Path)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    os.environ["OMP_NUM_THREADS"] = str(threads)  # Ray gives a worker as many as it has CPUs, unless told
    starts: dict[str, list[float]] = {"plain": [], "ray": []}
    steps: dict[str, list[float]] = {"plain": [], "ray": []}
    with tempfile.TemporaryDirectory(prefix="krony-bench-") as name:
        asked, number = request(Path(name), options), 0
        began = time.perf_counter()
        with connect(RayConfig(), quiet=True, num_cpus=threads):
            up = time.perf_counter() - began
            for turn in range(2 * options.rounds):
                side = ("plain", "ray", "ray", "plain")[turn % 4]
                number += 1
                fresh = dataclasses.replace(asked, run=Location(str(Path(name) / f"run-{number}")))
                start, steady = timed(side, fresh, threads=threads)
                starts[side].append(start)
                steps[side].append(float(np.median(steady)))
                print(f"{side}: start {start:.2f} s, step {1000 * steps[side][-1]:.2f} ms", flush=True)
    base = np.array(steps["plain"])
    rows = [
        {
            "side": side,
            "threads": threads,
            "start_s": float(np.median(starts[side])),
            "ray_up_s": up if side == "ray" else 0.0,
            **against(base, np.array(found)),
        }
        for side, found in steps.items()
    ]
    publish(rows, options.csv)


if __name__ == "__main__":
    main()
