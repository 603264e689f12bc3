"""Files of anybody's: every format and compression, and one clear line for each way to be broken."""

import gzip
import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sources import FilesCorpus
from pipeline.data import files
from pipeline.data.corpora import corpus_identity, documents, source_of
from pipeline.data.documents import CorpusError

TEXTS = ["Erste Zeile\nzweite — ümlaut 漢字", "  spaces kept  ", "third\r\nwith a carriage return"]
COMPRESS = {
    "": lambda data: data,
    ".xz": lzma.compress,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def encoded(form: str) -> bytes:
    if form == ".jsonl":
        return (
            "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(TEXTS)).encode() + b"\n\n"
        )
    if form == ".txt":
        return "".join(TEXTS).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": TEXTS, "n": [1, 2, 3]}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


def read(*paths: Path, **settings):
    config = FilesCorpus(paths=tuple(map(str, paths)), **settings)
    return list(documents(source_of(config)))


@pytest.mark.parametrize("form", [".txt", ".jsonl", ".parquet"])
@pytest.mark.parametrize("compression", COMPRESS)
def test_every_format_in_every_compression_gives_its_text_verbatim(tmp_path, form, compression):
    path = tmp_path / f"some{form}{compression}"
    path.write_bytes(COMPRESS[compression](encoded(form)))
    found = [each.text for each in read(path)]
    assert found == (["".join(TEXTS)] if form == ".txt" else TEXTS)


def test_concatenated_frames_are_read_to_the_end(tmp_path):
    for ending in (".xz", ".gz", ".zst"):
        path = tmp_path / f"two.jsonl{ending}"
        path.write_bytes(COMPRESS[ending](encoded(".jsonl")) * 2)
        assert len(read(path)) == 6


def test_folders_globs_and_files_are_taken_once_and_in_order(tmp_path):
    for name in ("b.txt", "sub/a.txt", "a.txt", "note.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    found = read(tmp_path, tmp_path / "*.txt", tmp_path / "a.txt", tmp_path / "**/a.txt")
    assert [each.source for each in found] == ["a.txt:0", "b.txt:0", "sub/a.txt:0"]


def test_the_identity_is_names_and_digests_and_not_the_place(tmp_path):
    for place in ("here", "there/deeper"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "x.txt").write_text("same text")
    here, there = (
        corpus_identity(FilesCorpus(paths=(str(tmp_path / place),))) for place in ("here", "there/deeper")
    )
    assert here == there
    (tmp_path / "here/x.txt").write_text("other text")
    assert corpus_identity(FilesCorpus(paths=(str(tmp_path / "here"),))) != there


def test_validation_files_are_validation_even_where_paths_name_them_too(tmp_path):
    for name in ("val.txt", "train.txt"):
        (tmp_path / name).write_text(name)
    config = FilesCorpus(paths=(str(tmp_path),), validation_paths=(str(tmp_path / "val.txt"),))
    assert [(p.name, p.side) for p in source_of(config).partitions()] == [
        ("train.txt", "train"),
        ("val.txt", "val"),
    ]
    only = FilesCorpus(paths=(str(tmp_path / "val.txt"),), validation_paths=(str(tmp_path / "val.txt"),))
    with pytest.raises(CorpusError, match="only validation files"):
        source_of(only).partitions()


@given(st.lists(st.sampled_from(["\n", " \n", "word ", "line of words\n", "x" * 30]), max_size=60))
@settings(max_examples=80)
def test_the_pieces_of_a_long_text_joined_are_the_text(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("t") / "long.txt"
    text = "".join(parts)
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "TXT_CHARACTERS", 50)
        patch.setattr(files, "_TXT_LONGEST", 200)
        pieces = [piece for _, piece in files._cut(path)]
    assert "".join(pieces) == text
    assert all(len(piece) <= 400 for piece in pieces)


def test_a_long_text_is_cut_at_blank_lines_only(tmp_path):
    path = tmp_path / "book.txt"
    chapter = "A sentence that goes on for a while.\n" * 1200 + "\n"
    path.write_text(chapter * 3)
    assert [each.text for each in read(path)] == [chapter] * 3


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', ["a.jsonl:2", "not JSON"]),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', ["a.jsonl:1", "'text'", "body, id", "corpus.text_field"]),
        ("a.jsonl", b'{"text": 5}\n', ["a.jsonl:1", "'text'"]),
        ("a.jsonl", b'["text"]\n', ["a.jsonl:1", "list"]),
        ("a.txt", b"fine \xff\xfe not", ["a.txt", "UTF-8"]),
        ("a.jsonl.xz", lzma.compress(b'{"text": "x"}\n' * 999)[:-40], ["a.jsonl.xz", "broken compression"]),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:-20], ["a.jsonl.gz", "broken compression"]),
        ("a.txt.zst", zstandard.ZstdCompressor().compress(b"abcd" * 9999)[:-5], ["a.txt.zst"]),
        ("a.txt.xz", b"this is no xz", ["a.txt.xz", "broken compression"]),
        ("a.txt.gz", b"this is no gz", ["a.txt.gz"]),
        ("a.txt.zst", b"this is no zst", ["a.txt.zst"]),
        ("a.parquet", b"this is no parquet", ["a.parquet"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_broken_file_is_named_in_one_line(tmp_path, name, data, words):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError) as caught:
        read(tmp_path / name)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message


def test_a_parquet_file_without_the_column_names_what_it_has(tmp_path):
    pq.write_table(pa.table({"body": ["x"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(CorpusError, match=r"no column 'text'; it has body, id: set corpus\.text_field"):
        read(tmp_path / "a.parquet")
    assert [each.text for each in read(tmp_path / "a.parquet", text_field="body")] == ["x"]


@pytest.mark.parametrize("pattern", ["missing.txt", "*.jsonl", "empty"])
def test_a_pattern_without_files_is_named(tmp_path, pattern):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match=r"corpus\.paths: .* matches no file"):
        read(tmp_path / pattern)


def test_a_format_that_is_not_read_is_named(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(CorpusError, match=r"a\.pdf: not a format"):
        read(tmp_path / "a.pdf")


def test_a_digest_follows_the_file(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    first = files.digest(path)
    path.write_text("three")
    assert files.digest(path) != first
