"""Tokenizers: trained deterministically, stored as one file, exact on any text."""

import base64
import json

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.config.sources import PydocsCorpus
from pipeline.data.corpora import documents, source_of
from pipeline.data.tokenizer import (
    EOT,
    FILE,
    TokenizerError,
    encode_document,
    load_tokenizer,
    read_gpt2,
    require_vocabulary,
    split_long_spaces,
    tokenizer_json,
    train_bpe,
)


@pytest.fixture(scope="module")
def texts():
    return [each.text for each in documents(source_of(PydocsCorpus(packages=("packaging", "tiktoken"))))]


@pytest.fixture(scope="module")
def encoding(texts):
    return train_bpe(texts, vocab_size=700, name="small")


def test_training_twice_gives_the_same_file(texts, encoding):
    assert tokenizer_json(train_bpe(iter(texts), vocab_size=700, name="small")) == tokenizer_json(encoding)


def test_the_vocabulary_is_as_large_as_asked_and_ends_with_the_end(encoding):
    assert encoding.n_vocab == 700
    assert encoding.eot_token == 699
    assert sorted(encoding.decode_single_token_bytes(i) for i in range(256)) == [
        bytes([i]) for i in range(256)
    ]


def test_a_stored_tokenizer_is_the_same_tokenizer(encoding, texts, tmp_path):
    (tmp_path / FILE).write_bytes(tokenizer_json(encoding))
    loaded = load_tokenizer(tmp_path)
    assert loaded.name == "small"
    assert loaded.eot_token == encoding.eot_token
    assert all(loaded.encode_ordinary(text) == encoding.encode_ordinary(text) for text in texts)
    assert tokenizer_json(loaded) == tokenizer_json(encoding)


@given(st.text(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_text_survives_encoding(encoding, text):
    tokens = encode_document(encoding, text)
    assert tokens[-1] == encoding.eot_token
    assert (tokens[:-1] < encoding.eot_token).all()
    assert encoding.decode_bytes(tokens[:-1].tolist()).decode() == text


def test_text_that_spells_the_special_token_is_ordinary(encoding):
    text = f"a {EOT} b"
    tokens = encode_document(encoding, text)
    assert (tokens == encoding.eot_token).sum() == 1
    assert tokens[:-1].tolist() == encoding.encode_ordinary(text)
    assert encoding.decode(tokens[:-1].tolist()) == text


SPACES = st.sampled_from([" ", "\n", "\t", "\x1c", "\x85", "\xa0", "\u3000", "a", "b1", "'s", "."])


@given(st.lists(SPACES, max_size=30).map("".join))
@settings(max_examples=300, deadline=None)
def test_a_cut_inside_a_run_of_spaces_changes_no_token(encoding, text):
    parts = split_long_spaces(text, longest=2)
    assert "".join(parts) == text
    assert [t for part in parts for t in encoding.encode_ordinary(part)] == encoding.encode_ordinary(text)


def test_a_million_spaces_before_a_word_are_encoded(encoding):
    text = "before" + " " * 1_500_000 + "after"
    with pytest.raises(ValueError, match="Regex"):  # when this fails, split_long_spaces has had its day
        encoding.encode_to_numpy(text)
    tokens = encode_document(encoding, text)
    assert encoding.decode(tokens[:-1].tolist()) == text


def test_no_text_trains_no_tokenizer():
    with pytest.raises(TokenizerError, match="no text to learn"):
        train_bpe([], vocab_size=300)


def test_a_text_too_small_for_the_vocabulary_gives_fewer_tokens():
    small = train_bpe(["aa bb aa bb"], vocab_size=5000)
    assert 257 < small.n_vocab < 300
    assert small.decode(small.encode_ordinary("aa bb cc")) == "aa bb cc"


def test_a_model_of_another_vocabulary_is_refused(encoding):
    require_vocabulary(encoding, 700, what="teacher/x")
    with pytest.raises(TokenizerError, match=r"teacher/x has 50,257 tokens, tokenizer small has 700"):
        require_vocabulary(encoding, 50_257, what="teacher/x")


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(format=2),
        lambda body: body.pop("ranks"),
        lambda body: body.update(ranks=["!!"]),
        lambda body: body.update(ranks=body["ranks"][:-1]),
        lambda body: body.update(ranks=[*body["ranks"][:-1], base64.b64encode(b"a").decode()]),
        lambda body: body.update(special_tokens=[1]),
        lambda body: body.update(pattern="(["),
    ],
)
def test_a_damaged_tokenizer_is_named(encoding, tmp_path, change):
    body = json.loads(tokenizer_json(encoding))
    change(body)
    (tmp_path / FILE).write_text(json.dumps(body))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(TokenizerError, match=r"tokenizer\.json: No such file"):
        load_tokenizer(tmp_path)


def test_files_that_are_not_gpt2s_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: No such file"):
        read_gpt2(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(TokenizerError, match=r"vocab\.bpe: sha256"):
        read_gpt2(tmp_path)


def test_tokens_are_uint32_arrays(encoding):
    assert isinstance(encoding, tiktoken.Encoding)
    assert encode_document(encoding, "").dtype == np.uint32
    assert encode_document(encoding, "").tolist() == [encoding.eot_token]
