"""The main job, corpus to table, as people type it, on a study so small that a run takes seconds.

The corpus is the documentation of one installed package, the model has one layer. What is made is the same
each time but for what holds times: histories hold speeds, checkpoints do not.
"""

import os
import sys
from pathlib import Path

DETERMINISTIC = ("corpus", "tokenizer", "init", "model", "scores")
"""Kinds whose payload holds no trace of when it was made."""

STUDY = """
name = "small"
[corpus]
packages = ["numpy"]
max_megabytes = 0.3
[tokenizer]
vocab_size = 300
[data]
validation_fraction = 0.2
[teacher]
n_layer = 1
n_head  = 2
n_embd  = 16
n_ctx   = 32
[teacher.train]
max_steps = 60
batch_tokens = 512
seq_len = 32
checkpoint_every = 5
val_tokens = 512
log_every = 5
[train]
max_steps = 20
batch_tokens = 512
seq_len = 32
checkpoint_every = 5
val_tokens = 512
log_every = 5
[method]
name = "kron_vl"
shape = [16, 16]
"""


def command(verb: str, folder: Path, *flags: str) -> list[str]:
    """Words of `krony verb` on the study, which is written into `folder`."""
    study = folder / "study.toml"
    study.write_text(STUDY)
    return [sys.executable, "-m", "jobs.cli", verb, str(study), *flags]


def surroundings() -> dict[str, str]:
    """Environment of such a command: one thread, no Ray to join, the project on its path."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | own
