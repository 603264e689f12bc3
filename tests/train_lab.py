"""Tiny training runs for the tests: two layers of width 32, 300 tokens, a text that can be learned.

Also a script, one rank of `torchrun`, that makes one run after the other:

    python -m torch.distributed.run … tests/train_lab.py LAB RUN '{"max_steps": 8}' [RUN …]
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from model.config import GPT2Config, Kron, ModelSpec
from model.export import load_native, save_native
from model.gpt2 import GPT2
from pipeline.config.training import DistillConfig, TrainConfig
from pipeline.data.shards import ShardWriter
from pipeline.store.location import Location
from pipeline.train.request import FitRequest, FitResult

VOCAB = 300
ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=VOCAB)
UP = Kron(m1=16, n1=64, m2=2, n2=2, terms=2, scales=True)
SPECS = {
    "dense": ModelSpec.dense(ARCH),
    "kronecker": ModelSpec.dense(ARCH).with_matrices(
        {
            f"h.{i}.mlp.{name}": matrix
            for i in range(2)
            for name, matrix in (("c_fc", UP), ("c_proj", UP.transposed()))
        }
    ),
}
TRAIN = {
    "max_steps": 20, "batch_tokens": 96, "seq_len": 16, "micro_batch": 2, "lr": 3e-3, "warmup_steps": 4,
    "val_every": 10, "val_tokens": 120, "checkpoint_every": 10, "log_every": 5, "device": "cpu",
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What one call of `fit` gave."""

    result: FitResult
    rows: list[dict[str, float]]


@dataclass(frozen=True)
class Lab:
    """A folder with an initial model and shards."""

    folder: Path

    @staticmethod
    def build(folder: Path, *, model: str = "dense") -> "Lab":
        """Write everything that a run starts from."""
        (folder / "init").mkdir(parents=True)
        (folder / "tokens").mkdir()
        save_native(GPT2(SPECS[model]).init_weights(seed=1), folder / "init")
        save_native(GPT2(SPECS["dense"]).init_weights(seed=77), folder / "teacher")
        for name, seed, count in (("train-00000", 1, 900), ("train-00001", 2, 700), ("val-00000", 3, 150)):
            with ShardWriter(folder / "tokens" / f"{name}.bin") as shard:
                shard.add(text(seed, count))
        return Lab(folder)

    def request(
        self, run: Path, *, seed: int = 5, fingerprint: str = "f" * 64, **train: object
    ) -> FitRequest:
        """A request for a run below `run`; `train` overrides the tiny defaults, `distill` is a table."""
        distill = DistillConfig(**train.pop("distill", {}))
        config = TrainConfig(**{**TRAIN, **train}, distill=distill)
        return FitRequest(
            train=config,
            seed=seed,
            init=Location(str(self.folder / "init")),
            tokens=Location(str(self.folder / "tokens")),
            shards=("train-00000.bin", "train-00001.bin"),
            val_shards=("val-00000.bin",),
            run=Location(str(run)),
            fingerprint=fingerprint,
            teacher=Location(str(self.folder / "teacher")) if config.objective == "kd" else None,
        )

    def fit(self, request: FitRequest, *, stop_at: int | None = None) -> Outcome:
        """Train in this process; asked to stop once step `stop_at` was logged."""
        from pipeline.train.local import fit

        rows: list[dict[str, float]] = []

        def should_stop() -> bool:
            return stop_at is not None and bool(rows) and rows[-1]["step"] >= stop_at

        return Outcome(fit(request, on_log=lambda row: rows.append(dict(row)), should_stop=should_stop), rows)

    def weights(self, run: Path) -> dict[str, torch.Tensor]:
        """The published weights of a run."""
        return {name: p.detach() for name, p in load_native(run).named_parameters()}

    def launch(self, python: Callable[..., object], runs: Mapping[Path, object], *, ranks: int) -> object:
        """Runs one after the other under one `torchrun`: folder and settings of each."""
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks))
        each = (text for run, train in runs.items() for text in (str(run), json.dumps(train)))
        return python(*launcher, str(Path(__file__)), str(self.folder), *each)


def text(seed: int, count: int) -> np.ndarray:
    """Tokens of a noisy first-order chain over the vocabulary: predictable enough to learn from."""
    random = np.random.default_rng(seed)
    tokens = np.zeros(count, dtype=np.int64)
    for i in range(1, count):
        tokens[i] = (tokens[i - 1] * 7 + random.integers(0, 3)) % VOCAB
    return tokens


def main(argv: Sequence[str]) -> None:
    """One rank; rank 0 leaves its rows beside each run."""
    lab = Lab(Path(argv[0]))
    for run, train in zip(argv[1::2], argv[2::2], strict=True):
        outcome = lab.fit(lab.request(Path(run), **json.loads(train)))
        if outcome.rows:
            (Path(run) / "rows.json").write_text(json.dumps(outcome.rows))


if __name__ == "__main__":
    main(sys.argv[1:])
