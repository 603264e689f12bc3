"""The same numbers three ways: our code, lm-evaluation-harness on our model, its own class on our export."""

import json

import numpy as np
import pytest
import torch

from model.config import GPT2Config, Kron, ModelSpec
from model.gpt2 import GPT2
from pipeline.compress.card import Card
from pipeline.compress.folders import write_folders
from pipeline.data.tokenizer import train_bpe
from pipeline.errors import EvaluateError
from pipeline.evaluate.protocols import get_protocol
from pipeline.evaluate.score import evaluate
from pipeline.evaluate.tasks import HarnessTask, write_bound
from pipeline.evaluate.texts import Text

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

WORDS = ["the", "house", "hill", "had", "a", "door", "and", "small", "bell", "river"]
LAST = {"brass": "bell", "red": "door", "old": "house"}
N_CTX = 40


def _passages(count: int) -> tuple[str, ...]:
    """Passages whose last word follows from the one before it; some are too long, some oddly spaced."""
    draw = np.random.default_rng(3)
    rows = []
    for i in range(count):
        words = list(draw.choice(WORDS, int(draw.integers(3, 20)) + 40 * (i % 17 == 5)))
        words[1] += ('"', "", ",", "…")[i % 4]
        before = list(LAST)[i % 3]
        gap = ("  ", "\n ", " \t ")[i % 9 - 1] if 0 < i % 9 < 4 else " "
        rows.append(" ".join([*words, before]) + gap + LAST[before] + ("", "", ".", "—unseen")[i % 4])
    return tuple(rows)


ROWS = _passages(60)
PASSAGES = Text("lambada-openai", ROWS, "here")
LINES = [f" {' , '.join(ROWS[7 * i : 7 * i + 3])} @-@ {i} . \n" for i in range(5)]
PAGES = Text(
    "wikitext-2-raw-v1",
    tuple(
        row for i, line in enumerate(LINES) for row in ("", f" = Page {i} = \n", "", line, " = = Part = = \n")
    ),
    "here",
)
KRON = {"h.0.mlp.c_fc": Kron(m1=32, n1=32, m2=1, n2=4, terms=2)}


@pytest.fixture(scope="module")
def encoding():
    return train_bpe(ROWS[:30], vocab_size=320)


@pytest.fixture(scope="module", params=["dense", "factored"])
def model(request, encoding):
    """A model that has learned some of the passages."""
    arch = GPT2Config(n_layer=1, n_head=2, n_embd=32, n_ctx=N_CTX, vocab_size=encoding.n_vocab)
    spec = ModelSpec.dense(arch)
    network = GPT2(spec.with_matrices(KRON) if request.param == "factored" else spec).init_weights(seed=2)
    rows = [encoding.encode_ordinary(row)[-N_CTX - 1 :] for row in ROWS[:40]]
    ids = torch.tensor([row + [-1] * (N_CTX + 1 - len(row)) for row in rows])
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        network(ids[:, :-1].clamp(min=0), ids[:, 1:]).div(len(rows) * N_CTX).backward()
        optimizer.step()
    return network.eval()


@pytest.fixture
def theirs(model, encoding, tmp_path):
    """The harness's own class for transformers, over what we export: stock where dense, else factored."""
    pytest.importorskip("accelerate", reason="the harness's class for transformers needs accelerate")
    from lm_eval.models.huggingface import HFLM

    factored = isinstance(model.spec.blocks[0].mlp_c_fc, Kron)
    card = Card(name="toy", spec=model.spec, making=(), has_tokenizer=True)
    write_folders(model, tmp_path, card=card, where="toy", encoding=encoding)
    folder = tmp_path / ("factored" if factored else "stock")
    return HFLM(
        pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, trust_remote_code=factored
    )


def ask(lm, folder, name):
    """What the harness says of any model of its own about the task files in `folder`."""
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.tasks import TaskManager

    found = TaskManager(include_path=folder, include_defaults=False).load([name])
    for task in found["tasks"].values():
        task.set_config(key="num_fewshot", value=0)
    return harness(lm, found, bootstrap_iters=0)


def test_our_last_word_is_the_harness_to_the_last_bit(model, encoding):
    ours = evaluate(model, encoding, get_protocol("lambada/openai_last_word"), PASSAGES, quiet=True)
    protocol, task = get_protocol("lm_eval/lambada_openai"), HarnessTask("lambada_openai", PASSAGES)
    harness = evaluate(model, encoding, protocol, task, quiet=True)
    assert 0.1 < harness.value < 0.9
    assert (harness.value, harness.perplexity) == (ours.value, ours.perplexity)
    assert (harness.stderr, harness.loss, harness.token_loss) == (ours.stderr, ours.loss, ours.token_loss)
    assert harness.tokens_sha256 == ours.tokens_sha256
    assert harness.units.to_parquet() == ours.units.to_parquet()
    mine, same = (s.metrics() | {"protocol": "", "window": 0} for s in (harness, ours))
    assert mine == same


def test_the_harness_own_class_over_our_export_agrees(model, encoding, theirs, tmp_path):
    task = HarnessTask("lambada_openai", PASSAGES)
    ours = evaluate(model, encoding, get_protocol("lm_eval/lambada_openai"), task, quiet=True)
    write_bound(task, tmp_path)
    found = ask(theirs, tmp_path, task.name)
    assert found["results"][task.name]["acc,none"] == ours.value
    # its class sums the tokens of a word in fp32, we in fp64: 6 digits are the same
    assert found["results"][task.name]["perplexity,none"] == pytest.approx(ours.perplexity, rel=2e-6)
    samples = found["samples"][task.name]
    assert [bool(sample["acc"]) for sample in samples] == ours.units.correct.tolist()
    assert [-sample["perplexity"] for sample in samples] == pytest.approx(ours.units.nll.tolist(), abs=2e-5)


def test_rolling_documents_agree_with_the_harness_own_class(model, encoding, theirs, tmp_path):
    task = HarnessTask("wikitext", PAGES)
    ours = evaluate(model, encoding, get_protocol("lm_eval/wikitext"), task, batch=3, quiet=True)
    write_bound(task, tmp_path)
    found = ask(theirs, tmp_path, task.name)["results"][task.name]
    assert ours.value == pytest.approx(found["word_perplexity,none"], rel=1e-5)
    assert ours.bits_per_byte == pytest.approx(found["bits_per_byte,none"], rel=1e-6)
    assert ours.value == pytest.approx(np.exp(ours.units.nll.sum() / ours.units.tokens.sum()), rel=1e-12)
    assert (ours.protocol.metric, ours.protocol.weighting, ours.unit) == ("perplexity", "words", "document")
    assert len(ours.units.nll) == 5
    assert ours.windows > 10  # every page is longer than the context
    assert ours.scored == ours.tokens


def write_tasks(folder):
    """A user's task files: choices of an answer, written answers, a group, and one that no table can hold."""
    rows = [{"q": row.rsplit(" ", 1)[0], "a": row.rsplit(" ", 1)[1]} for row in ROWS[:12]]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(folder / "rows.jsonl")},
            "cache_dir": str(folder / "c"),
        },
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = {
        "output_type": "multiple_choice",
        "doc_to_choice": WORDS[:4],
        "doc_to_target": "{{a|length % 4}}",
    }
    written = {
        "output_type": "generate_until",
        "doc_to_target": " {{a}}",
        "generation_kwargs": {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    binary = {"doc_to_choice": ["door", "bell"], "doc_to_target": "{{a|length % 2}}"}
    f1 = choice | binary | {"metric_list": [{"metric": "f1", "aggregation": "f1", "higher_is_better": True}]}
    long = written | {"generation_kwargs": {"until": ["."], "do_sample": False}}
    unsafe = written | {"unsafe_code": True}
    nowhere = choice | {"dataset_kwargs": {"data_files": {"test": str(folder / "absent.jsonl")}}}
    tasks = {
        "choose": choice,
        "write": written,
        "blend": f1,
        "long": long,
        "unsafe": unsafe,
        "nowhere": nowhere,
    }
    for name, task in tasks.items():
        lines = {"task": name, **common, **task}
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in lines.items())
        (folder / f"{name}.yaml").write_text(text)
    (folder / "both.yaml").write_text("group: both\ntask: [choose, write]\n")


@torch.no_grad()
def test_task_files_of_a_user_are_asked_as_they_stand(model, encoding, theirs, tmp_path):
    write_tasks(tmp_path)
    for name, unit in (("choose", "acc"), ("write", "exact_match")):
        protocol = get_protocol(f"lm_eval/{name}")
        ours = evaluate(
            model, encoding, protocol, HarnessTask(name, folder=str(tmp_path)), batch=5, quiet=True
        )
        found = ask(theirs, tmp_path, name)
        assert ours.value == found["results"][name][f"{unit},none"]
        assert ours.units.correct.tolist() == [bool(sample[unit]) for sample in found["samples"][name]]
        assert ours.settings["results"][unit] == ours.value
        assert "loss" not in ours.metrics()
        assert ours.windows == len(ours.units.correct) == 12
        if name == "write":
            answers = [sample["resps"][0][0] for sample in found["samples"][name]]
            assert len(set(answers)) > 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both", "a group of tasks"),
        ("blend", "the task gives f1; a table needs acc or exact_match"),
        ("absent", "no such task"),
        ("long", "asks for up to 256 tokens, the model sees"),
        ("unsafe", "cannot run this task here: .* marked as unsafe"),
        ("nowhere", "the task or its data cannot be read"),
    ],
)
def test_what_no_table_can_hold_is_refused_in_a_line(model, encoding, tmp_path, name, message):
    write_tasks(tmp_path)
    with pytest.raises(EvaluateError, match=message):
        evaluate(
            model,
            encoding,
            get_protocol(f"lm_eval/{name}"),
            HarnessTask(name, folder=str(tmp_path)),
            quiet=True,
        )
