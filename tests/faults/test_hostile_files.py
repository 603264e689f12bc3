"""Files of others: what would run code, lead out of its place or grow without end is refused in a line."""

import gzip
import io
import json
import lzma
import os
import pickle
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zstandard

from jobs import cli
from model.config import GPT2Config, ModelError, ModelSpec
from model.export import load_native, save_native, save_stock
from model.nanogpt import from_checkpoint, read_checkpoint, to_nanogpt
from model.pretrained import load_stock
from pipeline.chain import chain
from pipeline.compress.teacher import import_teacher
from pipeline.config.load import load_study
from pipeline.config.sources import FilesCorpus
from pipeline.data import files
from pipeline.data.corpora import documents, source_of
from pipeline.data.documents import CorpusError
from pipeline.data.tokenizer import TokenizerError, load_tokenizer
from pipeline.errors import CompressError, KronyError, StoreError
from pipeline.evaluate.texts import read_text
from pipeline.store.artifacts import Identity, Store
from pipeline.store.copies import node_cache

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=61, activation="gelu")


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


# --- code -----------------------------------------------------------------------------------------------


def old_format(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def tar_format(content: object, path: Path) -> None:
    data = pickle.dumps(content)
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("write", [torch.save, old_format, tar_format], ids=["zip", "old", "tar"])
@pytest.mark.parametrize("name", ["ckpt.pt", "ckpt.safetensors", "ckpt.bin"])
def test_no_way_to_write_a_checkpoint_runs_its_code(tmp_path, capsys, write, name):
    proof = tmp_path / "proof"
    write({"model": Hostile(proof)}, tmp_path / name)
    assert cli.main(["import", str(tmp_path / name), "--out", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not proof.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"])
def test_a_teacher_folder_gives_tensors_alone(toy, tmp_path, name):
    proof, folder = tmp_path / "proof", tmp_path / "teacher"
    save_stock(toy(ModelSpec.dense(ARCH)), folder)
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    torch.save(Hostile(proof), folder / name)
    if name.endswith(".json"):  # shards that lead out of the folder
        (folder / name).write_text(json.dumps({"weight_map": {"wte.weight": "../outside.safetensors"}}))
    config = load_study(None, overrides=["--teacher.name", "hub", "--teacher.id", str(folder)]).first
    with pytest.raises(CompressError, match=r"model\.safetensors (does not exist|cannot be read)"):
        import_teacher(config.teacher, chain(config).teacher, Store(tmp_path / "store"))
    assert not proof.exists()


def test_code_beside_weights_is_never_asked(toy, tmp_path):
    save_stock(toy(ModelSpec.dense(ARCH)), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    assert load_stock(tmp_path).spec.arch == ARCH
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": "(a+)+$"},
        {"special_tokens": {"<|endoftext|>": 3}},
        {"ranks": ["YQ=="]},
        {"ranks": ["../../x"]},
        {"format": Hostile.__name__},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_tokenizer_of_another_making_is_refused(tmp_path, change):
    body = {"format": 1, "name": "x", "pattern": "x", "special_tokens": {}, "ranks": []}
    (tmp_path / "tokenizer.json").write_text(json.dumps(body | change))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: "):
        load_tokenizer(tmp_path)


# --- places ---------------------------------------------------------------------------------------------

RUN = Identity("run", "kron_vl-s0", {"seed": 0})


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("files", "../../../secret.txt"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "/etc/hostname"), {"bytes": 1, "sha256": "0" * 64}),
        (("files", "a.txt", "sha256"), "../../../../etc/hostname"),
        (("files", "a.txt", "bytes"), "1"),
        (("attempt",), ".."),
        (("attempt",), "../../teacher/x/1"),
        (("name",), "../../kron_vl-s0"),
        (("kind",), "../run"),
        (("inputs", "init"), {"address": "../../../secret.txt", "digest": ""}),
    ],
    ids=str,
)
def test_a_record_cannot_lead_out_of_its_artifact(tmp_path, place, value):
    (tmp_path / "secret.txt").write_text("x")
    store = Store(tmp_path / "store")
    with store.attempt(RUN) as attempt:
        attempt.location.put_bytes("a.txt", b"x")
        attempt.publish(metrics={})
    key = f"{RUN.address}/record.json"
    record = json.loads(store.root.read_bytes(key))
    record.pop("seal", None)  # whoever writes a record can seal it
    inner = record
    for part in place[:-1]:
        inner = inner[part]
    inner[place[-1]] = value
    store.root.put_bytes(key, json.dumps(record).encode())
    for read in (lambda: store.find(RUN), lambda: store.open(RUN.address), store.records):
        with pytest.raises(StoreError, match=r"record\.json: (not a krony record|says it is)"):
            read()


@pytest.mark.parametrize("address", ["../secret", "run/../../secret", "/etc", "run/\x00"])
def test_an_address_cannot_lead_out_of_its_store(tmp_path, address):
    with pytest.raises(StoreError, match=r"no place inside|no artifact"):
        Store(tmp_path / "store").open(address)


def test_a_manifest_cannot_lead_out_of_its_corpus(tmp_path):
    from pipeline.data.tables import Manifest

    file = {"name": "../../x.parquet", "size_bytes": 1, "sha256": "", "groups": [[1, 1]], "side": ""}
    body = {
        "format": 1,
        "files": [file],
        "place": "folder",
        "root": "/data",
        "revision": "",
        "text_column": "text",
    }
    with pytest.raises(CorpusError, match=r"corpus: not a corpus \(key '\.\./\.\./x\.parquet'"):
        Manifest.from_json(json.dumps(body).encode(), where="corpus")


# --- size -----------------------------------------------------------------------------------------------

ZEROS = bytes(80 << 20)
LINE = b'{"text": "' + b"a" * (70 << 20) + b'"}\n'


def read(path: Path) -> list[str]:
    return [document.text for document in documents(source_of(FilesCorpus(paths=(str(path),))))]


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("a.txt.gz", lambda data: gzip.compress(data, 9)),
        ("a.jsonl.xz", lambda data: lzma.compress(data, preset=0)),
        ("a.jsonl.zst", zstandard.ZstdCompressor().compress),
        ("a.parquet.zst", zstandard.ZstdCompressor().compress),
    ],
)
def test_a_file_that_grows_beyond_all_text_is_refused(tmp_path, name, compress):
    path = tmp_path / name
    path.write_bytes(compress(ZEROS))
    assert path.stat().st_size < 1 << 20
    with pytest.raises(
        CorpusError, match=r"bytes grow to more than 67,108,864.*decompress it and name"
    ) as caught:
        read(path)
    assert "\n" not in caught.value.line


def test_a_value_that_stands_in_many_rows_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "FREE_BYTES", 1 << 22)
    value = "word " * 20_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 90, pa.int32()), pa.array([value]))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    with pytest.raises(CorpusError, match=r"a\.parquet: .* grows to more than 4,194,304"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (LINE, "a line of more than 67,108,864 characters"),
        (b'{"text": ' + b"[" * 100_000, "no JSON to be read"),
        (b'{"text": "x", "id": ' + b"9" * 5000 + b"}", "no JSON to be read"),
    ],
    ids=["long", "deep", "digits"],
)
def test_a_line_beyond_all_measure_is_named(tmp_path, line, words):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    with pytest.raises(CorpusError, match=rf"a\.jsonl:2: {words}"):
        read(tmp_path / "a.jsonl")


def test_an_evaluation_text_is_not_unpacked_to_its_end(tmp_path):
    folder = tmp_path / "wikitext-2-v1"
    folder.mkdir()
    (folder / "wiki.test.tokens.xz").write_bytes(lzma.compress(ZEROS, preset=0))
    with pytest.raises(KronyError, match="grow to more than"):
        read_text("wikitext-2-v1", tmp_path)


def test_a_checkpoint_that_unpacks_to_more_than_itself_is_refused(tmp_path):
    torch.save({"model": {"transformer.wte.weight": torch.zeros(1 << 21, 4)}}, tmp_path / "ckpt.pt")
    with zipfile.ZipFile(tmp_path / "ckpt.pt") as whole, zipfile.ZipFile(tmp_path / "bomb.pt", "w") as bomb:
        for name in whole.namelist():
            bomb.writestr(name, whole.read(name), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pt").stat().st_size < 1 << 17
    with pytest.raises(ModelError, match=r"bomb\.pt: its members unpack to 33,\d+,\d+ bytes"):
        read_checkpoint(tmp_path / "bomb.pt")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wte.weight", torch.zeros(1).expand(10**9, 10**3)),
        ("wte.weight", torch.zeros(10**9, 10**3, device="meta")),
        ("wte.weight", torch.zeros(61, 16).to_sparse()),
        ("wte.weight", torch.zeros(61, 16, dtype=torch.complex64)),
        ("h.0.attn.c_attn.weight", torch.zeros(48 * 16)),
        ("wpe.weight", torch.zeros(24, 16, 1)),
        ("h.5000.ln_1.weight", torch.zeros(16)),
        ("h.99999999999.ln_1.weight", torch.zeros(16)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_few_numbers_cannot_ask_for_a_huge_model(toy, tmp_path, name, value):
    state, arguments = to_nanogpt(toy(ModelSpec.dense(ARCH)))
    torch.save({"model": state | {f"transformer.{name}": value}, "model_args": arguments}, tmp_path / "x.pt")
    with pytest.raises(ModelError) as caught:
        from_checkpoint(read_checkpoint(tmp_path / "x.pt"))
    assert "\n" not in str(caught.value)


def test_a_config_cannot_ask_for_more_than_its_weights_hold(toy, tmp_path):
    save_native(toy(ModelSpec.dense(ARCH)), tmp_path)
    body = json.loads((tmp_path / "config.json").read_text())
    body["model"]["arch"]["vocab_size"] = 10**7
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match="they do not belong together"):
        load_native(tmp_path)
    body["model"]["arch"]["n_layer"] = 10**12
    (tmp_path / "config.json").write_text(json.dumps(body))
    with pytest.raises(ModelError, match="n_layer=1000000000000 must be at least 1 and at most 10,000"):
        load_native(tmp_path)


# --- what people see ------------------------------------------------------------------------------------


def test_an_error_line_cannot_speak_to_the_terminal(tmp_path):
    path = tmp_path / "a\x1b]0;owned\x07.jsonl"
    path.write_text("no json")
    with pytest.raises(CorpusError) as caught:
        read(path)
    assert "\x1b" in str(caught.value)
    assert caught.value.line.isprintable()
    assert "rename it" in caught.value.line


def test_an_error_line_ends(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"k" * 1_000_000: 1}))
    with pytest.raises(CorpusError) as caught:
        read(tmp_path / "a.jsonl")
    assert len(caught.value.line) <= 2000
    assert caught.value.line.endswith("set corpus.text_field")


# --- a machine of many users --------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["writable", "link", "file"])
def test_a_cache_that_others_made_is_not_trusted(tmp_path, monkeypatch, how):
    monkeypatch.delenv("KRONY_CACHE")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert node_cache().stat().st_mode & 0o777 == 0o700
    cache = node_cache()
    cache.rmdir()
    if how == "writable":
        cache.mkdir()
        cache.chmod(0o777)
    elif how == "link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        cache.symlink_to(tmp_path / "elsewhere")
    else:
        cache.touch()
    with pytest.raises((StoreError, FileExistsError), match="krony-cache"):
        node_cache()
