"""Evaluation texts: layouts, digests, and what happens with anything else."""

import json
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.tokenizer import read_gpt2
from pipeline.errors import EvaluateError
from pipeline.evaluate import texts
from pipeline.evaluate.lambada import passages
from pipeline.evaluate.protocols import PROTOCOLS
from pipeline.evaluate.sequences import encode_text
from pipeline.evaluate.texts import JOINT, TEXTS, Text, TextSource, read_hub_rows, read_text, word_counts

WIKI_ROWS = ["", " = Title = \n", "", " Some <unk> text . \n", ""]
PASSAGES = ["one two three", "a passage with its last word"]


def source(rows: list[str], **places: object) -> TextSource:
    digest = Text("t", tuple(rows), "").sha256
    fields = {"revision": "main", "rows": len(rows), "sha256": digest, "licence": "none"}
    return TextSource(**fields | places)


@pytest.fixture
def wiki(monkeypatch) -> TextSource:
    made = source(WIKI_ROWS, files=("w/wiki.test.tokens",), hub="me/wiki", hub_file="v1/test-0.parquet")
    monkeypatch.setattr(texts, "TEXTS", {"wiki": made})
    return made


def write_wiki(path: Path, *, compress: bool = False) -> None:
    data = "".join(row or " \n" for row in WIKI_ROWS).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(lzma.compress(data) if compress else data)


def test_three_layouts_are_one_text(wiki, tmp_path):
    write_wiki(tmp_path / "plain/w/wiki.test.tokens")
    write_wiki(tmp_path / "packed/w/wiki.test.tokens.xz", compress=True)
    hub = tmp_path / "hub/me/wiki/v1/test-0.parquet"
    hub.parent.mkdir(parents=True)
    pq.write_table(pa.table({"text": WIKI_ROWS}), hub)
    read = [read_text("wiki", tmp_path / layout) for layout in ("plain", "packed", "hub")]
    assert {text.joined for text in read} == {JOINT.join(WIKI_ROWS)}
    assert len({text.sha256 for text in read}) == 1


def test_json_lines_and_plain_passages_are_read_as_passages(monkeypatch, tmp_path):
    (tmp_path / "p.txt").write_text("".join(f"{p}  \n" for p in PASSAGES))
    lines = "".join(json.dumps({"text": p}) + "\n" for p in PASSAGES)
    (tmp_path / "p.jsonl").write_text(lines)
    (tmp_path / "h.jsonl").write_text(lines)
    places = {"hub": "h", "hub_file": "h"}
    made = {
        "txt": source(PASSAGES, files=("p.txt",), **places),
        "jsonl": source(PASSAGES, files=("p.jsonl",), **places),
    }
    monkeypatch.setattr(texts, "TEXTS", made)
    assert read_text("txt", tmp_path).rows == read_text("jsonl", tmp_path).rows == tuple(PASSAGES)
    assert read_hub_rows(str(tmp_path / "h.jsonl")) == PASSAGES


def test_another_text_under_the_same_name_is_refused(wiki, tmp_path):
    write_wiki(tmp_path / "w/wiki.test.tokens")
    with (tmp_path / "w/wiki.test.tokens").open("a") as file:
        file.write(" one more line \n")
    with pytest.raises(EvaluateError, match=r"6 rows.*wiki has 5 rows"):
        read_text("wiki", tmp_path)


def test_damaged_missing_and_unknown_texts_are_named(wiki, tmp_path):
    with pytest.raises(EvaluateError, match=r"text 'wiki' is not there; looked for w/wiki.test.tokens"):
        read_text("wiki", tmp_path)
    (tmp_path / "w").mkdir()
    (tmp_path / "w/wiki.test.tokens.xz").write_bytes(b"not xz")
    with pytest.raises(EvaluateError, match="damaged"):
        read_text("wiki", tmp_path)
    with pytest.raises(EvaluateError, match="known: wiki"):
        read_text("nothing", tmp_path)


def test_without_network_the_hub_says_what_to_do():
    with pytest.raises(
        EvaluateError, match=r"hf://datasets/Salesforce/wikitext@b08601e.*name a folder.*eval\.texts"
    ):
        read_text("wikitext-103-v1")


def test_hub_addresses_are_pinned():
    for name, made in TEXTS.items():
        assert len(made.sha256) == 64
        assert made.revision == "main" or len(made.revision) == 40, name


@pytest.fixture(scope="module")
def real(shared_data: Path) -> Path:
    if not (shared_data / "eval").is_dir():
        pytest.skip(f"no evaluation texts in {shared_data}")
    return shared_data


@pytest.mark.parametrize("name", ["krony/wt103", "krony/wt2", "krony/lambada_text", "raw/wt2@1024"])
def test_token_counts_of_the_real_texts(real, name):
    protocol = PROTOCOLS[name]
    encoding = read_gpt2(real / "tokenizer/gpt2")
    found = encode_text(read_text(protocol.text, real / "eval"), encoding, protocol)  # raises if it differs
    assert len(found.ids) == protocol.gpt2_tokens
    assert int(found.token_bytes[found.ids].sum()) == len(
        read_text(protocol.text, real / "eval").joined.encode()
    )


def test_a_count_that_differs_is_refused(real):
    encoding = read_gpt2(real / "tokenizer/gpt2")
    with pytest.raises(EvaluateError, match=r"3 GPT-2 tokens, the protocol has 286,657"):
        encode_text(Text("t", ("one two three",), "here"), encoding, PROTOCOLS["krony/wt103"])


def test_wikitext_2_and_103_are_one_text_with_more_unknowns(real):
    large, small = (read_text(name, real / "eval").rows for name in ("wikitext-103-v1", "wikitext-2-v1"))
    assert word_counts(large) == (241_211, 2_492)
    assert word_counts(small) == (241_211, 15_218)
    for row_large, row_small in zip(large, small, strict=True):
        for a, b in zip(row_large.split(), row_small.split(), strict=True):
            assert b in (a, "<unk>")


def test_lambada_has_5153_passages(real):
    assert len(read_text("lambada", real / "eval").rows) == 5_153
    assert len(read_text("lambada-openai", real / "eval").rows) == 5_153


@pytest.mark.parametrize("name", ["lambada", "lambada-openai"])
def test_every_real_passage_has_a_last_word_after_a_context(real, name):
    encoding = read_gpt2(real / "tokenizer/gpt2")
    text = read_text(name, real / "eval")
    items = passages(text, encoding, window=1024)
    assert len(items) == 5_153
    for item, row in zip(items[:200], text.rows, strict=False):
        assert encoding.decode(list(item.ids)) == row
        assert encoding.decode(list(item.ids[-item.targets :])) == " " + row.rsplit(" ", 1)[1]
