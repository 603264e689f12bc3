"""Scoring a real model and publishing it: what the record says, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from model.config import GPT2Config, ModelSpec
from model.export import save_native
from model.gpt2 import GPT2
from pipeline.config.schema import EvalConfig
from pipeline.data.tokenizer import tokenizer_json, train_bpe
from pipeline.errors import DataError, EvaluateError, PreflightError
from pipeline.evaluate import texts
from pipeline.evaluate.lambada import passages
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.score import choose_device, evaluate, score_artifact, validation_sequence
from pipeline.evaluate.sequences import TokenSequence, token_bytes
from pipeline.evaluate.texts import Text, TextSource
from pipeline.store.artifacts import Identity, Store

WORDS = ["the", "old", "house", "hill", "had", "a", "red", "door", "and", "small", "brass", "bell"]
ROWS = tuple(" ".join(np.random.default_rng(i).choice(WORDS, 12)) for i in range(30))
VALIDATION = get_protocol("corpus/val")
LAST_WORD = get_protocol("lambada/openai_last_word")


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(ROWS, vocab_size=300)


@pytest.fixture(scope="module")
def model(encoding):
    arch = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=32, vocab_size=encoding.n_vocab)
    return GPT2(ModelSpec.dense(arch)).init_weights(seed=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory, encoding, model):
    """A store with a tokenizer, two validation shards and a teacher."""
    store = Store(tmp_path_factory.mktemp("store"))
    with store.attempt(Identity("tokenizer", "bpe")) as attempt:
        attempt.location.put_bytes("tokenizer.json", tokenizer_json(encoding))
        attempt.publish(metrics={})
    with store.attempt(Identity("tokens", "shards")) as attempt:
        for name, rows in (("train-00000", ROWS[:5]), ("val-00000", ROWS[5:20]), ("val-00001", ROWS[20:])):
            ids = [i for row in rows for i in (*encoding.encode_ordinary(row), encoding.eot_token)]
            header = np.zeros(256, dtype="<i4")
            header[:3] = 20240520, 1, len(ids)
            attempt.location.put_bytes(f"{name}.bin", header.tobytes() + np.array(ids, dtype="<u2").tobytes())
        attempt.publish(metrics={})
    with store.attempt(Identity("teacher", "tiny")) as attempt:
        folder = tmp_path_factory.mktemp("teacher")
        save_native(model, folder)
        attempt.location.put_folder(folder)
        attempt.publish(metrics={})
    return store


def artifact(store, kind):
    return store.open(store.records(kind)[0].address)


def published(store, protocol, **changes):
    identity = Identity("scores", "test", {"protocol": protocol.id}, {"model": Identity("teacher", "tiny")})
    return score_artifact(
        identity,
        protocol,
        model=artifact(store, "teacher"),
        tokens=artifact(store, "tokens"),
        tokenizer=artifact(store, "tokenizer"),
        config=EvalConfig(**{"device": "cpu", "batch": 4} | changes),
        store=store,
        quiet=True,
    )


def test_the_record_says_what_the_number_means(store, model, encoding):
    scores = published(store, VALIDATION)
    metrics = scores.record.metrics
    assert metrics["protocol"] == "corpus/val@ctx32"
    assert metrics["value"] == pytest.approx(math.exp(metrics["loss"]))
    assert metrics["parameters"] == sum(p.numel() for p in model.parameters())
    assert metrics["krony_parameters"] == metrics["parameters"] - 32 * 16
    sequence = validation_sequence(artifact(store, "tokens"), encoding)
    assert metrics["tokens"] == len(sequence.ids) == metrics["scored"] + 1
    assert metrics["tokens_sha256"] == sequence.sha256
    losses = pd.read_parquet(scores.path("losses.parquet"))
    assert len(losses) == metrics["units"] == 25  # one row per validation document
    assert losses["nll"].sum() / losses["tokens"].sum() == pytest.approx(metrics["loss"])
    json.dumps(dict(metrics), allow_nan=False)


def test_bits_per_byte_counts_the_bytes_of_the_documents(store, model, encoding):
    sequence = validation_sequence(artifact(store, "tokens"), encoding)
    assert int(sequence.token_bytes[sequence.ids].sum()) == sum(len(row.encode()) for row in ROWS[5:])
    scores = evaluate(model, encoding, VALIDATION, sequence, quiet=True)
    assert scores.bits_per_byte is not None
    assert 0 < scores.bits_per_byte < 8 * 3


def test_scoring_twice_gives_the_same_bytes(store):
    first, second = published(store, VALIDATION), published(store, VALIDATION)
    assert first.record.digest == second.record.digest
    assert first.record.metrics == second.record.metrics


def test_last_word_agrees_with_one_passage_at_a_time(store, model, encoding, tmp_path, monkeypatch):
    rows = tuple(f"{row} bell" for row in ROWS)
    lines = "".join(json.dumps({"text": row}) + "\n" for row in rows)
    (tmp_path / "lambada_test.jsonl").write_text(lines)
    source = replace(texts.TEXTS["lambada-openai"], sha256=Text("t", rows, "").sha256)
    assert isinstance(source, TextSource)
    monkeypatch.setattr(texts, "TEXTS", {"lambada-openai": source})
    metrics = published(store, LAST_WORD, texts=str(tmp_path)).record.metrics
    right, total = 0, 0.0
    for row in rows:
        ids, context = encoding.encode_ordinary(row), encoding.encode_ordinary(row.removesuffix(" bell"))
        with torch.no_grad():
            log_p = model(torch.tensor([ids[:-1]]))[0].double().log_softmax(-1)
        goal = ids[len(context) :]
        tail = log_p[len(context) - 1 :]
        total -= float(sum(tail[i, token] for i, token in enumerate(goal)))
        right += tail.argmax(-1).tolist() == goal
    assert metrics["value"] == pytest.approx(right / len(rows))
    assert metrics["perplexity"] == pytest.approx(math.exp(total / len(rows)), rel=1e-5)
    assert metrics["windows"] == len(rows)


def test_batches_and_padding_do_not_change_the_last_word(model, encoding):
    text = Text(
        "t", tuple(f"{' '.join(row.split()[: 3 + i % 9])} bell" for i, row in enumerate(ROWS)), "here"
    )
    values = [evaluate(model, encoding, LAST_WORD, text, batch=batch, quiet=True) for batch in (1, 4, 30)]
    assert [v.perplexity for v in values] == pytest.approx([values[0].perplexity] * 3, rel=1e-6)
    assert all((v.units.correct == values[0].units.correct).all() for v in values)


def test_a_long_passage_is_cut_from_the_left(encoding):
    [item] = passages(Text("t", (" ".join(WORDS * 5) + " bell",), "here"), encoding, window=16)
    assert len(item.ids) == 17
    assert encoding.decode(list(item.ids[-item.targets :])) == " bell"


def test_a_passage_without_a_context_is_refused(encoding):
    with pytest.raises(EvaluateError, match="row 0 has no last word"):
        passages(Text("t", ("alone",), "here"), encoding, window=16)


def test_the_wrong_tokenizer_is_refused(model):
    other = train_bpe(ROWS, vocab_size=280)
    with pytest.raises(DataError, match=r"the model has 299 tokens, tokenizer .* has 280"):
        evaluate(model, other, VALIDATION, Text("t", ROWS, "here"), quiet=True)


def test_an_absent_device_is_refused():
    if not torch.cuda.is_available():
        with pytest.raises(PreflightError, match=r"eval\.device='cuda'"):
            choose_device("cuda")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")


def test_a_part_of_a_text_scores_as_the_text_cut_there(model, encoding):
    ids = np.random.default_rng(0).integers(0, encoding.n_vocab - 1, 300)
    ids[[40, 90, 200]] = encoding.eot_token
    ends = np.array([41, 91, 201, 300])
    whole = TokenSequence("t", ids, token_bytes(encoding), "0" * 64, ends)
    cut = TokenSequence("t", ids[:150], token_bytes(encoding), "0" * 64, np.array([41, 91, 150]))
    part, plain = get_protocol("corpus/val").at_tokens(150), get_protocol("corpus/val")
    mine, theirs = (
        evaluate(model, encoding, protocol, text, quiet=True)
        for protocol, text in ((part, whole), (plain, cut))
    )
    assert mine.metrics() | {"protocol": ""} == theirs.metrics() | {"protocol": ""}
    assert mine.units.to_parquet() == theirs.units.to_parquet()
    assert mine.scored == 149


def test_bf16_is_another_protocol_with_nearly_the_same_number(model, encoding):
    ids = np.random.default_rng(0).integers(0, encoding.n_vocab - 1, 300)
    text = TokenSequence("t", ids, token_bytes(encoding), "0" * 64, None)
    full, half = (
        evaluate(model, encoding, VALIDATION.at_precision(precision), text, quiet=True)
        for precision in ("fp32", "bf16")
    )
    assert half.protocol.id.endswith("@bf16")
    assert half.loss != full.loss
    assert half.loss == pytest.approx(full.loss, rel=2e-3)
    assert half.scored == full.scored


def test_the_harness_is_in_the_record_and_its_number_is_ours(store, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
    rows = tuple(f"{row} bell" for row in ROWS)
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    source = replace(texts.TEXTS["lambada-openai"], sha256=Text("t", rows, "").sha256)
    monkeypatch.setattr(texts, "TEXTS", {"lambada-openai": source})
    theirs = published(store, get_protocol("lm_eval/lambada_openai"), texts=str(tmp_path)).record
    ours = published(store, LAST_WORD, texts=str(tmp_path)).record
    assert theirs.metrics["protocol"] == "lm_eval/lambada_openai@ctx32"
    same = {key for key in ours.metrics if key != "protocol"}
    assert {key: theirs.metrics[key] for key in same} == {key: ours.metrics[key] for key in same}
    assert theirs.files["losses.parquet"].sha256 == ours.files["losses.parquet"].sha256
    assert theirs.settings["lm_eval"].startswith("0.4")
    assert theirs.settings["results"]["perplexity"] == theirs.metrics["perplexity"]
    assert (theirs.settings["task_version"], theirs.settings["num_fewshot"]) == (1.0, 0)
