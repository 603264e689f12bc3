"""One text, one encoding: `tokenizers`, tiktoken and transformers agree with what we serve."""

import json
import lzma

import pytest
from tokenizers import Regex, Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer

from pipeline.config.sources import PydocsCorpus
from pipeline.data.corpora import documents, source_of
from pipeline.data.tokenizer import (
    PATTERN,
    byte_alphabet,
    load_tokenizer,
    read_gpt2,
    tokenizer_json,
    train_bpe,
    write_hf_tokenizer,
)

VOCABULARY = 2048
ODD = [
    "",
    " ",
    "  two  spaces",
    "tabs\t\tand\n\nlines \n",
    "ümläute 漢字 😀",
    "it's we'll I'd",
    "a\u00a0b\u3000c",
]


@pytest.fixture(scope="module")
def texts():
    return [each.text for each in documents(source_of(PydocsCorpus(packages=("numpy",))))]


@pytest.fixture(scope="module")
def bpe(texts):
    return train_bpe(texts, vocab_size=VOCABULARY)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return read_gpt2(shared_data / "tokenizer" / "gpt2")


def test_the_encoder_that_learned_the_merges_agrees_with_the_one_that_serves_them(texts, bpe):
    model = Tokenizer(BPE())
    model.pre_tokenizer = Sequence(
        [Split(Regex(PATTERN), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = BpeTrainer(
        vocab_size=VOCABULARY - 1, initial_alphabet=sorted(byte_alphabet().values()), show_progress=False
    )
    model.train_from_iterator(texts, trainer)
    differ = [text for text in [*texts, *ODD] if model.encode(text).ids != bpe.encode_ordinary(text)]
    assert differ == []


def test_auto_tokenizer_opens_ours_and_agrees(texts, bpe, tmp_path):
    write_hf_tokenizer(bpe, tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == bpe.n_vocab
    assert theirs.eos_token_id == theirs.bos_token_id == bpe.eot_token
    differ = [text for text in [*texts, *ODD] if theirs(text)["input_ids"] != bpe.encode_ordinary(text)]
    assert differ == []
    for text in [*texts[:20], *ODD]:
        assert theirs.decode(theirs(text)["input_ids"], clean_up_tokenization_spaces=False) == text


def test_gpt2_from_its_files_is_gpt2(gpt2, shared_data, tmp_path):
    assert gpt2.n_vocab == 50_257
    assert gpt2.encode_ordinary("hello world") == [31373, 995]
    merges = (shared_data / "tokenizer/gpt2/vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]
    vocabulary = json.loads((shared_data / "tokenizer/gpt2/encoder.json").read_text())
    write_hf_tokenizer(gpt2, tmp_path)
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").split("\n")[1:-1] == merges
    assert json.loads((tmp_path / "vocab.json").read_text(encoding="utf-8")) == vocabulary
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert all(theirs(text)["input_ids"] == gpt2.encode_ordinary(text) for text in ODD)


def test_gpt2_survives_its_own_artifact(gpt2, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json(gpt2))
    loaded = load_tokenizer(tmp_path)
    assert all(loaded.encode_ordinary(text) == gpt2.encode_ordinary(text) for text in ODD)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("wikitext-103-v1/wiki.test.tokens", 286_657),
        ("wikitext-2-v1/wiki.test.tokens", 297_300),
        ("wikitext-raw-v1/wiki.test.raw", 287_644),
        ("wikitext-103-v1/wiki.valid.tokens", 250_896),
    ],
)
def test_published_texts_have_their_known_number_of_gpt2_tokens(gpt2, shared_data, name, expected):
    with lzma.open(shared_data / f"eval/{name}.xz", "rt", encoding="utf-8", newline="\n") as file:
        rows = ["" if not line.strip() else line for line in file]
    assert len(gpt2.encode_ordinary("\n\n".join(rows))) == expected
