"""The page on methods names every method with what it needs, and its worked example works."""

import re
from pathlib import Path

import pytest
import torch

from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import CompressionMethod, StatsSpec
from model.compress.methods import METHODS
from model.config import GPT2Config, ModelSpec
from pipeline.config.schema import RunConfig

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text()
TABLE = [
    line
    for line in PAGE.partition("## All of them")[2].partition("\n## ")[0].splitlines()
    if "| `" in line[:3]
]


def test_the_table_has_every_method_and_no_other():
    cells = [line.split("|")[1] for line in TABLE]
    named = [name for cell in cells for name in re.findall(r"`(\w+)`", cell)]
    assert sorted(named) == sorted(METHODS)


def test_the_table_names_what_each_method_needs():
    from model.compress.recipe import MethodRecipe

    for recipe in MethodRecipe.__args__:
        line = next(line for line in TABLE if f"`{recipe().name}`" in line.split("|")[1])
        if recipe().name != "random_init":
            assert set(recipe().needs) <= set(re.findall(r"`(\w+)`", line.split("|")[3])), recipe().name


@pytest.fixture(scope="module")
def example():
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/methods.md", "exec"), names)  # what the page tells its reader to write
    return names


def test_the_worked_example_is_a_method(example, toy):
    spec = ModelSpec.dense(GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=61))
    teacher, rows = toy(spec, seed=1, dtype=torch.float64), torch.randint(61, (6, 16))
    recipe = example["MeanSquareSVD"](rank=5)
    method: CompressionMethod = example["MeanSquareSVDMethod"](recipe)
    plan = method.plan(spec, Budget())
    assert method.stats(spec).needs == recipe.needs
    stats = collect(teacher, StatsSpec.everywhere(recipe.needs, spec), rows, measurement=Measurement())
    result = method.compress(teacher, plan, stats, seed=0)
    for row in result.report:
        rest = teacher.site(row.name).weight_matrix() - result.model.site(row.name).weight_matrix()
        weights = stats.sums[f"gram/{row.name}"].diagonal() / stats.tokens
        assert row.achieved_error == pytest.approx(float((weights[:, None] * rest.square()).sum().detach()))
        assert row.predicted_error == pytest.approx(row.achieved_error)
        assert 0 < row.energy_kept < 1


def test_defaults_on_the_page_are_those_of_the_settings():
    found = RunConfig().calibration
    assert (found.fisher, found.labels) == ("sequence", "observed")
    assert '`calibration.fisher = "token"`' in PAGE
