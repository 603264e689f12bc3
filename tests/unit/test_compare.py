"""`krony compare`: two models side by side, and one line for whatever cannot be compared."""

import io
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from analysis.stats import mcnemar
from analysis.versus import versus
from analysis.versus_text import versus_text
from jobs import cli
from pipeline.store.artifacts import Store

PROTOCOLS = ("krony/wt103", "lambada/openai_last_word")


@pytest.fixture(scope="module")
def study(study_store, tmp_path_factory) -> Store:
    """Models and their scores under a perplexity and an accuracy; read only."""
    chosen = [model for model in study_store.MODELS if model.name in ("kron-82m", "kron-82m-s1", "prune-95m")]
    return study_store.write_study(tmp_path_factory.mktemp("pairs"), models=chosen, protocols=PROTOCOLS)


def losses(store: Store, model: str, protocol: str) -> pd.DataFrame:
    """Of the model of a run of that variant."""
    run = next(r for r in store.records("run") if r.settings["name"] == model)
    exported = next(r for r in store.records("model") if r.inputs["run"].address == run.address)
    scores = next(
        r
        for r in store.records("scores")
        if r.inputs["model"].address == exported.address and r.config["protocol"] == protocol
    )
    return pd.read_parquet(io.BytesIO(store.open(scores.address).path("losses.parquet").read_bytes()))


def test_two_models_side_by_side(study):
    found = versus("kron-82m", "prune-95m", store=study)
    text = versus_text(found)
    assert found.addresses[0].startswith("run/kron_vl-s0-")
    settings = {pair.name: (pair.a, pair.b) for pair in found.settings}
    assert settings["init.method.name"] == ("kron_vl", "kron_prune")
    assert settings["init.budget.params"] == (81_972_576, 96_128_304)
    assert settings["init.method.eps_init"] == (None, 0.1)  # only one side has it
    assert not any(name.startswith("run.") for name in settings)  # trained alike
    assert "81,972,576" in text
    assert "85.3 %" in text
    assert "h.11.mlp.c_proj" in text
    assert max(map(len, text.splitlines())) <= 130


def test_differences_are_paired_over_the_windows(study):
    found = versus("kron-82m", "prune-95m", store=study)
    measure = next(each for each in found.measures if each.protocol == "krony/wt103")
    a, b = (losses(study, name, "krony/wt103") for name in ("kron-82m", "prune-95m"))
    gaps = (a["nll"] / a["tokens"] - b["nll"] / b["tokens"]).to_numpy()
    assert measure.difference.gap.estimate == pytest.approx(gaps.mean())
    half = 1.96 * gaps.std() / np.sqrt(len(gaps))
    assert measure.difference.gap.high == pytest.approx(gaps.mean() + half, abs=0.15 * half)
    assert measure.difference.detectable == pytest.approx(2.8 / 1.96 * half, rel=0.1)
    assert measure.a["low"] < measure.a["value"] < measure.a["high"]
    swapped = versus("prune-95m", "kron-82m", store=study).measures
    mirrored = next(each for each in swapped if each.protocol == "krony/wt103").difference.gap
    assert mirrored.estimate == pytest.approx(-measure.difference.gap.estimate)
    assert mirrored.low == pytest.approx(-measure.difference.gap.high)


def test_right_answers_are_compared_by_mcnemar(study):
    rows = json.loads(versus("kron-82m", "kron-82m-s1", store=study).json())["measures"]
    row = next(each for each in rows if each["metric"] == "accuracy")
    a, b = (losses(study, name, PROTOCOLS[1])["correct"].to_numpy() for name in ("kron-82m", "kron-82m-s1"))
    assert row["a_against_b"]["test"] == "McNemar"
    assert row["a_against_b"]["p_value"] == pytest.approx(mcnemar(a, b))
    assert row["a_against_b"]["worse_by"] == pytest.approx(b.mean() - a.mean())
    assert row["a"]["value"] == pytest.approx(a.mean())
    assert row["a"]["low"] < row["a"]["value"] < row["a"]["high"]


def test_seeds_of_one_model_differ_in_the_seed_alone(study):
    found = versus("kron-82m", "kron-82m-s1", store=study)
    assert [(pair.name, pair.a, pair.b) for pair in found.settings] == [("run.seed", 0, 1)]
    assert all(pair.a == pair.b for pair in found.errors)
    assert len(found.errors) == 24


def test_models_of_two_stores_are_compared_by_their_paths(study, study_store, tmp_path):
    again = [replace(model, lr=3e-4) for model in study_store.MODELS if model.name == "kron-82m"]
    other = study_store.write_study(tmp_path / "a folder", models=again, protocols=PROTOCOLS[:1])
    model = other.records("model")[0].address
    found = versus("kron-82m", f"{other.root.uri}/{model}/", store=study)
    assert [pair.name for pair in found.settings] == ["run.train.lr"]
    assert [measure.protocol for measure in found.measures] == ["krony/wt103"]
    assert found.measures[0].difference is not None


def test_a_lost_file_costs_the_difference_alone(study, study_store, tmp_path):
    chosen = [model for model in study_store.MODELS if model.name in ("kron-82m", "prune-95m")]
    store = study_store.write_study(tmp_path, models=chosen, protocols=PROTOCOLS[:1])
    scores = next(record for record in store.records("scores") if record.name.startswith("kron_prune"))
    store.open(scores.address).path("losses.parquet").write_bytes(b"no parquet")
    found = versus("kron-82m", "prune-95m", store=store)
    assert found.measures[0].difference is None
    assert found.measures[0].b["value"] > 0
    assert any(problem.startswith(f"{scores.address}: no losses per unit") for problem in found.problems)
    assert "missing   scores/kron_prune" in versus_text(found)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("kron-82n", "prune-95m", "is called 'kron-82n'; did you mean run/kron_vl-s0-"),
        ("kron_vl", "prune-95m", "'kron_vl' could be model/kron_vl-s0-"),
        ("prune-95m", "run/kron_prune", "are both run/kron_prune-s0-"),
        ("prune-95m", "tokenizer/gpt2-{}", "is of kind 'tokenizer'; expected one of: model, run"),
        ("prune-95m", "/tmp", "is called 'tmp'"),
    ],
)
def test_what_cannot_be_compared_is_one_line(study, capsys, first, second, expected):
    tokenizer = study.records("tokenizer")[0].fingerprint[:8]
    words = [first, second.format(tokenizer), "--store", study.root.uri]
    assert cli.run("compare", words) == 1
    shown = capsys.readouterr()
    assert not shown.out
    assert len(shown.err.splitlines()) == 1
    assert expected in shown.err


def test_nothing_in_common_is_one_line_that_names_the_protocols(study, study_store, tmp_path, capsys):
    dense = [model for model in study_store.MODELS if model.name == "dense"]
    other = study_store.write_study(tmp_path, models=dense, protocols=("krony/wt2",))
    path = f"{other.root.uri}/{other.records('model')[0].address}"
    assert cli.run("compare", ["prune-95m", path, "--store", study.root.uri]) == 1
    line = capsys.readouterr().err
    assert "nothing in common: run/kron_prune-s0-" in line
    assert "under krony/wt103, lambada/openai_last_word and model/dense-s0-" in line
    assert "under krony/wt2 was measured; `krony eval` measures more" in line
    assert cli.run("compare", ["prune-95m", "--store", study.root.uri]) == 2


def test_json_is_what_the_table_shows(study, capsys):
    assert cli.run("compare", ["kron-82m", "prune-95m", "--store", study.root.uri, "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    assert [row["protocol"] for row in body["measures"]] == list(PROTOCOLS)
    assert body["a"]["address"].startswith("run/kron_vl-s0-")
    assert body["sizes"][0] == {"name": "parameters", "a": 81_972_576, "b": 96_128_304}
    assert all(0 <= row["a_against_b"]["p_adjusted"] <= 1 for row in body["measures"])
