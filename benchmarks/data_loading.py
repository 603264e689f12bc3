"""How long a batch takes to be read, and how long it takes to read any batch of a run first.

    python -m benchmarks.data_loading [--tokens 9000000000] [--step-seconds …]

Shards of so many tokens are made as holes in files (they take no disk, and read as zeros from the same
memory map, so no disk is measured); rows of 1,024 tokens. `read` is one batch whose pages are in memory;
`resume` is opening every shard and reading the batch of a step in the middle of an epoch, in a
fresh process each time. The share is of a training step of `--step-seconds` for the same batch: by default
what one H200 would take for GPT-2 small at half of its peak, the hardest case. On CUDA the loop reads while
the device still works on the step before.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.table import publish
from pipeline.data.batches import Batches, TokenStream
from pipeline.data.shards import HEADER_BYTES, MAGIC, TOKEN_BYTES, VERSION

CONTEXT, SHARD = 1024, 100_000_000
WARM = 20
"""Batches that are read over and over, from memory after the first time."""

FLOPS_PER_TOKEN = 6 * (124e6 + 12 * 768 * 1024)
"""Of GPT-2 small, forward and backward, causal attention included."""

H200_HALF = 989e12 / 2


def write_shards(folder: Path, tokens: int) -> None:
    """Right headers over files without content."""
    for number, begin in enumerate(range(0, tokens, SHARD)):
        count = min(SHARD, tokens - begin)
        header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
        header[:3] = MAGIC, VERSION, count
        with (folder / f"train-{number:05d}.bin").open("wb") as file:
            file.write(header.tobytes())
            file.truncate(HEADER_BYTES + TOKEN_BYTES * count)


def open_batches(folder: Path, batch_tokens: int) -> Batches:
    """As training opens them."""
    stream = TokenStream(sorted(folder.glob("*.bin")))
    return Batches(stream, seq_len=CONTEXT, batch_tokens=batch_tokens, seed=0)


def main() -> None:
    """Make the shards, read, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=9_040_000_000, help="OpenWebText's, by GPT-2's BPE")
    parser.add_argument("--batch-tokens", type=int, default=491_520, help="nanoGPT's batch for GPT-2 small")
    parser.add_argument("--step-seconds", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--resume", type=Path, help="only open this folder and read one batch (used by itself)"
    )
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    if options.resume:
        began = time.perf_counter()
        batches = open_batches(options.resume, options.batch_tokens)
        batches.batch(batches.rows_per_epoch // batches.rows_per_batch // 2)
        print(time.perf_counter() - began)
        return
    step = options.step_seconds or FLOPS_PER_TOKEN * options.batch_tokens / H200_HALF
    with tempfile.TemporaryDirectory(prefix="krony-bench-") as name:
        folder = Path(name)
        write_shards(folder, options.tokens)
        command = [sys.executable, "-m", "benchmarks.data_loading", "--resume", name]
        resumed = [
            float(subprocess.run(command, capture_output=True, check=True, text=True).stdout)
            for _ in range(options.rounds)
        ]
        batches = open_batches(folder, options.batch_tokens)
        for number in range(WARM):
            batches.batch(number)
        reads = []
        for number in range(WARM * options.rounds):
            began = time.perf_counter()
            batches.batch(number % WARM)
            reads.append(time.perf_counter() - began)
    read = float(np.median(reads))
    publish(
        [
            {
                "tokens": options.tokens,
                "batch": options.batch_tokens,
                "read_ms": 1000 * read,
                "step_ms": 1000 * step,
                "share_of_step_%": 100 * read / step,
                "resume_s": float(np.median(resumed)),
                "resume_longest_s": max(resumed),
            }
        ],
        options.csv,
    )


if __name__ == "__main__":
    main()
