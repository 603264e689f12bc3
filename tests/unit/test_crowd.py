"""Plots of many models: who leads is named and coloured, everyone is in one map of errors."""

import re

import pandas as pd
import pytest

from analysis.plots import COLOURS, CROWD, layer_errors, loss_curves, size_quality

FEW, MANY = 3, CROWD + 8


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


@pytest.mark.parametrize("count", [FEW, MANY])
def test_of_many_models_those_on_the_front_are_named(count):
    named = set(names_in(size_quality(scores(count))))
    everyone = {f"run-{i}" for i in range(count)}
    leading = {f"run-{i}" for i in range(0, count, 2)}
    assert named == (everyone if count == FEW else leading)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_of_many_curves_the_lowest_are_told_apart(count):
    svg = loss_curves(history(count))
    lowest = {f"run-{i}" for i in range(count)[-len(COLOURS) :]}
    assert set(names_in(svg)) == lowest
    assert ("others" in svg) == (count == MANY)


@pytest.mark.parametrize("count", [FEW, MANY])
def test_every_model_is_in_the_map_of_errors(count):
    svg = layer_errors(modules(count))
    assert set(names_in(svg)) == {f"run-{i}" for i in range(count)}
    assert svg.count("<image") == (count if count == FEW else 1) + 1  # and the bar of colours
