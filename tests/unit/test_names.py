"""Labels, numbers and published rows as a reader meets them."""

import pandas as pd
import pytest

from analysis.baselines import MARK, comparable, published
from analysis.names import command, count, distinct, method_label, quantity, share, short_count


def test_method_labels():
    kron = {"name": "kron_vl", "shape": [64, 128], "terms": 1, "gauge": "rms"}
    assert method_label(kron, n_embd=128) == "kron_vl (64×128)⊗(2×4) r=1"
    assert method_label(kron, n_embd=None) == "kron_vl (64×128) r=1"
    assert (
        method_label({"name": "kron_prune", "shape": [384, 3072]}, n_embd=768)
        == "kron_prune (384×3072)⊗(2×1)"
    )
    assert method_label({"name": "dense"}, n_embd=768) == "dense, trained further"
    assert method_label({"name": "layerdrop"}, n_embd=768) == "layerdrop"


def test_namesakes_are_told_apart_by_what_differs():
    configs = [{"method": {"eps": 0.0}}, {"method": {"eps": 0.1}}, {"method": {"eps": 0.1}}]
    assert distinct(["a", "a", "b"], configs) == ["a eps=0", "a eps=0.1", "b"]
    assert distinct(["a", "a"], [configs[0], configs[0]]) == ["a", "a"]


def test_numbers():
    assert count(81_972_576) == "81,972,576"
    assert share(0.6587) == "65.9 %"
    assert quantity(29.163, "perplexity") == "29.16"
    assert quantity(43_000.4, "perplexity") == "43,000"
    assert quantity(0.3256, "accuracy") == "32.6 %"
    assert [short_count(n) for n in (655_360, 1_334_000, 81_972_576, 983_040_000, 12)] == [
        "655k", "1.33M", "82M", "983M", "12",
    ]  # fmt: skip
    for shown in (count(pd.NA), share(None), quantity(float("nan"), "perplexity"), short_count(pd.NA)):
        assert shown == "–"


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["/home/me/krony/jobs/run.py", "configs/a b.toml"], "python -m jobs.run 'configs/a b.toml'"),
        (["/home/me/.venv/bin/krony", "run", "x.toml"], "krony run x.toml"),
        ([], ""),
    ],
)
def test_commands_are_shown_as_one_would_type_them(argv, shown):
    assert command(argv) == shown


def test_published_rows_have_a_source_and_a_protocol_of_their_own():
    table = published()
    assert len(table) == 34
    assert table["protocol"].str.startswith(MARK).all()
    assert table["source"].str.len().gt(5).all()
    dense = table[(table["model"] == "GPT-2") & (table["protocol"] == f"{MARK}krony")].iloc[0]
    assert (dense["params"], dense["wikitext103"], dense["wikitext2"]) == (124_439_808, 29.16, 24.67)


def test_only_numbers_that_claim_the_krony_protocol_stand_beside_ours():
    table = comparable()
    assert set(table["protocol"]) == {f"{MARK}krony"}
    assert table[["wikitext103", "wikitext2", "lambada"]].notna().any(axis=1).all()
    assert "KronyPT-67M" not in set(table["model"])  # announced, never measured
