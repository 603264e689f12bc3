"""Preparing survives a kill between any two writes, and a damaged artifact is named, never read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config.schema import RayConfig
from pipeline.config.sources import FilesCorpus
from pipeline.data import prepare
from pipeline.data.batches import TokenStream
from pipeline.data.corpora import build_corpus
from pipeline.data.documents import CorpusError, document_id
from pipeline.data.plan import FILE, REPEATS
from pipeline.data.rows import Corpus
from pipeline.data.shards import HEADER_BYTES, ShardError, Sidecar, open_shard
from pipeline.data.tokenizer import TokenizerError, load_tokenizer
from pipeline.data.verify import split_documents, verify_tokens
from pipeline.errors import StoreError
from pipeline.store.artifacts import Artifact
from pipeline.store.copies import sha256_file
from pipeline.store.location import Location
from pipeline.store.records import FileInfo


class Crash(BaseException):
    """The process dies here."""


@pytest.fixture(scope="module")
def origin(data_lab, tmp_path_factory):
    """Corpus and tokenizer, made once; every test works on a copy of the store."""
    folder = tmp_path_factory.mktemp("origin")
    config = data_lab.config_of(data_lab.write_corpus(folder), folder / "store")
    data_lab.Prepared(config)
    return folder


@pytest.fixture
def prepared(data_lab, origin, tmp_path):
    shutil.copytree(origin / "store", tmp_path / "store")
    return data_lab.Prepared(data_lab.config_of(origin / "corpus.jsonl", tmp_path / "store"))


@pytest.fixture
def tokens(data_lab, prepared, monkeypatch):
    data_lab.in_process(monkeypatch)
    return prepared.tokens()


def count_writes(monkeypatch, *, crash_at=None):
    """Count the writes of a store; die instead of the one with number `crash_at`."""
    done = [0]

    def counting(write):
        def counted(self, key, *arguments, **options):
            if done[0] == crash_at:
                raise Crash
            done[0] += 1
            return write(self, key, *arguments, **options)

        return counted

    for name in ("put_bytes", "put_file"):
        monkeypatch.setattr(Location, name, counting(getattr(Location, name)))
    return done


def documents_of(artifact: Artifact, side: str, tokenizer: Artifact) -> list[str]:
    encoding = load_tokenizer(tokenizer.folder())
    found = []
    for key in sorted(artifact.record.files):
        if key.startswith(side) and key.endswith(".bin"):
            pieces = split_documents(
                open_shard(artifact.path(key)), vocabulary=encoding.n_vocab, eot=encoding.eot_token, name=key
            )
            found += [encoding.decode(piece.tolist()) for piece in pieces]
    return found


def test_shards_hold_the_documents_of_the_corpus_each_once_on_its_side(tokens, prepared):
    corpus = Corpus.of(prepared.corpus)
    train, val = (documents_of(tokens, side, prepared.tokenizer) for side in ("train", "val"))
    lines = Path(prepared.config.corpus.paths[0]).read_text().splitlines()
    texts = list(dict.fromkeys(json.loads(line)["text"] for line in lines))
    assert corpus.manifest.documents == 250
    assert sorted(train + val) == sorted(texts)
    limit = 0.1 * 2**64
    assert set(val) == {text for text in texts if int(document_id(text)[:16], 16) < limit}
    assert [text for text in texts if text in set(train)] == train  # the order of the corpus is kept
    metrics = tokens.record.metrics
    assert (metrics["documents"], metrics["repeats"]) == (250, 10)
    assert metrics["train_tokens"] == len(
        TokenStream(
            [
                tokens.path(k)
                for k in sorted(tokens.record.files)
                if k.startswith("train") and k.endswith(".bin")
            ]
        )
    )
    assert metrics["train_documents"] + metrics["val_documents"] == 240


def test_preparing_again_does_nothing(data_lab, prepared, monkeypatch):
    made = data_lab.in_process(monkeypatch)
    first = prepared.tokens()
    assert len(made) == len(set(made)) >= 4
    again = prepared.tokens()
    assert again.record == first.record
    assert len(made) == first.record.metrics["shards"]


def test_a_kill_between_any_two_writes_costs_one_shard_and_changes_no_byte(data_lab, origin, tmp_path):
    def work(name, crash_at=None):
        shutil.copytree(origin / "store", tmp_path / name, dirs_exist_ok=True)
        prepared = data_lab.Prepared(data_lab.config_of(origin / "corpus.jsonl", tmp_path / name))
        with pytest.MonkeyPatch.context() as patch:
            made = data_lab.in_process(patch)
            writes = count_writes(patch, crash_at=crash_at)
            try:
                artifact = prepared.tokens()
            except Crash:
                artifact = None
        return prepared, artifact, made, writes[0]

    _, whole, every, writes = work("whole")
    assert len(every) >= 4
    assert writes >= 4 * len(every)
    for crash_at in range(writes):
        prepared, artifact, before, _ = work(f"crash-{crash_at}", crash_at)
        assert artifact is None
        assert prepared.store.find(prepared.chain.tokens) is None  # nothing half is ever readable
        _, artifact, after, _ = work(f"crash-{crash_at}")
        assert artifact.record.digest == whole.record.digest
        assert data_lab.payload(artifact) == data_lab.payload(whole)
        assert len(before) + len(after) <= len(every) + 1  # at most the shard at hand is made twice


def test_only_what_is_missing_or_cut_short_is_made_again(data_lab, prepared, monkeypatch):
    made = data_lab.in_process(monkeypatch)
    whole = prepared.tokens()
    kept = data_lab.payload(whole)
    address = prepared.store.root.child(prepared.chain.tokens.address)
    address.delete("record.json")
    folder = whole.location
    folder.delete("train-00001.bin")
    folder.delete("val-00002.json")
    folder.put_bytes("train-00003.bin", folder.read_bytes("train-00003.bin")[:-2])
    folder.put_bytes("val-00000.json", b"{")
    made.clear()
    again = prepared.tokens()
    assert made == [0, 1, 2, 3]
    assert data_lab.payload(again) == kept


def test_an_attempt_for_another_corpus_is_not_continued(data_lab, prepared, monkeypatch):
    data_lab.in_process(monkeypatch)
    whole = prepared.tokens()
    prepared.store.root.child(prepared.chain.tokens.address).delete("record.json")
    plan = json.loads(whole.location.read_bytes(FILE))
    whole.location.put_bytes(FILE, json.dumps(plan | {"corpus": "another"}).encode())
    whole.location.put_bytes("train-00099.bin", b"stray")
    again = prepared.tokens()
    assert "train-00099.bin" not in again.record.files
    assert again.record.digest == whole.record.digest


@pytest.mark.parametrize("fraction", [1e-9, 1 - 1e-9])
def test_a_split_without_documents_on_a_side_is_named(data_lab, origin, tmp_path, monkeypatch, fraction):
    data_lab.in_process(monkeypatch)
    config = data_lab.config_of(origin / "corpus.jsonl", tmp_path / "store", validation_fraction=fraction)
    if fraction > 0.5:
        with pytest.raises(TokenizerError, match="training split holds no text"):
            data_lab.Prepared(config)
        return
    with pytest.raises(CorpusError, match="leaves no validation document among 250"):
        data_lab.Prepared(config).tokens()


def test_an_empty_corpus_is_named(data_lab, tmp_path):
    (tmp_path / "empty.jsonl").write_text('\n{"text": "  "}\n')
    config = data_lab.config_of(tmp_path / "empty.jsonl", tmp_path / "store")
    with pytest.raises(CorpusError, match="corpus 'files' holds no document"):
        data_lab.Prepared(config)


def test_max_megabytes_stops_at_a_document_whatever_the_partitions(data_lab, tmp_path, monkeypatch):
    data_lab.in_process(monkeypatch)
    monkeypatch.setattr(prepare, "run_tasks", lambda function, items, **_: map(function, items))
    sizes = []
    for number in range(4):
        data_lab.write_corpus(tmp_path / f"part{number}", documents=20 + number, repeats=0)
    for megabytes in (0.0, 0.02, 0.04):
        config = FilesCorpus(paths=(str(tmp_path),), max_megabytes=megabytes)
        run = data_lab.config_of(tmp_path / "part0/corpus.jsonl", tmp_path / f"store{megabytes}")
        prepared = data_lab.Prepared(run)
        identity = prepared.chain.corpus.__class__("corpus", "limited", {"megabytes": megabytes})
        artifact = build_corpus(config, identity, prepared.store, ray=RayConfig(), quiet=True)
        manifest = Corpus.of(artifact).manifest
        assert set(artifact.record.files) == {"corpus.json", *(file.name for file in manifest.files)}
        sizes.append(manifest.text_bytes)
    longest = 3_000
    assert sizes[0] > 0.04e6 + longest
    assert 0.02e6 <= sizes[1] < 0.02e6 + longest
    assert 0.04e6 <= sizes[2] < 0.04e6 + longest


# --- verify ---------------------------------------------------------------------------------------------


def test_a_right_artifact_is_verified(tokens, prepared):
    verified = verify_tokens(tokens, prepared.tokenizer, quiet=True)
    metrics = tokens.record.metrics
    assert verified.tokens == metrics["train_tokens"] + metrics["val_tokens"]
    assert (verified.documents, verified.shared) == (240, 0)
    assert verified.shards == 2 * metrics["shards"]


def believed(artifact: Artifact) -> Artifact:
    """The artifact as if its record had seen the files as they are now."""
    place = Location(artifact.location.uri)
    files = {key: FileInfo(bytes=place.size(key), sha256=place.sha256(key)) for key in artifact.record.files}
    return Artifact(replace(artifact.record, files=files), place)


def rewrite(artifact: Artifact, name: str, change, **sidecar_changes) -> Artifact:
    """Change the tokens of a shard and make header, sidecar and record agree with the lie."""
    path = artifact.path(f"{name}.bin")
    header = np.frombuffer(path.read_bytes()[:HEADER_BYTES], dtype="<i4").copy()
    tokens = change(open_shard(path).copy())
    header[2] = len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype("<u2").tobytes())
    old = json.loads(artifact.path(f"{name}.json").read_bytes())
    new = old | {"tokens": len(tokens), "sha256": sha256_file(path)} | sidecar_changes
    sidecar = Sidecar.from_json(json.dumps(new).encode(), where=name)
    artifact.path(f"{name}.json").write_bytes(sidecar.to_json())
    return believed(artifact)


def replaced(position, value):
    def change(tokens):
        tokens[position] = value
        return tokens

    return change


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("train-00001", replaced(5, 400), "train-00001: token 400 of a vocabulary of 400"),
        ("train-00001", replaced(-1, 65), "train-00001: its last document has no end-of-text"),
        ("val-00000", replaced(5, 399), "val-00000: .* documents, not"),
        (
            "train-00002",
            lambda tokens: np.append(tokens, [128, 399]),
            "train-00002: .*(documents, not|no text)",
        ),
    ],
)
def test_a_lie_that_its_sidecar_repeats_is_found(tokens, prepared, name, change, word):
    lie = rewrite(tokens, name, change)
    with pytest.raises(ShardError, match=word):
        verify_tokens(lie, prepared.tokenizer, quiet=True)


def test_another_way_to_spell_a_document_is_found(tokens, prepared):
    encoding = load_tokenizer(prepared.tokenizer.location.local_folder())

    def spelled(old):
        at = int(np.flatnonzero(old >= 256)[0])
        letters = encoding.decode_single_token_bytes(int(old[at]))
        apart = [encoding.encode_single_token(bytes([letter])) for letter in letters]
        return np.concatenate([old[:at], apart, old[at + 1 :]])

    lie = rewrite(tokens, "train-00001", spelled)
    with pytest.raises(ShardError, match="train-00001: a document has other tokens than tiktoken gives it"):
        verify_tokens(lie, prepared.tokenizer, quiet=True)


def test_a_validation_document_in_training_is_found(tokens, prepared):
    validation = next(k for k in sorted(tokens.record.files) if k.startswith("val") and k.endswith(".bin"))
    held_out = open_shard(tokens.path(validation))
    first = held_out[: int(np.flatnonzero(held_out == 399)[0]) + 1]
    count = json.loads(tokens.path("train-00002.json").read_bytes())["documents"]
    lie = rewrite(tokens, "train-00002", lambda old: np.concatenate([old, first]), documents=count + 1)
    with pytest.raises(ShardError, match="train-00002: holds a document that is also validation"):
        verify_tokens(lie, prepared.tokenizer, quiet=True)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.write_bytes(bytes(data))


def test_a_flipped_bit_is_named(tokens, prepared):
    flip(tokens.path("train-00001.bin"))
    with pytest.raises(ShardError, match=r"train-00001\.bin: sha256"):
        verify_tokens(believed(tokens), prepared.tokenizer, quiet=True)


def test_a_bit_flipped_between_two_runs_is_named_with_the_command_that_makes_the_shard_again(
    data_lab, tokens, prepared
):
    before = data_lab.payload(tokens)
    flip(tokens.path("train-00001.bin"))
    found = prepared.store.require(prepared.chain.tokens)
    for read in (
        lambda: found.location.local("train-00001.bin"),  # as training opens its shards
        lambda: found.path("train-00001.bin"),  # as calibration and evaluation do
        found.folder,
    ):
        with pytest.raises(
            StoreError, match=r"train-00001\.bin: sha256 .*: rebuild with `krony prepare … --force`"
        ):
            read()
    assert data_lab.payload(prepared.tokens(force=True)) == before


def test_a_bit_flipped_in_an_unfinished_attempt_is_found_before_the_record_is_put(data_lab, prepared, tokens):
    before = data_lab.payload(tokens)
    flip(tokens.path("train-00001.bin"))
    prepared.store.root.child(prepared.chain.tokens.address).delete("record.json")
    with pytest.raises(StoreError, match=r"train-00001\.bin: changed since it was written, and removed"):
        prepared.tokens()
    assert prepared.store.find(prepared.chain.tokens) is None
    assert data_lab.payload(prepared.tokens()) == before


def test_a_truncated_shard_is_named_by_store_and_reader(tokens, prepared):
    path = tokens.path("train-00001.bin")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(StoreError, match=r"train-00001\.bin"):
        prepared.store.find(prepared.chain.tokens)
    with pytest.raises(ShardError, match=r"train-00001\.bin: header promises"):
        TokenStream([path])


def test_the_repeats_of_a_plan_are_stored_beside_it(tokens):
    positions = np.frombuffer(tokens.path(REPEATS).read_bytes(), dtype="<i8")
    assert positions.tolist() == list(range(240, 250))
