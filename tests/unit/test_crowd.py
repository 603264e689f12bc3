"""Many models: who leads is named, coloured and on the page; everyone is in the files beside it."""

import re

import pandas as pd
import pytest

from analysis import page
from analysis.leaders import leaders, spread
from analysis.plots import COLOURS, CROWD, MANY, layer_errors, loss_curves, size_quality
from analysis.report import write_report

FEW, CROWDED = 3, CROWD + 8


def names_in(svg: str) -> list[str]:
    """Models that a picture names beside their points; words of axes and legends left out."""
    return re.findall(r"run-\d+", svg)


def scores(count: int) -> pd.DataFrame:
    """Models that are the better the larger they are, but for every second one, which is bad."""
    rows = [
        {
            "parameters": 1000 + 10 * i,
            "value": 90.0 - i + 50 * (i % 2),
            "variant": f"run-{i}",
            "method": "svd",
        }
        for i in range(count)
    ]
    rows.append({"parameters": 9000, "value": 20.0, "variant": "", "method": "dense teacher"})
    shared = {"metric": "perplexity", "low": None, "high": None, "track": "M"}
    return pd.DataFrame(
        [{**row, **shared, "is_dense": row["variant"] == "", "subject": f"{row['variant']}"} for row in rows]
    )


def modules(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"init": f"init/{i}", "label": f"run-{i}", "layer": layer, "matrix": "mlp.c_fc", "error": 0.5}
            for i in range(count)
            for layer in range(12)
        ]
    )


def history(count: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {"run": f"run/{i}", "arm": f"run-{i}", "tokens": t, "loss": None, "val_loss": 9.0 - i / 10 - t}
            for i in range(count)
            for t in (0, 1)
        ]
    )


@pytest.mark.parametrize("count", [FEW, CROWDED])
def test_of_many_models_those_on_the_front_are_named(count):
    named = set(names_in(size_quality(scores(count))))
    everyone = {f"run-{i}" for i in range(count)}
    leading = {f"run-{i}" for i in range(0, count, 2)}
    assert named == (everyone if count == FEW else leading)


@pytest.mark.parametrize("count", [FEW, CROWDED])
def test_of_many_curves_the_lowest_are_told_apart(count):
    svg = loss_curves(history(count))
    lowest = {f"run-{i}" for i in range(count)[-len(COLOURS) :]}
    assert set(names_in(svg)) == lowest
    assert ("others" in svg) == (count == CROWDED)


@pytest.mark.parametrize("count", [FEW, CROWDED])
def test_every_model_is_in_the_map_of_errors(count):
    svg = layer_errors(modules(count))
    assert set(names_in(svg)) == {f"run-{i}" for i in range(count)}
    assert svg.count("<image") == (count if count == FEW else 1) + 1  # and the bar of colours


def test_thousands_of_curves_are_pixels():
    few, many, more = (loss_curves(history(count)) for count in (CROWDED, MANY + 20, 3 * MANY))
    assert [picture.count("<image") for picture in (few, many, more)] == [0, 1, 1]
    assert len(more) < 1.5 * len(many)


def ranked(group: int, place: int, **more: object) -> dict[str, object]:
    """A row of `arms`: the model in this place of a size."""
    row = {"subject": f"{group}.{place}", "teacher": "t", "group": group, "track": "M", "is_dense": False}
    return {**row, **more}


def test_a_page_shows_the_best_of_every_size_before_the_second_of_any():
    rows = [ranked(group, place) for group in range(4) for place in range(3)]
    rows.insert(0, ranked(0, 9, subject="dense", is_dense=True))
    assert leaders(rows, 4) == {"dense", "0.0", "1.0", "2.0", "3.0"}
    assert leaders(rows, 6) == {"dense", "0.0", "1.0", "2.0", "3.0", "0.1", "3.1"}
    assert leaders(rows, 100) == {row["subject"] for row in rows}
    assert leaders(rows * 2, 4) == leaders(rows, 4)  # one row per measure


def test_too_many_sizes_are_spread():
    assert spread(range(100), 4) == [0, 33, 66, 99]
    assert spread([1, 2], 4) == [1, 2]
    assert spread([1, 2], 1) == [1]
    assert spread([1, 2], 0) == []


def test_what_a_page_leaves_out_is_said_and_stands_beside_it(study_store, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "ROWS", 3)
    monkeypatch.setattr(page, "MAPPED", 2)
    store = study_store.write_study(tmp_path / "store", protocols=("krony/wt2",))
    written = write_report(store, tmp_path / "out")
    html, marks = written.html.read_text(), written.markdown.read_text()
    said = "Shown are 4 of 7 models"
    assert said in html
    assert said in marks
    assert html.count('id="row-') == marks.count("### ") == 4
    assert "2 of 5 models, all are in modules.csv" in html
    assert pd.read_csv(tmp_path / "out" / "arms.csv")["subject"].nunique() == 7
    assert pd.read_csv(tmp_path / "out" / "modules.csv")["init"].nunique() == 5
    assert (tmp_path / "out" / "comparison.md").read_text().count("\n|") == 1 + 7
