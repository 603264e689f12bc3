"""The store: an artifact exists when its record exists, on a disk and on an object store alike."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from pipeline.errors import StoreError
from pipeline.store import location as location_module
from pipeline.store.artifacts import Identity, Store
from pipeline.store.location import Location

CORPUS = Identity("corpus", "words", {"source": "words"})
TOKENS = Identity("tokens", "words-bpe", {"split": "hash"}, {"corpus": CORPUS})


@pytest.fixture(params=["disk", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store on a disk, and one on an object store: a file system that is only reached by URI."""
    monkeypatch.setenv("KRONY_CACHE", str(tmp_path / "cache"))
    if request.param == "disk":
        yield Store(tmp_path / "store")
        return
    (tmp_path / "bucket").mkdir()
    objects = pafs.SubTreeFileSystem(str(tmp_path / "bucket"), pafs.LocalFileSystem())

    monkeypatch.setattr(location_module, "_filesystem", lambda uri: (_Objects(objects), uri.split("://")[1]))
    yield Store("mem://store")


class _Objects:
    """An object store made of a file system: keys without folders."""

    def __init__(self, inner: pafs.FileSystem) -> None:
        self._inner = inner

    def open_output_stream(self, path: str, **options: object) -> object:
        self._inner.create_dir(path.rsplit("/", 1)[0], recursive=True)
        return self._inner.open_output_stream(path, **options)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)


def build(store: Store, identity: Identity = CORPUS, data: bytes = b"words", *, force: bool = False) -> str:
    """Publish one artifact and return its attempt."""
    with store.attempt(identity, force=force) as attempt:
        attempt.location.put_bytes("a/documents.txt", data)
        return attempt.publish(metrics={"documents": 1}).record.attempt


def test_what_is_published_is_found_with_its_bytes(store: Store) -> None:
    build(store)
    artifact = store.require(CORPUS)
    assert artifact.path("a/documents.txt").read_bytes() == b"words"
    assert artifact.record.metrics == {"documents": 1}
    assert [record.address for record in store.records()] == [CORPUS.address]
    artifact.verify()


def test_without_a_record_there_is_nothing(store: Store) -> None:
    with store.attempt(CORPUS) as attempt:
        attempt.location.put_bytes("documents.txt", b"half")
    assert store.find(CORPUS) is None
    assert store.unfinished() == [f"{CORPUS.address}/{attempt.name}"]
    with pytest.raises(StoreError, match=r"not there; build it with `krony prepare"):
        store.require(CORPUS)


def test_the_old_artifact_stays_until_the_new_one_is_complete(store: Store) -> None:
    build(store)
    with store.attempt(CORPUS, force=True) as attempt:
        attempt.location.put_bytes("a/documents.txt", b"other")
        assert store.require(CORPUS).path("a/documents.txt").read_bytes() == b"words"
        attempt.publish(metrics={})
    assert store.require(CORPUS).path("a/documents.txt").read_bytes() == b"other"


def test_a_resumable_kind_continues_its_newest_unfinished_attempt(store: Store) -> None:
    build(store)
    names = []
    for _ in range(2):
        with store.attempt(TOKENS, resume=True) as attempt:
            names.append(attempt.name)
            attempt.location.put_bytes("train-00000.bin", b"1")
    assert names == ["1", "1"]
    attempt.publish(metrics={})
    with store.attempt(TOKENS, resume=True, force=True) as attempt:
        assert attempt.name == "2"


def test_two_writers_never_mix_their_files(store: Store) -> None:
    with store.attempt(CORPUS) as first, store.attempt(CORPUS) as second:
        first.location.put_bytes("x", b"1")
        second.location.put_bytes("y", b"2")
        first.publish(metrics={})
        second.publish(metrics={})
    assert set(store.require(CORPUS).record.files) == {"y"}


def test_inputs_are_recorded_with_their_digest(store: Store) -> None:
    build(store)
    build(store, TOKENS)
    corpus = store.require(CORPUS).record
    assert store.require(TOKENS).record.inputs["corpus"].digest == corpus.digest


def test_a_truncated_file_is_named_with_the_way_out(store: Store) -> None:
    attempt = build(store)
    store.root.child(f"{CORPUS.address}/{attempt}").put_bytes("a/documents.txt", b"wor")
    with pytest.raises(StoreError, match=r"a/documents\.txt: 3 bytes, record says 5; rebuild with"):
        store.find(CORPUS)


def test_a_missing_file_is_named(store: Store) -> None:
    attempt = build(store)
    store.root.child(f"{CORPUS.address}/{attempt}").delete("a/documents.txt")
    with pytest.raises(StoreError, match="file is missing"):
        store.find(CORPUS)


def test_changed_bytes_of_the_same_length_fail_verification(tmp_path: Path) -> None:
    store = Store(tmp_path)
    attempt = build(store)
    store.root.child(f"{CORPUS.address}/{attempt}").put_bytes("a/documents.txt", b"WORDS")
    with pytest.raises(StoreError, match="sha256"):
        store.require(CORPUS).verify()


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[1]", b"\xff", b'{"schema": 99}', b'{"schema": 1, "kind": "corpus"}']
)
def test_a_record_that_is_none_is_one_clear_line(store: Store, text: bytes) -> None:
    build(store)
    store.root.put_bytes(f"{CORPUS.address}/record.json", text)
    with pytest.raises(StoreError, match=r"record") as caught:
        store.find(CORPUS)
    assert "\n" not in str(caught.value)


def test_a_record_in_which_one_digit_changed_is_named(store: Store) -> None:
    build(store)
    key = f"{CORPUS.address}/record.json"
    data = store.root.read_bytes(key)
    assert b'"documents": 1' in data
    store.root.put_bytes(key, data.replace(b'"documents": 1', b'"documents": 3'))
    for read in (lambda: store.find(CORPUS), store.records, lambda: store.open(CORPUS.address)):
        with pytest.raises(StoreError, match=r"record\.json: damaged, its seal is broken; rebuild"):
            read()


def test_a_record_of_a_version_without_seals_is_read(store: Store) -> None:
    build(store)
    key = f"{CORPUS.address}/record.json"
    record = json.loads(store.root.read_bytes(key))
    del record["seal"]
    store.root.put_bytes(key, json.dumps(record).encode())
    assert store.require(CORPUS).record.metrics == {"documents": 1}


def test_a_store_from_another_config_is_refused(store: Store) -> None:
    build(store)
    record = json.loads(store.root.read_bytes(f"{CORPUS.address}/record.json"))
    del record["seal"]
    record["fingerprint"] = record["fingerprint"][:8] + "0" * 56
    store.root.put_bytes(f"{CORPUS.address}/record.json", json.dumps(record).encode())
    with pytest.raises(StoreError, match="belongs to another config"):
        store.find(CORPUS)


def test_an_attempt_without_files_cannot_be_published(store: Store) -> None:
    with store.attempt(CORPUS) as attempt, pytest.raises(StoreError, match="nothing was written"):
        attempt.publish(metrics={})


@pytest.mark.parametrize("key", ["../x", "/etc/passwd", "a/../../x", "a\\b", ""])
def test_a_key_cannot_leave_its_location(tmp_path: Path, key: str) -> None:
    place = Location.of(tmp_path / "store")
    with pytest.raises((StoreError, IsADirectoryError)):
        place.put_bytes(key, b"x")
    assert not (tmp_path / "x").exists()


def test_an_unwritable_store_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StoreError, match=r"cannot be written .* choose another --store"):
        build(Store(tmp_path / "file" / "store"))


def test_addresses_follow_from_identity_alone() -> None:
    same = Identity("tokens", "words-bpe", {"split": "hash"}, {"corpus": CORPUS})
    assert same.address == TOKENS.address
    other = Identity("tokens", "words-bpe", {"split": "nanogpt"}, {"corpus": CORPUS})
    newer = Identity("tokens", "words-bpe", {"split": "hash"}, {"corpus": CORPUS}, version=2)
    deeper = Identity(
        "tokens", "words-bpe", {"split": "hash"}, {"corpus": Identity("corpus", "words", {"source": "x"})}
    )
    assert len({TOKENS.address, other.address, newer.address, deeper.address}) == 4


def test_a_file_may_be_moved_to_where_it_is(tmp_path):
    (tmp_path / "file").write_text("whole")
    Location.of(tmp_path).put_file("file", tmp_path / "file", move=True)
    assert (tmp_path / "file").read_text() == "whole"
    assert Location.of(tmp_path).list() == ["file"]
