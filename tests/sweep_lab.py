"""A tiny study to sweep over: an invented language, a trained teacher of two layers, without Ray.

    python tests/sweep_lab.py FOLDER        builds FOLDER/store and FOLDER/sweep.toml

The corpus artifact is a stand-in (nothing after it reads it); tokenizer, tokens and teacher are real.
"""

import json
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config.sweep import SweepStudy, load_sweep
from pipeline.data.shards import ShardWriter
from pipeline.data.tokenizer import tokenizer_json, train_bpe
from pipeline.work import Work

VOCAB = 300
BASE = """
name = "toy"
store = "store"

[corpus]
name = "files"
paths = ["WORDS"]

[tokenizer]
vocab_size = 300

[teacher]
n_layer = 2
n_head = 2
n_embd = 16
n_ctx = 32
[teacher.train]
max_steps = 30
batch_tokens = 256
seq_len = 32
lr = 1e-2
warmup_steps = 2
val_tokens = 1024
val_every = 30
device = "cpu"

[train]
max_steps = 16
batch_tokens = 128
seq_len = 32
lr = 1e-3
warmup_steps = 2
val_every = 4
val_tokens = 512
checkpoint_every = 4
log_every = 2
device = "cpu"

[eval]
device = "cpu"

[tracking]
uri = "off"

[method]
name = "kron_vl"
shape = [8, 8]
"""
AXES: Mapping[str, Any] = {"method.terms": [1, 2], "train.lr": [1e-3, 3e-3]}


def build(folder: Path, *, axes: Mapping[str, Any] = AXES, extra: str = "", **sweep: Any) -> SweepStudy:
    """A study below `folder` with its tokens in the store; `extra` is more TOML, `sweep` its settings."""
    (folder / "words.txt").write_text(words())
    study = write(folder, axes=axes, extra=extra, **sweep)
    config = study.first
    work = Work.on(config, quiet=True)
    with work.store.attempt(work.chain.corpus) as attempt:
        attempt.location.put_bytes("corpus.json", words().encode())
        attempt.publish(metrics={"documents": 1})
    with work.store.attempt(work.chain.tokenizer) as attempt:
        encoding = train_bpe([words()], vocab_size=VOCAB, name=work.chain.tokenizer.name)
        attempt.location.put_bytes("tokenizer.json", tokenizer_json(encoding))
        attempt.publish(metrics={"vocab_size": encoding.n_vocab, "eot": encoding.eot_token})
    with work.store.attempt(work.chain.tokens) as attempt:
        tokens = np.array(encoding.encode_ordinary(words()))
        for name, part in (("train-00000.bin", tokens[2000:]), ("val-00000.bin", tokens[:2000])):
            with ShardWriter(folder / name) as shard:
                shard.add(part)
            attempt.location.put_file(name, folder / name)
        attempt.publish(metrics={"tokens": len(tokens)})
    return study


def write(
    folder: Path,
    *,
    axes: Mapping[str, Any] = AXES,
    extra: str = "",
    origin: Path | None = None,
    **sweep: Any,
) -> SweepStudy:
    """Write `sweep.toml` over the same base; `stop` is a table, other settings of [sweep] as they are.

    `origin` is the folder of the text, where the store of `folder` is a copy of the one there.
    """
    stop = sweep.pop("stop", None)
    lines = [
        BASE.replace("WORDS", str((origin or folder) / "words.txt")),
        extra,
        "[sweep]",
        *(f"{key} = {json.dumps(value)}" for key, value in sweep.items()),
    ]
    if stop:
        lines += ["[sweep.stop]", *(f"{key} = {json.dumps(value)}" for key, value in stop.items())]
    lines += ["[sweep.axes]", *(f'"{path}" = {json.dumps(values)}' for path, values in axes.items())]
    path = folder / "sweep.toml"
    path.write_text("\n".join(lines) + "\n")
    return load_sweep(path)


def words() -> str:
    """A text with something to learn: each word limits the next one."""
    draw = random.Random(0)
    known = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 5))) for _ in range(60)]
    at, text = 0, []
    for _ in range(12_000):
        at = (at * 7 + draw.randint(0, 3)) % len(known)
        text.append(known[at])
    return " ".join(text)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
