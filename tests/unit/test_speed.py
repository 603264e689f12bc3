"""Speed and memory: what is measured is complete, of the right models, by turns; no test asserts a time."""

import json
import time
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from jobs import run
from jobs import speed as speed_verb
from model.config import GPT2Config, Kron, ModelSpec
from model.export import save_native, to_dense
from pipeline.chain import speed_identity
from pipeline.compress.card import Card
from pipeline.compress.folders import check_logits, write_folders
from pipeline.compress.served import serve
from pipeline.config.load import validate
from pipeline.config.speed import SpeedConfig
from pipeline.errors import CompressError, ConfigError, EvaluateError, PreflightError
from pipeline.evaluate import memory
from pipeline.evaluate.speed import SIDES, speed_artifact
from pipeline.evaluate.turns import Decoding, Spread, take_turns
from pipeline.store.artifacts import Identity, Store

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=300)
UP = Kron(m1=8, n1=16, m2=4, n2=8, terms=2, scales=True, gather_out=True)
MATRICES = {f"h.{i}.mlp.{role}": m for i in (0, 1) for role, m in (("c_fc", UP), ("c_proj", UP.transposed()))}
SPEC = ModelSpec.dense(ARCH).with_matrices(MATRICES)
CONFIG = SpeedConfig(past=4, tokens=3, batches=(1, 2), rounds=6, seconds=0.0)
TEACHER, MODEL = Identity("teacher", "tiny"), Identity("model", "tiny-s0")


@pytest.fixture(scope="module")
def store(tmp_path_factory, toy):
    """A store with a dense teacher and an exported model."""
    store = Store(tmp_path_factory.mktemp("store"))
    folders = tmp_path_factory.mktemp("folders")
    save_native(toy(ModelSpec.dense(ARCH)), folders / "teacher")
    write_folders(
        toy(SPEC),
        folders / "model",
        card=Card(name="toy", spec=SPEC, making=(), has_tokenizer=False),
        where="toy",
    )
    for identity in (TEACHER, MODEL):
        with store.attempt(identity) as attempt:
            attempt.location.put_folder(folders / identity.kind)
            attempt.publish(metrics={})
    return store


def measured(store, config=CONFIG):
    identity = Identity("speed", "tiny", {"threads": 1}, {"model": MODEL, "teacher": TEACHER})
    return speed_artifact(
        identity, config, model=store.require(MODEL), teacher=store.require(TEACHER), store=store, quiet=True
    )


@pytest.fixture(scope="module")
def artifact(store):
    return measured(store)


@pytest.fixture(scope="module")
def figures(artifact):
    return {(f["side"], f["quantity"]): f for f in artifact.record.metrics["figures"]}


def test_every_side_has_every_quantity(figures):
    quantities = ("prefill", "decode@1", "decode@2", "memory", "checkpoint")
    assert set(figures) == {(side, quantity) for side in SIDES for quantity in quantities}
    assert all(figure["value"] > 0 and figure["ratio"] > 0 for figure in figures.values())
    assert all(figures["dense", quantity]["ratio"] == 1.0 for quantity in quantities)
    for figure in figures.values():
        if figure["unit"] != "bytes":
            assert figure["low"] <= figure["value"] <= figure["high"]
            assert figure["ratio_low"] <= figure["ratio"] <= figure["ratio_high"]


def test_a_ratio_is_that_of_two_calls_of_one_round(artifact, figures):
    calls = pd.read_parquet(artifact.path("turns.parquet"))
    table = calls.pivot_table(index=["quantity", "round"], columns="side", values="seconds")
    assert not table.isna().any(axis=None)
    for quantity, rounds in table.groupby("quantity"):
        ratio = (rounds["dense"] / rounds["factored"]).median()
        assert figures["factored", quantity]["ratio"] == pytest.approx(ratio)
        assert figures["factored", quantity]["rounds"] == len(rounds) >= 6
    seconds = table.loc["prefill"]["factored"].median()
    assert figures["factored", "prefill"]["value"] == pytest.approx(ARCH.n_ctx // 2 / seconds)


def test_a_checkpoint_is_as_large_as_its_file(store, figures):
    model, teacher = store.require(MODEL), store.require(TEACHER)
    for side, found in (("factored", model), ("materialised", model), ("dense", teacher)):
        folder = {"factored": "factored/", "materialised": "stock/", "dense": ""}[side]
        size = found.path(f"{folder}model.safetensors").stat().st_size
        assert figures[side, "checkpoint"]["value"] == size


def test_the_record_says_where_it_was_measured_and_what(artifact):
    record = artifact.record
    assert record.settings["place"]["chip"]
    assert record.settings["place"]["torch"] == torch.__version__
    assert record.metrics["parameters"] == SPEC.num_parameters("tied_all")
    assert record.metrics["parameters_by_side"]["dense"] > record.metrics["parameters"]
    assert set(record.metrics["held"]) == {"prefill", "decode@1", "decode@2"}
    json.dumps(record.metrics, allow_nan=False)


def test_the_sides_give_the_logits_of_what_they_stand_for(toy):
    model = toy(SPEC)
    assert check_logits(model, serve(model), where="toy", so="") < 1e-4
    assert check_logits(model, serve(to_dense(model)), where="toy", so="") < 1e-4


def test_what_gives_other_logits_is_not_measured(store, monkeypatch, toy):
    other = toy(ModelSpec.dense(ARCH), seed=3)
    monkeypatch.setattr("pipeline.evaluate.speed.to_dense", lambda model: other)
    with pytest.raises(CompressError, match=r"materialised.*nothing was measured"):
        measured(store)


def test_decoding_with_a_cache_is_greedy_decoding_without(toy):
    network = serve(toy(SPEC))
    prompt = torch.randint(300, (2, 5), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        step = Decoding(network, prompt, tokens=3)
        found = [step() for _ in range(7)]
        ids = prompt
        for _ in range(4):
            ids = torch.cat([ids, network(ids).logits[:, -1:].argmax(-1)], dim=1)
    expected = list(ids[:, 6:].split(1, dim=1))  # the first new token is there before the first call
    assert [each.tolist() for each in found[:3]] == [each.tolist() for each in expected]
    assert [each.tolist() for each in found[3:6]] == [each.tolist() for each in found[:3]]
    assert found[6].tolist() == found[0].tolist()


def test_sides_take_turns_and_each_begins():
    called: list[str] = []
    sides = {name: lambda name=name: called.append(name) for name in "abc"}
    took = take_turns(sides, rounds=4).seconds
    assert "".join(called) == "abcbcacababc"
    assert {name: len(calls) for name, calls in took.items()} == {"a": 4, "b": 4, "c": 4}


def test_turns_end_when_their_time_is_over_but_not_before_the_fewest():
    heard: list[float] = []
    took = take_turns({"a": lambda: None}, rounds=1000, fewest=5, seconds=0.0, on_round=heard.append).seconds
    assert heard == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert len(took["a"]) == 5
    take_turns({"a": lambda: None}, rounds=4, on_round=heard.append)
    assert heard[5:] == [0.25, 0.5, 0.75, 1.0]


def test_waiting_is_no_work():
    assert take_turns({"waits": lambda: time.sleep(0.02)}, rounds=5).held < 0.5


def test_the_interval_of_a_ratio_holds_the_true_median_nineteen_times_in_twenty():
    rng = np.random.default_rng(0)
    held = []
    for _ in range(400):
        below = np.exp(rng.normal(0, 0.3, 41))
        found = Spread.of_ratio(below * 1.5 * np.exp(rng.standard_t(2, 41) * 0.1), below)
        held.append(found.low <= 1.5 <= found.high)
    assert 0.92 <= np.mean(held) <= 0.99


def test_a_lost_process_is_one_line(monkeypatch):
    class Lost:
        def submit(self, *arguments):
            raise memory.BrokenProcessPool("died")

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(memory, "ProcessPoolExecutor", lambda *a, **k: Lost())
    load = memory.Load(prompt=4, past=2, tokens=2, batch=1, dtype="float32", threads=1)
    with pytest.raises(EvaluateError, match="there was no more"):
        memory.resident_peaks({"dense": memory.Weights("nowhere", is_materialised=False)}, load)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_not_there_is_one_line(store):
    with pytest.raises(PreflightError, match=r"speed\.device='cuda' is not there"):
        measured(store, replace(CONFIG, device="cuda"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
@pytest.mark.parametrize("verb", [run, speed_verb], ids=["run", "speed"])
def test_a_device_that_is_not_there_is_said_before_anything_is_built(verb, tmp_path, capsys):
    words = ["--speed.enabled", "true", "--speed.device", "cuda", "--store", str(tmp_path / "store")]
    with pytest.raises(PreflightError, match=r"speed\.device='cuda' is not there") as caught:
        verb.main(words)
    assert caught.value.exit_code == 3
    assert not list(tmp_path.rglob("record.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_every_quantity_and_the_memory_of_one_side(store):
    record = measured(store, replace(CONFIG, device="cuda")).record
    sizes = {(f["side"], f["quantity"]): f["value"] for f in record.metrics["figures"]}
    assert len(sizes) == 3 * 5
    for side in SIDES:
        assert sizes[side, "memory"] > 0.9 * sizes[side, "checkpoint"]
    assert record.settings["place"]["chip"] == torch.cuda.get_device_name()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"batches": []}, r"speed\.batches"),
        ({"batches": [4, 4]}, r"speed\.batches"),
        ({"past": 0}, r"speed\.past=0"),
        ({"rounds": 5}, r"speed\.rounds=5 must be 6"),
        ({"device": "auto"}, r"speed\.device"),
        ({"promt": 3}, "promt"),
    ],
)
def test_a_malformed_config_is_one_line(said, message):
    with pytest.raises(ConfigError, match=message) as caught:
        validate({"speed": said}, source="study.toml")
    assert "\n" not in str(caught.value)


def config(**said):
    return validate({"speed": said}, source="study.toml")


def address(**said):
    return speed_identity(config(**said), MODEL, TEACHER).address


def test_what_is_measured_is_the_address_and_how_long_is_not():
    assert address(rounds=7, seconds=1.0, enabled=True) == address()
    others = [
        address(threads=2),
        address(dtype="bfloat16"),
        address(past=8),
        address(batches=[1]),
        address(prompt=9),
    ]
    assert len({address(), *others}) == 6


def test_a_prompt_beyond_the_context_is_refused():
    with pytest.raises(ConfigError, match=r"speed\.prompt=300 is longer than the model's context, 256"):
        address(prompt=300)
    with pytest.raises(ConfigError, match=r"speed\.past=250 and speed\.tokens=32"):
        address(past=250)


def test_the_plan_of_the_verb_shows_what_it_would_measure_and_other_verbs_do_not(tmp_path, capsys):
    from jobs import run, speed

    words = ["--plan", "--store", str(tmp_path / "store"), "--method.shape", "[64, 128]"]
    assert speed.main(words) == 0
    assert "speed/kron_vl-s0-cpu-" in capsys.readouterr().out
    assert run.main(words) == 0
    assert "speed/" not in capsys.readouterr().out
    assert run.main([*words, "--speed.enabled", "true"]) == 0
    assert "speed/kron_vl-s0-cpu-" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()
