"""Tokenization by Ray Data against the same cores running bare tiktoken, on the same stored documents.

    python -m benchmarks.tokenization FILE… [--tokenizer FOLDER] [--megabytes 1000] [--rounds 3]
        [--encoder tiktoken]

The texts of the given files are repeated until there is enough of them (repeats are not dropped) and stored
as a corpus, which is not timed. `bare` is one process per core that reads files of the same parquet rows,
encodes with tiktoken and GPT-2's BPE and appends the ids to a file: no plan, no split, no digests. `krony` is
`krony prepare` from there, with its own encoder (`--encoder tiktoken`: the same as the other side): plan, Ray
Data tasks, shards with sidecars, the record. The sides take turns. What comes before the first document
(starting Ray; starting the processes) is timed by itself.
"""

import argparse
import json
import multiprocessing
import os
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.table import against, publish
from pipeline import stages
from pipeline.cluster import connect, session
from pipeline.config.load import load_study
from pipeline.data.corpora import documents, source_of
from pipeline.data.tokenizer import load_tokenizer
from pipeline.store.artifacts import Artifact
from pipeline.work import Work

if TYPE_CHECKING:
    import tiktoken

FILE_MB = 16
"""Text per file of the corpus: what one process of the bare side takes at a time."""


def write_corpus(files: list[str], folder: Path, *, megabytes: float) -> None:
    """The documents of `files`, over and over, as parquet files of about `FILE_MB` of text."""
    import pyarrow as pa

    study = load_study(None, overrides=["--corpus.name", "files", "--corpus.paths", json.dumps(files)])
    texts = [each.text for each in documents(source_of(study.first.corpus))]
    written, number, held, size = 0, 0, [], 0
    for text in cycle(texts):
        held.append(text)
        size += len(text.encode())
        if size >= FILE_MB * 1e6:
            pq.write_table(
                pa.table({"text": held}), folder / f"part-{number:05d}.parquet", row_group_size=256
            )
            written, number, held, size = written + size, number + 1, [], 0
            if written >= megabytes * 1e6:
                return


def bare(files: list[Path], tokenizer: Path, target: Path, *, cores: int) -> tuple[float, float, int]:
    """Seconds until every process is ready, seconds of the work, and tokens."""
    began = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(cores, initializer=_open, initargs=(tokenizer,)) as pool:
        pool.map(_ready, range(cores), chunksize=1)
        ready = time.perf_counter()
        counts = pool.starmap(_encode, [(path, target / path.name) for path in files], chunksize=1)
        done = time.perf_counter()
    return ready - began, done - ready, sum(counts)


_opened: "list[tiktoken.Encoding]" = []
"""The tokenizer of a process of the bare side."""


def _open(folder: Path) -> None:
    _opened.append(load_tokenizer(folder))


def _ready(_: int) -> None:
    time.sleep(0.5)  # so that each process gets one of these


def _encode(path: Path, target: Path) -> int:
    (encoding,), count = _opened, 0
    with target.open("wb") as file:
        for batch in pq.ParquetFile(path).iter_batches(columns=["text"]):
            for text in batch.column(0).to_pylist():
                ids = np.array([*encoding.encode_ordinary(text), encoding.eot_token], dtype=np.uint16)
                ids.tofile(file)
                count += len(ids)
    return count


def krony(work: Work) -> tuple[float, float, Artifact]:
    """Seconds of starting Ray, seconds of the stage, and the tokens."""
    began = time.perf_counter()
    with session(), connect(work.config.ray, quiet=True):
        ready = time.perf_counter()
        made = stages.tokens(work)
        done = time.perf_counter()
    return ready - began, done - ready, made


def main() -> None:
    """Both sides by turns; prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", help="texts: .txt, .jsonl, .parquet, also compressed")
    parser.add_argument("--tokenizer", default="", help="folder with GPT-2's vocab.bpe and encoder.json")
    parser.add_argument("--megabytes", type=float, default=1000.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-tokens", type=int, default=100_000_000, help="as in [data]")
    parser.add_argument("--encoder", default="auto", choices=["auto", "tiktoken"], help="as in [data]")
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="krony-bench-") as name:
        folder = Path(name)
        (folder / "text").mkdir()
        (folder / "bare").mkdir()
        write_corpus(
            [str(Path(file).resolve()) for file in options.files],
            folder / "text",
            megabytes=options.megabytes,
        )
        words = ["--corpus.name", "files", "--corpus.paths", json.dumps([str(folder / "text")])]
        words += ["--tokenizer.name", "gpt2", "--tokenizer.path", options.tokenizer, "--data.dedup", "false"]
        words += ["--data.shard-tokens", str(options.shard_tokens), "--data.encoder", options.encoder]
        study = load_study(None, overrides=[*words, "--store", str(folder / "store")])
        work = Work.on(study.first, quiet=True)
        with session():
            stages.corpus(work)
        tokenizer = stages.tokenizer(work).location.local_folder()
        files = sorted((folder / "text").iterdir())
        took: dict[str, list[float]] = {"bare": [], "krony": []}
        start: dict[str, list[float]] = {"bare": [], "krony": []}
        for number in range(options.rounds):
            for side in ("bare", "krony")[:: 1 if number % 2 == 0 else -1]:
                if side == "bare":
                    begin, seconds, tokens = bare(files, tokenizer, folder / "bare", cores=cores)
                else:
                    again = Work.on(study.first, force=frozenset({"tokens"} if number else ()), quiet=True)
                    begin, seconds, made = krony(again)
                    found = made.record.metrics
                    text = found["train_text_bytes"] + found["val_text_bytes"]
                    tokens = found["train_tokens"] + found["val_tokens"]
                took[side].append(seconds)
                start[side].append(begin)
                print(f"{side}: {tokens:,} tokens, {seconds:.1f} s, start {begin:.1f} s", flush=True)
        rows: list[dict[str, Any]] = [
            {
                "side": side,
                "MB": round(text / 1e6),
                "cores": cores,
                "start_s": float(np.median(start[side])),
                "tokens_per_s": tokens / float(np.median(times)),
                **against(np.array(took["bare"]), np.array(times)),
            }
            for side, times in took.items()
        ]
    publish(rows, options.csv)


if __name__ == "__main__":
    main()
