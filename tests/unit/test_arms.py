"""Seeds of one arm are one row: what is combined, what is not, and what it does to a claim."""

import math
from pathlib import Path
from types import ModuleType

import pytest

from analysis.arms import common_name
from analysis.comparison import comparison
from analysis.frames import Frames, load_frames
from analysis.page import build_page
from analysis.tables import terminal

MEASURE = "krony/wt103"
KRON = {"name": "kron_vl", "shape": [768, 768], "terms": 1}
ACT = {"name": "kron_act", "shape": [768, 768], "terms": 1}


def frames(study_store: ModuleType, folder: Path, *models) -> Frames:
    return load_frames(study_store.write_study(folder, models=models, protocols=(MEASURE,)))


def seeds(study_store: ModuleType, method, *worse: float, name: str = "kron", **more):
    return [
        study_store.Invented(f"{name}-s{seed}", method, 81_972_576, value, seed, **more)
        for seed, value in enumerate(worse)
    ]


def test_seeds_are_one_row_with_mean_interval_and_number(study_store, tmp_path):
    found = frames(study_store, tmp_path, *seeds(study_store, KRON, 0.36, 0.37, 0.38))
    row = found.arms[~found.arms["is_dense"]].iloc[0]
    each = found.scores[~found.scores["is_dense"]]
    assert (row["seeds"], row["variant"]) == (3, "kron")
    assert row["label"] == "kron_vl (768×768)⊗(1×4) r=1"
    assert row["loss"] == pytest.approx(each["loss"].mean())
    assert row["value"] == pytest.approx(math.exp(each["loss"].mean()))
    dense = found.scores[found.scores["is_dense"]].iloc[0]
    assert row["recovery"] == pytest.approx(dense["value"] / row["value"])
    assert row["low"] < row["value"] < row["high"]
    assert row["high"] - row["low"] > (each["high"] - each["low"]).max()  # text and seeds
    assert set(row["address"].split()) == set(each["address"])
    table = comparison(found.arms)
    assert [column.title for column in table.columns].count("seeds") == 1
    assert len(table.rows) == 2
    assert any(note.startswith("seeds: ") for note in table.notes)


def test_a_seed_of_calibration_is_a_seed(study_store, tmp_path):
    models = [
        study_store.Invented(f"act-s{seed}", ACT, 81_972_576, 0.3 + 0.01 * seed, seed, calibration_seed=seed)
        for seed in range(2)
    ]
    found = frames(study_store, tmp_path, *models)
    assert list(found.arms["seeds"]) == [1, 2]
    assert sorted(found.scores["calibration_seed"].dropna()) == [0, 1]


def test_what_differs_in_more_than_seeds_stays_apart(study_store, tmp_path):
    models = seeds(study_store, KRON, 0.36, 0.37) + seeds(study_store, KRON, 0.38, 0.39, lr=1e-3, name="fast")
    found = frames(study_store, tmp_path, *models)
    assert sorted(found.arms["seeds"]) == [1, 2, 2]
    assert {label.rsplit(" ", 1)[-1] for label in found.arms["label"]} == {"dense", "lr=0.0006", "lr=0.001"}


def test_two_results_of_one_seed_are_not_two_seeds(study_store, tmp_path):
    models = [study_store.Invented("kron", KRON, 81_972_576, 0.36 + v / 100, version=v) for v in (1, 2)]
    found = frames(study_store, tmp_path, *models)
    assert list(found.arms["seeds"]) == [1, 1, 1]


def test_the_noise_of_seeds_decides_what_is_a_difference(study_store, tmp_path):
    one = frames(
        study_store,
        tmp_path / "one",
        *seeds(study_store, KRON, 0.36),
        *seeds(study_store, ACT, 0.38, name="act"),
    )
    verdict = one.arms.set_index("method")["is_best"]
    assert bool(verdict["kron_vl"])
    assert not bool(verdict["kron_act"])  # the text alone tells 2 % apart
    noisy = seeds(study_store, KRON, 0.30, 0.36, 0.42), seeds(study_store, ACT, 0.32, 0.38, 0.44, name="act")
    several = frames(study_store, tmp_path / "three", *noisy[0], *noisy[1])
    assert several.arms.set_index("method").loc["kron_act", "is_best"]
    assert several.scores.query("method == 'kron_act'")["is_best"].all()  # the verdict is the arm's
    clear = (
        seeds(study_store, KRON, 0.36, 0.361, 0.359),
        seeds(study_store, ACT, 0.40, 0.401, 0.399, name="act"),
    )
    sure = frames(study_store, tmp_path / "clear", *clear[0], *clear[1])
    row = sure.arms.set_index("method").loc["kron_act"]
    assert not row["is_best"]
    assert row["worse_by_low"] < 0.04 < row["worse_by_high"]


def test_a_page_leads_from_an_arm_to_every_seed(study_store, tmp_path):
    found = frames(study_store, tmp_path, *seeds(study_store, KRON, 0.36, 0.37, 0.38))
    page = build_page(found, store="store", written="")
    for address in found.scores["address"]:
        assert page.html().count(address) >= 2
    assert "intervals over the text and over seeds" in page.html()
    assert "(mean of 3 seeds)" in page.html()
    assert len(page.origins) == 2
    assert {run.rsplit("-", 2)[1] for run in found.history["run"]} == {"s0", "s1", "s2"}
    assert set(found.history["arm"]) == {"kron_vl (768×768)⊗(1×4) r=1"}


def test_one_seed_each_is_the_table_of_before(study_store, tmp_path):
    found = frames(
        study_store, tmp_path, *seeds(study_store, KRON, 0.36), *seeds(study_store, ACT, 0.38, name="act")
    )
    assert found.arms is not None
    assert found.arms.equals(found.scores)
    shown = terminal(comparison(found.arms, layout="brief"))
    assert "seeds" not in shown.replace("Seed noise", "")


@pytest.mark.parametrize(
    ("names", "shared"),
    [
        (("kron-82m-s0", "kron-82m-s1"), "kron-82m"),
        (("kron-82m", "kron-82m-s1"), "kron-82m"),
        (("one", "one"), "one"),
        (("a seed=0", "a seed=1"), "a"),
        (("left", "right"), "left"),
    ],
)
def test_the_name_of_several_seeds_is_what_they_share(names, shared):
    assert common_name(names) == shared
