"""Tracks: what an init says of its structure decides whom a model is ranked with, and two are never mixed."""

import json
from pathlib import Path

import pytest

from analysis.comparison import comparison
from analysis.findings import summary
from analysis.frames import Frames, load_frames
from analysis.page import build_page
from analysis.plots import size_quality
from analysis.tables import csv, latex, markdown, terminal
from analysis.tracks import track
from analysis.verdicts import differences_table
from model.compress.at_budget import recipes_at
from model.compress.contract import Plan
from model.config import SIZES, ModelSpec
from pipeline.store.artifacts import Store

SIZE = 81_972_576
CONTROLS = ("dense",)
OTHER_TABLE = ("kngpt2", "tqcompressor")


@pytest.fixture(scope="module")
def store(study_store, tmp_path_factory) -> Store:
    """Two models per track, those of A better than those of M, and two controls; read only."""
    models = [
        study_store.Invented("control", {"name": "dense"}, study_store.DENSE, -0.02),
        study_store.Invented("longer", {"name": "dense", "more": 1}, study_store.DENSE, 0.3),
        study_store.Invented("m-good", {"name": "kron_vl", "shape": [768, 768], "terms": 1}, SIZE, 0.37),
        study_store.Invented("m-bad", {"name": "svd"}, SIZE, 0.7),
        study_store.Invented("a-good", {"name": "svdllm_bc"}, SIZE, 0.05, targets="all_linear"),
        study_store.Invented("a-bad", {"name": "modegpt"}, SIZE, 0.2, targets="all_linear"),
    ]
    return study_store.write_study(
        tmp_path_factory.mktemp("tracks"), models=models, protocols=("krony/wt103",)
    )


@pytest.fixture(scope="module")
def frames(store) -> Frames:
    return load_frames(store)


@pytest.mark.parametrize("asked", ["M", "A"])
def test_a_report_and_a_plan_agree_on_the_track_of_every_method(asked):
    found = recipes_at(ModelSpec.dense(SIZES["gpt2"]), SIZE, track=asked)
    planned = {entry.label: entry.plan for entry in found if isinstance(entry.plan, Plan)}
    assert len(planned) > 5
    for label, plan in planned.items():
        expected = "" if label in CONTROLS + OTHER_TABLE else asked
        assert track(json.loads(json.dumps(plan.spec.to_json()))) == expected, label


def test_another_embedding_table_is_on_no_track():
    spec = ModelSpec.dense(SIZES["gpt2"]).to_json()
    assert track(spec) == ""
    spec["blocks"][3]["mlp_c_fc"] = {"kind": "low_rank", "rank": 8}
    assert track(spec) == "M"
    spec["embedding"] = {"kind": "kron"}
    assert track(spec) == ""


def test_models_of_two_tracks_are_never_ranked_together(frames):
    by = frames.scores.set_index("variant")
    assert dict(by["track"]) == {
        "": "", "control": "", "longer": "", "m-good": "M", "m-bad": "M", "a-good": "A", "a-bad": "A"
    }  # fmt: skip
    assert by["group"].nunique() == 2
    assert bool(by.loc["m-good", "is_best"])  # though both of track A are better at its size
    assert bool(by.loc["a-good", "is_best"])
    assert by.loc["m-bad", "worse_by"] == pytest.approx(0.33, abs=0.02)  # than m-good, not than a-good
    assert by.loc["a-bad", "worse_by"] == pytest.approx(0.15, abs=0.02)
    assert by.loc[["", "control", "longer"], "is_best"].isna().all()


def test_every_format_shows_the_track(frames):
    table = comparison(frames.arms)
    at = [column.title for column in table.columns].index("track")
    shown = {row[0].text: row[at].text for row in table.rows}
    assert shown == {
        "teacher": "–", "control": "–", "longer": "–",
        "m-good": "M", "m-bad": "M", "a-good": "A", "a-bad": "A",
    }  # fmt: skip
    assert [row[0].text for row in table.rows][3:] == ["m-good", "m-bad", "a-good", "a-bad"]
    bold = {row[0].text for row in table.rows if any(cell.is_best for cell in row)}
    assert bold == {"m-good", "a-good"}
    line = next(line for line in terminal(table).splitlines() if line.startswith("a-good"))
    assert " A " in line
    assert "| svdllm_bc | A |" in markdown(table)
    assert "svdllm\\_bc & A &" in latex(table)
    assert csv(frames.scores).splitlines()[0].split(",").count("track") == 1
    assert sum(note.startswith("track: ") for note in table.notes) == 1
    page = build_page(frames, store="store", written="").html()
    assert page.count(">A</td>") == 3  # two in the comparison, one against the best
    worse = {row[0].text: row[1].text for row in differences_table(frames.arms).rows}
    assert worse == {"m-bad": "M", "a-bad": "A"}


def test_each_track_has_its_own_leader_and_front(frames):
    said = summary(frames.arms)
    assert len(said) == 3
    assert "track M: kron_vl (768×768)⊗(1×4) r=1 is best of 2" in said[1]
    assert "track A: svdllm_bc is best of 2" in said[2]
    svg = size_quality(frames.arms)
    assert "Pareto front, track M" in svg
    assert "Pareto front, track A" in svg
    alone = size_quality(frames.arms[frames.arms["track"] != "A"])
    assert "Pareto front" in alone
    assert "track" not in alone


def test_an_unreadable_structure_is_a_problem_and_ranked_with_nobody(study_store, tmp_path):
    models = [
        study_store.Invented(name, {"name": name}, SIZE, worse)
        for name, worse in (("svd", 0.3), ("asvd", 0.6))
    ]
    store = study_store.write_study(tmp_path, models=models, protocols=("krony/wt103",))
    init = next(record for record in store.records("init") if record.name == "svd")
    (Path(store.root.uri) / init.address / init.attempt / "config.json").write_text('{"model": {}}')
    found = load_frames(store)
    assert [each for each in found.problems if f"{init.address}/config.json: cannot be read" in each]
    assert found.scores["is_best"].isna().all()
