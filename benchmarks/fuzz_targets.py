"""What fuzzing throws at krony: every reader of a file that others may have written, and how to spoil it.

A target has sound examples and a reader. The reader may take what it is given or raise an error that is made
for people (`KronyError`, `ModelError`); anything else is a bug of ours. `spoil` changes an example as damage
and malice do: bytes flipped, cut, doubled; JSON with a value of another kind, a name that leads out, nothing
where something was. `benchmarks/fuzz.py` runs all of it for as long as it is told, the tests a few of each.
"""

import gzip
import io
import json
import random
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zstandard

from analysis.comparison import comparison
from analysis.frames import load_frames
from analysis.tables import csv, terminal
from model.compress.contract import Stats
from model.compress.stats_file import load_stats, save_stats
from model.config import GPT2Config, Kron, ModelError, ModelSpec
from model.export import load_native, save_native, save_stock
from model.gpt2 import GPT2
from model.nanogpt import from_checkpoint, read_checkpoint, save_nanogpt
from model.pretrained import load_stock
from pipeline.config.load import load_study
from pipeline.config.sources import FilesCorpus
from pipeline.config.sweep import load_sweep
from pipeline.data.encoder import Encoder
from pipeline.data.files import LocalFiles
from pipeline.data.plan import PlannedShard, ShardPlan
from pipeline.data.rows import Range
from pipeline.data.shards import ShardWriter, Sidecar, open_shard
from pipeline.data.tables import Manifest, TextFile
from pipeline.data.tokenizer import encode_document, load_tokenizer, tokenizer_json, train_bpe
from pipeline.data.verify import split_documents
from pipeline.errors import KronyError
from pipeline.store.artifacts import Identity, Store
from pipeline.store.location import Location
from pipeline.tracking.jsonl import read_history
from pipeline.train.checkpoint import Checkpoints, CheckpointState

ALLOWED = (KronyError, ModelError)
PROJECT = Path(__file__).resolve().parents[1]
ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=8, n_ctx=8, vocab_size=20)
KRON = ModelSpec.dense(ARCH).with_matrices(
    {"h.0.mlp.c_fc": Kron(m1=4, n1=8, m2=2, n2=4, terms=2, scales=True)}
)


@dataclass(frozen=True)
class Target:
    """One reader and sound examples of what it reads."""

    name: str
    examples: tuple[bytes, ...] = field(repr=False)
    read: Callable[[bytes, Path], object]
    """Given the bytes and a folder of its own, which it may fill."""

    def takes(self, data: bytes, folder: Path) -> bool:
        """Whether it takes `data`; False where it refuses it as it should. Any other error comes out."""
        try:
            self.read(data, folder)
        except ALLOWED as err:
            line = err.line if isinstance(err, KronyError) else str(err)
            assert line, f"{self.name}: an error without a word"
            return False
        return True


# --- spoiling ---------------------------------------------------------------------------------------------

NASTY: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 0.5, -0.0, 1e308, 5e-324, "", "x", ".", "..",
    "../../x", "/etc/passwd", "a\\b", "a\x00b", "\x1b[31m", "²", "１", "NaN", "1e999", "$HOME", "${X}",
    "~nobody-at-all/x", "a" * 3000, "\ud800", [], {}, [[]], {"": 0}, ["../x"], {"kind": []}, [0] * 50,
)  # fmt: skip
RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"null",
    b"\xff\xfe", b"\x00", b"\n\n", b"=", b'"', b"'''", b"[[", b"]]", b"{", b"}", b"inf", b"nan",
)  # fmt: skip


def spoil(example: bytes, draw: random.Random) -> bytes:
    """One to four changes of `example`, of its JSON where it is some, or of its bytes."""
    data = example
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        try:
            is_json = draw.random() < 0.7 and data[:1] in (b"{", b"[")
            data = _spoil_json(json.loads(data), draw) if is_json else _spoil_bytes(data, draw)
        except (ValueError, RecursionError):
            data = _spoil_bytes(data, draw)
    return data


def _spoil_json(value: Any, draw: random.Random) -> bytes:
    holders: list[Any] = []

    def walk(each: Any) -> None:
        if isinstance(each, dict | list) and each:
            holders.append(each)
        for inner in each.values() if isinstance(each, dict) else each if isinstance(each, list) else ():
            walk(inner)

    walk(value)
    if not holders:
        return json.dumps(draw.choice(NASTY)).encode()
    holder = draw.choice(holders)
    key = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
    what = draw.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[str(draw.choice(NASTY))] = holder.pop(key)
    elif what == 2 and isinstance(holder, list):
        holder.append(holder[key])
    else:
        holder[key] = draw.choice(NASTY)
    return json.dumps(value).encode()


def _spoil_bytes(data: bytes, draw: random.Random) -> bytes:
    at, length = draw.randrange(len(data) + 1), draw.choice((1, 1, 2, 4, 16, 200))
    other = draw.randrange(len(data) + 1)
    head, taken, tail = data[:at], data[at : at + length], data[at + length :]
    flipped = bytes(each ^ (1 << draw.randrange(8)) for each in taken[:1]) + taken[1:]
    middle = (
        lambda: b"",
        lambda: taken * draw.choice((2, 3, 50)),
        lambda: draw.choice(RAW) + taken * draw.randrange(2),
        lambda: draw.randbytes(length),
        lambda: data[other : other + length] + taken,
        lambda: flipped,
    )
    return head + draw.choice(middle)() + tail if draw.random() < 0.9 else head


# --- targets ----------------------------------------------------------------------------------------------


def targets(folder: Path) -> dict[str, Target]:
    """All targets by name; their examples are made below `folder`."""
    made = [*_configs(), *_stores(folder), *_data(folder), *_models(folder), *_reports(folder)]
    return {target.name: target for target in made}


def _put(name: str, read: Callable[[Path], object]) -> Callable[[bytes, Path], object]:
    """A reader of one file of that name."""

    def take(data: bytes, folder: Path) -> object:
        (folder / name).write_bytes(data)
        return read(folder / name)

    return take


def _configs() -> list[Target]:
    paths = ["smoke.toml", "local/study.toml", "gpt2/krony-81m.toml", "base.toml"]
    examples = [(PROJECT / "configs" / name).read_bytes() for name in paths]
    sweeps = [(PROJECT / "configs" / "sweeps" / name).read_bytes() for name in ("shapes.toml", "smoke.toml")]
    flags = [
        b"--train.lr\n1e-3\n--seed=1\n--method.name\nsvd",
        b"--corpus.paths\n['a']\n--corpus\nfiles\n--store\n~/x",
    ]
    return [
        Target("config", tuple(map(_alone, examples)), _put("study.toml", load_study)),
        Target("sweep", tuple(map(_alone, sweeps)), _put("sweep.toml", load_sweep)),
        Target("flags", tuple(flags), lambda data, _: load_study(None, overrides=_words(data))),
    ]


def _alone(data: bytes) -> bytes:
    """A config without what it extends, which is not there."""
    return b"\n".join(line for line in data.splitlines() if b"extends" not in line)


def _words(data: bytes) -> list[str]:
    """One word per line; no word of a command line can hold a NUL."""
    return data.decode(errors="replace").replace("\0", "").split("\n")


def _stores(folder: Path) -> list[Target]:
    identity = Identity("run", "kron_vl-s0", {"train": {"lr": 1.0}}, {"init": Identity("init", "kron_vl")})
    store = Store(folder / "store")
    with store.attempt(identity) as attempt:
        attempt.location.put_bytes("model.safetensors", b"weights")
        attempt.location.put_bytes("deeper/metrics-00001.jsonl", b'{"step": 1}\n')
        attempt.publish(metrics={"val_loss": 3.5, "steps": 7}, settings={"name": "units"})
    payload = {key: attempt.location.read_bytes(key) for key in attempt.location.list()}
    record = _unsealed(store.root.read_bytes(f"{identity.address}/record.json"), "record.json")
    place = Location.of(folder / "run")
    state = CheckpointState(
        step=4, tokens=64, seed=0, fingerprint="f" * 64, train_loss=3.0, val_loss_initial=4.0, val_loss=3.0,
        probe=3.0, history=({"step": 2, "loss": 3.5}, {"step": 4, "loss": 3.0}),
    )  # fmt: skip
    tensors = {"wte.weight": torch.arange(6.0).reshape(2, 3)}
    Checkpoints(place, fingerprint="f" * 64, keep=1).save(state, weights=tensors, optimizer=tensors)
    saved = {key: place.read_bytes(key) for key in place.list()}
    manifest = next(key for key in saved if key.endswith(".json"))

    def read_record(data: bytes, own: Path) -> object:
        root = Store(own / "store")
        for key, content in payload.items():
            root.root.child(f"{identity.address}/{attempt.name}").put_bytes(key, content)
        root.root.put_bytes(f"{identity.address}/record.json", data)
        artifact = root.open(identity.address)
        found = [artifact.path(name) for name in artifact.record.files]
        assert all(path.is_relative_to(own) for path in found), "a record led out of its store"
        return root.records(), root.unfinished()

    def read_checkpoint_of(data: bytes, own: Path) -> object:
        for key, content in saved.items():
            Location.of(own).put_bytes(key, data if key == manifest else content)
        return Checkpoints(Location.of(own), fingerprint="f" * 64, keep=1).newest(on_skip=lambda _: None)

    rows = b'{"step": 1, "loss": 3.5}\n{"step": 2, "loss": "nan", "note": "x"}\n{"step": 2, "loss": 3}\n'
    return [
        Target("record", (record,), read_record),
        Target("checkpoint manifest", (saved[manifest],), read_checkpoint_of),
        Target(
            "history",
            (rows,),
            _put("metrics-00001.jsonl", lambda path: read_history(Location.of(path.parent))),
        ),
    ]


def _data(folder: Path) -> list[Target]:
    texts = [
        "the first document, with words",
        "a second one — ümlaut 漢字",
        "and a third one, longer than both of them",
    ] * 9
    encoding = train_bpe(texts, vocab_size=280)
    with ShardWriter(folder / "shard.bin") as shard:
        for text in texts:
            shard.add(encode_document(encoding, text))
    sidecar = Sidecar(
        shard="train-00000", plan="p" * 64, tokens=9, documents=2, text_bytes=70, sha256="0" * 64,
        source=(("documents-00000-000.parquet", 0, 2),),
    )  # fmt: skip
    manifest = Manifest(
        files=(TextFile(name="d-0.parquet", size_bytes=9, sha256="0" * 64, groups=((3, 70), (1, 9))),)
    )
    plan = ShardPlan(
        corpus="0" * 64, tokenizer="1" * 64, split="hash", validation_fraction=0.1, dedup=True,
        repeats="2" * 64, repeated=1, documents=4,
        shards=(PlannedShard(0, 0, (Range(0, 0, 3), Range(0, 3, 4)), 79),),
    )  # fmt: skip
    lines = "\n".join(json.dumps({"text": text, "id": i}) for i, text in enumerate(texts)).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts, "n": list(range(len(texts)))}), sink, row_group_size=5)
    stored = {
        "corpus .jsonl": ("a.jsonl", lines),
        "corpus .txt": ("a.txt", "\n\n".join(texts).encode()),
        "corpus .jsonl.gz": ("a.jsonl.gz", gzip.compress(lines, mtime=0)),
        "corpus .txt.zst": ("a.txt.zst", zstandard.ZstdCompressor().compress(lines)),
        "corpus .parquet": ("a.parquet", sink.getvalue().to_pybytes()),
    }

    def read_corpus(path: Path) -> object:
        source = LocalFiles(FilesCorpus(paths=(str(path),)))
        return [len(document.text) for part in source.partitions() for document in source.read(part)]

    def read_shard(path: Path) -> object:
        tokens = open_shard(path)
        return [int(np.sum(each)) for each in split_documents(tokens, vocabulary=280, eot=279, name="shard")]

    def read_tokenizer(path: Path) -> object:
        return Encoder(load_tokenizer(path.parent)).document("the first 漢字 — don't  stop\n")

    return [
        Target("shard", ((folder / "shard.bin").read_bytes(),), _put("shard.bin", read_shard)),
        Target("sidecar", (sidecar.to_json(),), lambda data, _: Sidecar.from_json(data, where="sidecar")),
        Target(
            "corpus manifest", (manifest.to_json(),), lambda data, _: Manifest.from_json(data, where="corpus")
        ),
        Target(
            "shard plan", (plan.to_json(),), lambda data, _: ShardPlan.from_json(data, where="plan").digest
        ),
        Target("tokenizer", (tokenizer_json(encoding),), _put("tokenizer.json", read_tokenizer)),
        *(Target(name, (data,), _put(file, read_corpus)) for name, (file, data) in stored.items()),
    ]


def _models(folder: Path) -> list[Target]:
    dense, kron = (GPT2(spec).init_weights(seed=0) for spec in (ModelSpec.dense(ARCH), KRON))
    save_native(kron, folder / "native")
    save_stock(dense, folder / "stock")
    save_nanogpt(dense, folder / "ckpt.pt")
    save_stats(
        Stats(tokens=8, sequences=2, sums={"row_fisher/h.0.mlp.c_fc": torch.ones(8)}), folder / "stats"
    )
    checkpoint = (folder / "ckpt.pt").read_bytes()
    with zipfile.ZipFile(io.BytesIO(checkpoint)) as archive:
        members = {each.filename: archive.read(each) for each in archive.infolist()}
    pickle = next(name for name in members if name.endswith("data.pkl"))

    def import_file(path: Path) -> object:
        return from_checkpoint(read_checkpoint(path), n_head=ARCH.n_head).num_parameters()

    def import_pickle(data: bytes, own: Path) -> object:
        with zipfile.ZipFile(own / "ckpt.pt", "w") as archive:
            for name, content in members.items():
                archive.writestr(name, data if name == pickle else content)
        return import_file(own / "ckpt.pt")

    def inside(source: str, name: str, load: Callable[[Path], object]) -> Target:
        files = {path.name: path.read_bytes() for path in (folder / source).iterdir()}

        def read(data: bytes, own: Path) -> object:
            for key, content in files.items():
                (own / key).write_bytes(data if key == name else content)
            return load(own)

        return Target(f"{source} {name}", (files[name],), read)

    return [
        inside("native", "config.json", load_native),
        inside("native", "model.safetensors", load_native),
        inside("stock", "config.json", load_stock),
        inside("stock", "model.safetensors", load_stock),
        inside("stats", "counts.json", load_stats),
        Target("torch checkpoint", (checkpoint,), _put("ckpt.pt", import_file)),
        Target("pickle of a checkpoint", (members[pickle],), import_pickle),
        Target("foreign safetensors", (_nanogpt_safetensors(dense),), _put("ckpt.safetensors", import_file)),
    ]


def _reports(folder: Path) -> list[Target]:
    """Tables of a study in which one file is spoiled; the study is invented, what holds it is real."""
    if (tests := str(PROJECT / "tests")) not in sys.path:
        sys.path.append(tests)
    invented = import_module("study_store")
    store: Store = invented.write_study(
        folder / "study", models=invented.MODELS[1:3], protocols=("krony/wt2",), context=256
    )
    kept = {key: store.root.read_bytes(key) for key in store.root.list()}

    def spoiled(name: str, ending: str, kind: str) -> Target:
        keys = [key for key in kept if key.startswith(f"{kind}/") and key.endswith(ending)]

        def read(data: bytes, own: Path) -> object:
            place = Store(own / "study")
            for key, content in kept.items():
                place.root.put_bytes(key, data if key == keys[-1] else content)
            frames = load_frames(place)
            return terminal(comparison(frames.arms)), csv(frames.scores), csv(frames.history)

        return Target(f"report {name}", (_unsealed(kept[keys[-1]], ending),), read)

    return [
        *(spoiled(f"{kind} record", "record.json", kind) for kind in ("scores", "run", "init")),
        spoiled("history", ".jsonl", "run"),
        spoiled("matrices", "report.json", "init"),
        spoiled("structure", "config.json", "init"),
    ]


def _unsealed(data: bytes, ending: str) -> bytes:
    """A record without its seal, which whoever writes one can renew; other files as they are."""
    return (
        json.dumps({k: v for k, v in json.loads(data).items() if k != "seal"}).encode()
        if "record" in ending
        else data
    )


def _nanogpt_safetensors(model: GPT2) -> bytes:
    from safetensors.torch import save

    from model.nanogpt import to_nanogpt

    state: Mapping[str, torch.Tensor] = to_nanogpt(model)[0]
    return save({name: value.clone() for name, value in state.items()})
