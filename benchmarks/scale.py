"""Gigabytes of text to tokens: the rate, and what driver, workers and Ray's object store hold meanwhile.

    python -m benchmarks.scale [--gb 0.2] [--texts GLOB] [--gpt2 FOLDER] [--workers 2] [--folder DIR]

A part of the text (`--copy-mb`, 100) is written as one parquet file of OpenWebText's layout and linked as
often as it takes, so 5 GB of text need its tokens on disk and nothing else. It is real text: JSON lines or
text files, or the documentation of the installed packages. Repeats are kept, or nothing would be left. The
tokens that come out are checked: those of one copy, counted in one thread, as often as there are links.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import psutil

from pipeline import stages
from pipeline.cluster import connect
from pipeline.config.schema import RayConfig, RunConfig
from pipeline.config.sources import (
    BpeTokenizer,
    DataConfig,
    FilesCorpus,
    Gpt2Tokenizer,
    OpenWebTextCorpus,
    PydocsCorpus,
)
from pipeline.data.corpora import documents, source_of
from pipeline.data.tables import TextFile, read_rows, write_documents
from pipeline.data.tokenizer import encode_document, load_tokenizer
from pipeline.store.location import Location
from pipeline.work import Work

TOKENS_PER_BYTE = 0.3
"""More than any text here has; for the check of free disk."""


@dataclass(frozen=True)
class Reading:
    """What is held at one moment; MB are resident."""

    seconds: float
    shards: int
    driver_mb: float
    worker_mb: float
    """The largest process that encodes."""
    ray_mb: float
    """All other processes of Ray together."""
    object_store_mb: float
    """Pages of shared memory that the object store ever used."""

    @staticmethod
    def take(begin: float, tokens: Path) -> "Reading":
        """Read it now; `tokens` is where shards appear."""
        me, worker, others, shared = psutil.Process(), 0.0, 0.0, 0.0
        for process in me.children(recursive=True):
            try:
                size, name = process.memory_info().rss / 1e6, " ".join(process.cmdline())
                if "raylet/raylet" in name:
                    shared += _shared_mb(process.pid)
            except psutil.NoSuchProcess:
                continue
            if name.startswith("ray::"):
                worker = max(worker, size)
            else:
                others += size
        shards = sum(1 for _ in tokens.glob("*/*/train-*.json"))
        return Reading(time.monotonic() - begin, shards, me.memory_info().rss / 1e6, worker, others, shared)


def _shared_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status")  # elsewhere than on Linux nothing is said
    lines = status.read_text().splitlines() if status.is_file() else []
    return sum(int(line.split()[1]) / 1e3 for line in lines if line.startswith("RssShmem:"))


def write_text(options: argparse.Namespace, folder: Path) -> TextFile:
    """The one file that is linked: the first `copy_mb` of the text."""
    named = FilesCorpus(paths=(options.texts,)) if options.texts else PydocsCorpus(packages=("python",))
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    files = write_documents(
        documents(source_of(named)),
        scratch=scratch,
        location=Location.of(folder),
        stem="text",
        limit_bytes=int(min(options.copy_mb, options.gb * 1e3) * 1e6),
    )
    return files[0]


def link(text: Path, folder: Path, copies: int) -> None:
    """`copies` hard links under the names of OpenWebText."""
    (folder / "plain_text").mkdir(parents=True)
    for number in range(copies):
        os.link(text, folder / "plain_text" / f"train-{number:05d}-of-{copies:05d}.parquet")


def one_thread(work: Work, text: Path, rows: int) -> tuple[int, float]:
    """Tokens of one copy, end-of-text tokens included, and seconds to encode them here."""
    encoding = load_tokenizer(stages.tokenizer(work).folder())
    begin = time.monotonic()
    count = sum(len(encode_document(encoding, row[0])) for row in read_rows(text, ["text"], stop=rows))
    return count, time.monotonic() - begin


def measure(work: Work, store: Path, options: argparse.Namespace) -> tuple[dict[str, float], list[Reading]]:
    """Build the tokens through Ray, and read what is held every few seconds."""
    readings: list[Reading] = []
    end = threading.Event()
    with connect(RayConfig(), quiet=True, num_cpus=options.workers):
        begin = time.monotonic()

        def watch() -> None:
            while not end.is_set():
                readings.append(Reading.take(begin, store / "tokens"))
                end.wait(options.every)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            artifact = stages.tokens(work)
        finally:
            end.set()
            watcher.join()
        seconds = time.monotonic() - begin
        readings.append(Reading.take(begin, store / "tokens"))
    metrics = artifact.record.metrics
    made = {
        "seconds": seconds,
        "tokens": metrics["train_tokens"] + metrics["val_tokens"],
        "text_bytes": metrics["train_text_bytes"] + metrics["val_text_bytes"],
        "shards": metrics["shards"],
        "payload_bytes": sum(file.bytes for file in artifact.record.files.values()),
    }
    return made, readings


def shown(readings: list[Reading], count: int = 14) -> Iterator[str]:
    """A table of at most so many of the readings, evenly, the last one always."""
    names = [field.name for field in fields(Reading)]
    yield "".join(f"{name:>17}" for name in names)
    step = max(1, len(readings) // count)
    for reading in [*readings[:-1:step], readings[-1]]:
        yield "".join(f"{getattr(reading, name):>17,.0f}" for name in names)


def scale(options: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One run in `folder`."""
    file = write_text(options, folder / "text")
    text = folder / "text" / file.name
    copies = max(1, round(options.gb * 1e9 / file.text_bytes))
    free = shutil.disk_usage(folder).free
    needed = 2 * TOKENS_PER_BYTE * copies * file.text_bytes
    if free < 1.2 * needed:
        raise SystemExit(f"{folder}: {free / 1e9:.1f} GB free, {1.2 * needed / 1e9:.1f} GB needed; --folder")
    link(text, folder / "corpus", copies)
    config = RunConfig(
        store=str(folder / "store"),
        corpus=OpenWebTextCorpus(repo=str(folder / "corpus")),
        tokenizer=Gpt2Tokenizer(path=options.gpt2) if options.gpt2 else BpeTokenizer(vocab_size=8192),
        data=DataConfig(split="hash", dedup=False, tokenize_workers=options.workers),
    )
    work = Work.on(config, quiet=False)
    begin = time.monotonic()
    stages.corpus(work)
    listing = time.monotonic() - begin
    count, alone = one_thread(work, text, file.documents)
    made, readings = measure(work, folder / "store", options)
    assert made["tokens"] == copies * count, f"{made['tokens']:,} tokens, expected {copies * count:,}"
    print("\n".join(shown(readings)))
    rate = made["tokens"] / made["seconds"]
    after = [reading.driver_mb for reading in readings if reading.shards]
    return {
        **made,
        "copies": copies,
        "listing_seconds": listing,
        "tokens_per_s": rate,
        "tokens_per_s_one_thread": count / alone,
        "over_one_thread": rate / (count / alone),
        "driver_mb_at_first_shard": after[0] if after else 0.0,
        "driver_mb_at_most": max(after, default=0.0),
        "object_store_mb_at_most": max(reading.object_store_mb for reading in readings),
        "workers": options.workers,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "versions": {
            name: importlib.metadata.version(name) for name in ("ray", "gigatoken", "tiktoken", "pyarrow")
        },
        "python": platform.python_version(),
        "readings": [asdict(reading) for reading in readings],
    }


def main() -> None:
    """Print the table and one line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gb", type=float, default=0.2, help="text, in 1e9 bytes")
    parser.add_argument("--copy-mb", type=float, default=100.0, help="text in the file that is linked")
    parser.add_argument("--texts", default="", help="files to take it from; empty takes Python's own pages")
    parser.add_argument("--gpt2", default="", help="folder with vocab.bpe and encoder.json; empty trains 8k")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two readings")
    parser.add_argument("--folder", type=Path, default=None, help="where to work; emptied at the end")
    parser.add_argument("--out", type=Path, help="write the JSON, with all readings, here")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="krony-scale-", dir=options.folder) as folder:
        result = scale(options, Path(folder))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    result.pop("readings")
    json.dump(result, sys.stdout)
    print()


if __name__ == "__main__":
    main()
