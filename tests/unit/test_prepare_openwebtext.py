"""OpenWebText end to end on a folder laid out as the hub lays it: nanoGPT's split, and ours with dedup."""

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config.schema import RunConfig
from pipeline.config.sources import BpeTokenizer, DataConfig, OpenWebTextCorpus
from pipeline.data import prepare
from pipeline.data.documents import document_id
from pipeline.data.shards import open_shard
from pipeline.data.splits import is_validation
from pipeline.data.tokenizer import load_tokenizer
from pipeline.data.verify import split_documents, verify_tokens

FILES, PER_FILE = 3, 900
TEXTS = [f"page {i % 2600}: " + "some words of the web " * (i % 5) for i in range(FILES * PER_FILE)]


@pytest.fixture
def prepared(data_lab, tmp_path, monkeypatch):
    (tmp_path / "owt/plain_text").mkdir(parents=True)
    for number in range(FILES):
        table = pa.table({"text": TEXTS[number * PER_FILE : (number + 1) * PER_FILE]})
        name = f"train-{number:05d}-of-{FILES:05d}.parquet"
        pq.write_table(table, tmp_path / "owt/plain_text" / name, row_group_size=100)
    data_lab.in_process(monkeypatch)
    monkeypatch.setattr(prepare, "run_tasks", lambda function, items, **_: map(function, items))

    def build(**data):
        config = RunConfig(
            store=str(tmp_path / "store"),
            corpus=OpenWebTextCorpus(repo=str(tmp_path / "owt")),
            tokenizer=BpeTokenizer(vocab_size=300),
            data=DataConfig(shard_tokens=20_000, **data),
        )
        made = data_lab.Prepared(config)
        return made, made.tokens()

    return build


def documents_of(prepared, tokens, side):
    encoding = load_tokenizer(prepared.tokenizer.folder())
    found = []
    for key in sorted(tokens.record.files):
        if key.startswith(side) and key.endswith(".bin"):
            pieces = split_documents(
                open_shard(tokens.path(key)), vocabulary=encoding.n_vocab, eot=encoding.eot_token, name=key
            )
            found += [encoding.decode(piece.tolist()) for piece in pieces]
    return found


def test_the_split_nanogpt_holds_out_what_datasets_holds_out_and_keeps_repeats(prepared):
    made, tokens = prepared(split="nanogpt")
    table = datasets.Dataset.from_dict({"text": TEXTS})
    split = table.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert sorted(documents_of(made, tokens, "val")) == sorted(split["test"]["text"])
    assert sorted(documents_of(made, tokens, "train")) == sorted(split["train"]["text"])
    assert tokens.record.metrics["documents"] == len(TEXTS)
    assert tokens.record.metrics["repeats"] == 0
    assert "equals_nanogpt" not in tokens.record.metrics  # only the whole corpus can be compared
    assert made.corpus.record.metrics["files"] == FILES
    assert set(made.corpus.record.files) == {"corpus.json"}  # the documents stay where they are
    verify_tokens(tokens, made.tokenizer, quiet=True)


def test_the_split_hash_drops_repeats_that_lie_in_different_files(prepared):
    made, tokens = prepared(validation_fraction=0.2)
    unique = list(dict.fromkeys(TEXTS))
    assert len(unique) == 2600
    assert tokens.record.metrics["repeats"] == len(TEXTS) - len(unique)
    held_out = [text for text in unique if is_validation(document_id(text), 0.2)]
    assert documents_of(made, tokens, "val") == held_out
    assert documents_of(made, tokens, "train") == [text for text in unique if text not in set(held_out)]
    assert verify_tokens(tokens, made.tokenizer, quiet=True).shared == 0


def test_without_dedup_repeats_stay_on_their_side(prepared):
    made, tokens = prepared(validation_fraction=0.2, dedup=False)
    assert tokens.record.metrics["repeats"] == 0
    assert len(documents_of(made, tokens, "train")) + len(documents_of(made, tokens, "val")) == len(TEXTS)
    assert verify_tokens(tokens, made.tokenizer, quiet=True).shared == 0
