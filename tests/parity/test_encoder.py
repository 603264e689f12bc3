"""gigatoken makes the shards, tiktoken says what is right: the same ids, and a difference is seen."""

import json
import lzma
import sys
from functools import lru_cache

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sources import PydocsCorpus
from pipeline.data.corpora import documents, source_of
from pipeline.data.encoder import CHECK_EVERY, Encoder
from pipeline.data.tokenizer import EOT, FAST_PATTERN, TokenizerError, encode_document, read_gpt2, train_bpe

PIECES = [
    "a",
    "Bc",
    " ",
    "  ",
    "\n",
    "\t",
    "\r\n",
    "'",
    "'s",
    "'LL",
    "'ll",
    "1",
    "23",
    "é",
    "e\u0301",
    "漢字",
]
PIECES += [
    "🙂",
    "\u200d",
    "\xa0",
    "\u3000",
    "\u2028",
    "\x00",
    "\x85",
    "\x1c",
    EOT,
    "-",
    "...",
    "_",
    "٣",
    "Ⅷ",
    "ʼ",
]


@pytest.fixture(scope="module")
def texts():
    return [each.text for each in documents(source_of(PydocsCorpus(packages=("numpy",))))]


@pytest.fixture(scope="module")
def small(texts):
    return train_bpe(texts, vocab_size=2048)


@lru_cache(maxsize=2)
def engine(encoding):
    """gigatoken alone, never held against tiktoken."""
    encoder = Encoder(encoding)
    encoder._unchecked = sys.maxsize
    return encoder


def engine_of(encoding):
    """What an encoder calls after its first document."""
    encoder = Encoder(encoding)
    encoder.document("")
    return encoder._engine


def differ(encoding, texts):
    fast = engine(encoding)
    return [
        text for text in texts if not np.array_equal(fast.document(text), encode_document(encoding, text))
    ]


def test_real_documents_have_the_tokens_of_tiktoken(small, texts):
    assert differ(small, texts) == []


def test_every_character_is_of_the_same_kind_for_both(small):
    """Letter, digit, space or other: one character of each kind on either side shows it."""
    points = [point for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000]
    blocks = [points[at : at + 512] for at in range(0, len(points), 512)]
    assert (
        differ(small, ("".join(f"a{chr(p)}b {chr(p)} 1{chr(p)}2" for p in block) for block in blocks)) == []
    )


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
@settings(max_examples=500, deadline=None)
def test_odd_texts_have_the_tokens_of_tiktoken(small, text):
    assert differ(small, [text]) == []


@pytest.mark.parametrize("piece", ["a", " ", "\n", "1", "é", "ab", EOT])
def test_long_runs_have_the_tokens_of_tiktoken(small, piece):
    assert differ(small, [piece * 50_000, "x" + piece * 50_000 + "y"]) == []


def test_gpt2_has_the_tokens_of_tiktoken(shared_data):
    gpt2 = read_gpt2(shared_data / "tokenizer" / "gpt2")
    with lzma.open(shared_data / "train" / "openwebtext" / "owt10k-sample.jsonl.xz", "rt") as file:
        assert differ(gpt2, (json.loads(line)["text"] for line in file)) == []


def test_another_answer_is_seen_at_once_and_later(small, texts):
    other = engine_of(train_bpe(texts[:50], vocab_size=1024))
    encoder = Encoder(small)
    encoder._engine = other
    with pytest.raises(TokenizerError, match=r"different tokens.*run again with --data\.encoder tiktoken"):
        encoder.document("the first document")
    encoder = Encoder(small)
    encoder.document("the first document")
    encoder._engine = other
    for _ in range(CHECK_EVERY - 1):
        encoder.document("one of many documents")
    with pytest.raises(TokenizerError, match="different tokens"):
        encoder.document("one of many documents")


def test_a_text_of_any_length_is_compared(small, texts, monkeypatch):
    monkeypatch.setattr("pipeline.data.encoder.LONGEST_CHECK", 10)
    encoder = Encoder(small)
    encoder._engine = engine_of(train_bpe(texts[:50], vocab_size=1024))
    with pytest.raises(TokenizerError, match="different tokens"):
        encoder.document("the first document, and a long one")


def test_an_engine_is_made_anew_when_the_process_has_grown(small, monkeypatch):
    held = iter([100, 150, 151, 151, 151, 151])  # bytes: made, looked at twice, made anew, looked at twice
    monkeypatch.setattr("pipeline.data.encoder._resident", lambda: next(held))
    monkeypatch.setattr("pipeline.data.encoder.LOOK_EVERY", 9)
    monkeypatch.setattr("pipeline.data.encoder.MOST_GROWTH", 50)
    encoder, engines = Encoder(small), []
    for _ in range(4):
        text = "ten letter"
        assert np.array_equal(encoder.document(text), encode_document(small, text))
        engines.append(encoder._engine)
    first, dropped, made, same = engines
    assert dropped is None
    assert made is same
    assert made not in {None, first}


@pytest.mark.skipif(sys.platform != "linux", reason="memory is given back by glibc")
def test_what_the_engine_remembers_is_bounded(python):
    """gigatoken keeps every piece of text; of 20 MB of words that never repeat it would keep 190 MB."""
    script = """
import numpy as np, psutil
from pipeline.data import encoder
from pipeline.data.tokenizer import train_bpe
encoder.LOOK_EVERY, encoder.MOST_GROWTH = 1 << 18, 16 << 20
letters = np.random.default_rng(0).integers(97, 123, size=(1000, 1000, 20), dtype=np.uint8)
texts = [" ".join(word.tobytes().decode() for word in words) for words in letters]
bpe = encoder.Encoder(train_bpe(texts[:3], vocab_size=300))
before = psutil.Process().memory_info().rss
peak = 0
for text in texts:
    bpe.document(text)
    peak = max(peak, psutil.Process().memory_info().rss)
print(peak - before)
"""
    assert int(python("-c", script).stdout) < 100 << 20


def test_ranks_that_are_no_merges_are_one_line(small):
    loose = tiktoken.Encoding(
        "loose",
        pat_str=FAST_PATTERN,
        mergeable_ranks={bytes([byte]): byte for byte in range(256)} | {b"abc": 256},
        special_tokens={EOT: 257},
    )
    with pytest.raises(TokenizerError, match=r"token 256 b'abc' is no merge of two earlier tokens"):
        Encoder(loose)


def test_tiktoken_alone_is_a_choice(small, texts):
    alone = Encoder(small, choice="tiktoken")
    assert all(np.array_equal(alone.document(text), encode_document(small, text)) for text in texts[:5])
    assert alone.name.startswith("tiktoken ")
    assert Encoder(small).name.startswith("gigatoken ")
