"""A small corpus of files on a store, prepared with the Ray transport replaced by a loop in this process.

What is replaced is only where a task runs; the tasks, the plan and the store are the real ones.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.chain import Chain, chain
from pipeline.config.schema import RayConfig, RunConfig
from pipeline.config.sources import BpeTokenizer, DataConfig, FilesCorpus
from pipeline.data import prepare
from pipeline.data.corpora import build_corpus
from pipeline.data.encode import Job
from pipeline.data.shards import Sidecar
from pipeline.data.tokenizer import build_tokenizer
from pipeline.store.artifacts import Artifact, Store


def write_corpus(folder: Path, documents: int = 240, repeats: int = 10) -> Path:
    """One .jsonl of documents of 60 to 300 words; the first `repeats` stand there twice."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [
        f"Document number {i}. " + " ".join(f"word{(i * 7 + k) % 97}" for k in range(60 + i))
        for i in range(documents)
    ]
    lines = [json.dumps({"text": text}) for text in [*texts, *texts[:repeats]]]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    return folder / "corpus.jsonl"


def config_of(corpus: Path, store: Path, **data: Any) -> RunConfig:
    """A run over that corpus with a small tokenizer and small shards."""
    settings = {"validation_fraction": 0.1, "shard_tokens": 40_000} | data
    return RunConfig(
        store=str(store),
        corpus=FilesCorpus(paths=(str(corpus),)),
        tokenizer=BpeTokenizer(vocab_size=400),
        data=DataConfig(**settings),
    )


class Prepared:
    """Corpus and tokenizer of a config on its store, and its tokens as often as asked for."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.store = config, Store(config.store)
        self.chain: Chain = chain(config)
        self.corpus = build_corpus(config.corpus, self.chain.corpus, self.store, ray=config.ray, quiet=True)
        self.tokenizer = build_tokenizer(config, self.chain.tokenizer, self.corpus, self.store)

    def tokens(self, **settings: Any) -> Artifact:
        """Prepare, or go on preparing."""
        return prepare.prepare_tokens(
            self.config.data,
            self.chain.tokens,
            self.corpus,
            self.tokenizer,
            self.store,
            ray=settings.pop("ray", RayConfig()),
            quiet=True,
            **settings,
        )


def in_process(patch: pytest.MonkeyPatch) -> list[int]:
    """Run tasks in this process; the list gathers the number of every shard that is made."""
    made: list[int] = []

    def loop(job: Job, rows: list[dict[str, Any]], *, at_once: int) -> Iterator[tuple[str, list[Sidecar]]]:
        for row in rows:
            made.append(json.loads(row["shard"])["index"])
            yield prepare._made(prepare._make(job, row))

    class NoRay:
        def __enter__(self) -> None:
            return None

        def __exit__(self, *_: object) -> None:
            return None

    patch.setattr(prepare, "_map", loop)
    patch.setattr(prepare, "connect", lambda *_, **__: NoRay())
    return made


def payload(artifact: Artifact) -> dict[str, bytes]:
    """Every file of an artifact."""
    return {key: artifact.path(key).read_bytes() for key in artifact.record.files}
