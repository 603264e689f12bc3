"""`krony plan`: every method at every main budget is within 0.2 % under the cap, or says why it cannot be."""

import contextlib
import io
import json

import pytest

from jobs import cli
from model.compress.budget import Budget
from model.compress.budget_table import settings_of
from model.compress.kron_recipe import KnGPT2, KronVL
from model.compress.methods import METHODS, make_method
from model.compress.named_budgets import MAIN_BUDGETS, NAMED_BUDGETS, named_cap
from model.config import SIZES, Kron, ModelError, ModelSpec
from pipeline.compress.outlook import outlook
from pipeline.config.load import load_study

SMALL = ModelSpec.dense(SIZES["gpt2"])


@pytest.fixture(scope="module")
def tables():
    """The output of the verb as a program reads it."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        assert cli.main(["plan", "--json"]) == 0
    return json.loads(shown.getvalue())


def test_every_count_is_within_a_fifth_of_a_percent_under_its_cap_or_an_honest_cannot(tables):
    assert [(table["name"], table["track"]) for table in tables] == [
        (name, track) for name in ("B96", "B82", "B72", "B68") for track in "MA"
    ]
    for table in tables:
        cap = table["cap"]
        assert cap == NAMED_BUDGETS[table["name"]]
        for row in table["rows"]:
            fits = cap * 0.998 <= row["parameters"] <= cap
            assert fits == (not row["reason"]), row
            assert "\n" not in row["reason"]
            assert not fits or (row["settings"] and row["share"] == row["parameters"] / cap)
            assert row["macs_per_token"] > 0 or not fits
        assert sum(not row["reason"] for row in table["rows"]) >= 9


def test_every_method_stands_in_the_tables_of_a_budget(tables):
    for name in MAIN_BUDGETS:
        rows = [row for table in tables if table["name"] == name for row in table["rows"]]
        assert {row["recipe"]["name"] for row in rows} == set(METHODS)


def test_who_cannot_says_what_is_missing(tables):
    found = {
        (table["name"], row["method"]): row["reason"]
        for table in tables
        for row in table["rows"]
        if row["reason"] and row["method"] != "dense"
    }
    fixed = {(name, method) for name in MAIN_BUDGETS for method in ("kngpt2", "tqcompressor")}
    steps = {("B72", "layerdrop"), ("B68", "layerdrop"), ("B72", "kron_prune"), ("B72", "kron_units")}
    assert set(found) == fixed | steps
    assert found["B72", "layerdrop"].startswith(
        "67,736,832 parameters are the nearest; keeps blocks 0, 4, 7, 11"
    )
    assert "4,046,592 (5.64%) below the cap" in found["B72", "layerdrop"]
    assert "its structure is fixed" in found["B82", "kngpt2"]


def test_the_settings_of_a_row_written_in_a_config_give_the_count_of_the_row(tables, tmp_path):
    for table in (table for table in tables if table["name"] == "B72"):
        for row in table["rows"]:
            if row["reason"] or "of" in row["recipe"]:
                continue
            values = ", ".join(f"{key} = {json.dumps(value)}" for key, value in row["recipe"].items())
            (tmp_path / "one.toml").write_text(
                f'name = "one"\nteacher = {{ name = "hub" }}\nmethod = {{ {values} }}\n'
                f"budget = {{ params = {table['cap']} }}\n"
            )
            config = load_study(tmp_path / "one.toml").first
            assert outlook(config).parameters == row["parameters"], row


def test_words_for_a_plan():
    two = make_method(KronVL(shape=(768, 768), layers=(1, 2))).plan(SMALL, Budget())
    assert settings_of(two) == "mlp (768x768)(1x4) of 2 blocks"
    words = settings_of(make_method(KnGPT2()).plan(SMALL, Budget()))
    assert "q, k, v, c_proj (768x384)(1x2) of 6 blocks" in words
    assert "wte (50257x384)(1x2)" in words


def test_a_track_a_model_and_a_cap_can_be_chosen(capsys):
    assert cli.main(["plan", "--budget", "B82", "--track", "A", "--model", "gpt2-medium"]) == 0
    shown = capsys.readouterr().out
    assert "B82: at most 203,828,565 parameters" in shown
    assert "track A: any weight may change" in shown
    assert "track M" not in shown
    assert cli.main(["plan", "--params", "81972576", "--track", "M"]) == 0
    shown = capsys.readouterr().out
    assert (
        "svd                        81,917,184     99.932%      81,009,408     65.6%  mlp rank 153" in shown
    )
    assert "B96" not in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "B83"], "'B83'"),
        (["--params", "0"], "--params 0 must be above 0 and at most 124,439,808"),
        (["--params", "99999999999"], "must be above 0 and at most 124,439,808"),
        (["--params", "many"], "'many'"),
        (["--track", "B"], "'B'"),
        (["--model", "gpt5"], "'gpt5'"),
        (["config.toml"], "config.toml"),
    ],
)
def test_bad_words_are_one_line_and_exit_code_2(words, said, capsys):
    assert cli.main(["plan", *words]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    assert told.err.startswith("krony plan: ")
    assert said in told.err


def test_a_named_budget_is_the_same_share_of_the_mlps_on_every_size():
    assert all(named_cap(name, SMALL) == cap for name, cap in NAMED_BUDGETS.items())
    assert set(MAIN_BUDGETS) <= set(NAMED_BUDGETS)
    for size in SIZES.values():
        spec, d = ModelSpec.dense(size), size.n_embd
        for name, shape in (
            ("B96", Kron(m1=d, n1=2 * d, m2=1, n2=2)),
            ("B82", Kron(m1=d, n1=d, m2=1, n2=4)),
        ):
            cap = named_cap(name, spec)
            part = 2 * size.n_layer * (shape.cost(d, 4 * d).params - 4 * d * d)
            assert 0.998 * cap <= spec.num_parameters() + part <= cap
    with pytest.raises(ModelError, match="'B83' is no budget; choose from B104"):
        named_cap("B83", SMALL)
