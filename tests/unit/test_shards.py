"""The shard format: what is written is read, and anything else is named."""

from contextlib import suppress

import numpy as np
import pytest

from pipeline.data.shards import (
    HEADER_BYTES,
    MAGIC,
    ShardError,
    ShardWriter,
    Sidecar,
    check_shard,
    open_shard,
)
from pipeline.store.copies import sha256_file


@pytest.fixture
def shard(tmp_path):
    path = tmp_path / "train-00003.bin"
    with ShardWriter(path) as writer:
        writer.add(np.array([5, 65_535, 0], dtype=np.uint32))
        writer.add(np.array([7], dtype=np.int64))
    return path


def sidecar_of(path, **changes):
    values = {
        "shard": path.stem,
        "plan": "p",
        "tokens": 4,
        "documents": 2,
        "text_bytes": 9,
        "sha256": sha256_file(path),
        "source": (("documents-00000-000.parquet", 0, 2),),
    }
    return Sidecar(**(values | changes))


def test_a_shard_is_read_as_it_was_written(shard):
    assert open_shard(shard).tolist() == [5, 65_535, 0, 7]


def test_the_header_is_that_of_llm_c(shard):
    data = shard.read_bytes()
    header = np.frombuffer(data[:1024], dtype="<i4")
    assert header[:4].tolist() == [20240520, 1, 4, 0]
    assert data[1024:] == np.array([5, 65_535, 0, 7], dtype="<u2").tobytes()


def test_a_shard_without_documents_is_whole(tmp_path):
    with ShardWriter(tmp_path / "val-00000.bin"):
        pass
    assert len(open_shard(tmp_path / "val-00000.bin")) == 0


@pytest.mark.parametrize("tokens", [[70_000], [-1], [1, 2, 65_536]])
def test_a_token_that_is_no_uint16_is_refused(tmp_path, tokens):
    with pytest.raises(ShardError, match="16 bits"), ShardWriter(tmp_path / "x.bin") as writer:
        writer.add(np.array(tokens))
    with pytest.raises(ShardError):
        open_shard(tmp_path / "x.bin")


def test_a_crash_while_writing_leaves_no_shard(tmp_path):
    with suppress(KeyboardInterrupt), ShardWriter(tmp_path / "x.bin") as writer:
        writer.add(np.arange(10))
        raise KeyboardInterrupt
    with pytest.raises(ShardError, match="not a token shard"):
        open_shard(tmp_path / "x.bin")


@pytest.mark.parametrize("lost", [1, 2, 7, 8, 9, HEADER_BYTES])
def test_a_truncated_shard_is_named_with_the_way_out(shard, lost):
    data = shard.read_bytes()
    shard.write_bytes(data[:-lost])
    with pytest.raises(ShardError) as caught:
        open_shard(shard)
    message = str(caught.value)
    assert "train-00003.bin" in message
    assert "krony prepare" in message
    assert "\n" not in message


def test_more_tokens_than_promised_are_no_shard_either(shard):
    with shard.open("ab") as file:
        file.write(b"\0\0")
    with pytest.raises(ShardError, match="promises 4 tokens, the file holds 5"):
        open_shard(shard)


@pytest.mark.parametrize(("at", "value", "word"), [(0, MAGIC + 1, "magic"), (1, 2, "version 2")])
def test_a_foreign_header_is_named(shard, at, value, word):
    header = np.frombuffer(shard.read_bytes()[:1024], dtype="<i4").copy()
    header[at] = value
    shard.write_bytes(header.tobytes() + shard.read_bytes()[1024:])
    with pytest.raises(ShardError, match=word):
        open_shard(shard)


def test_a_missing_shard_is_named(tmp_path):
    with pytest.raises(ShardError, match=r"train-00009\.bin: shard is missing"):
        open_shard(tmp_path / "train-00009.bin")


def test_a_flipped_bit_is_found(shard):
    sidecar = sidecar_of(shard)
    assert check_shard(shard, sidecar).tolist() == [5, 65_535, 0, 7]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(ShardError, match="sha256"):
        check_shard(shard, sidecar)


def test_a_sidecar_of_another_count_is_found(shard):
    with pytest.raises(ShardError, match="its sidecar says 5"):
        check_shard(shard, sidecar_of(shard, tokens=5))


def test_a_sidecar_survives_its_file(shard):
    sidecar = sidecar_of(shard)
    assert Sidecar.from_json(sidecar.to_json(), where="x") == sidecar


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"shard": "x"}', b'{"source": [["a", 1]]}'])
def test_a_broken_sidecar_is_named(data):
    with pytest.raises(ShardError, match=r"^here: not a sidecar"):
        Sidecar.from_json(data, where="here")
