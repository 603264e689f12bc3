"""The trials of a sweep: nothing twice, nothing lost, the same everywhere, and each an ordinary run."""

import itertools
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.compress.at_budget import recipes_at
from model.compress.contract import Plan
from model.compress.presets import search
from model.config import SIZES, GPT2Config, ModelSpec
from pipeline.chain import Chains, chain
from pipeline.compress.outlook import outlook
from pipeline.config.load import load_study, merge, to_json, validate, with_name
from pipeline.config.schema import RunConfig
from pipeline.config.sweep import SweepConfig, SweepStudy, load_sweep
from pipeline.sweep.axes import Range, label_values
from pipeline.sweep.space import Refused, Sampler, distributions, draw, grid, space_of

CONFIGS = Path(__file__).parents[2] / "configs"
BASE = {
    "name": "tiny",
    "teacher": {
        "name": "scratch", "n_layer": 2, "n_head": 2, "n_embd": 16, "n_ctx": 32, "train": {"seq_len": 32}
    },
    "train": {"seq_len": 32, "batch_tokens": 64, "max_steps": 4},
    "calibration": {"length": 32},
    "method": {"name": "kron_vl", "shape": [8, 8]},
}  # fmt: skip
B82 = 81_972_576


def study(axes, *, base=BASE, **settings) -> SweepStudy:
    filled = {key: with_name(key, value) for key, value in merge(to_json(RunConfig()), base).items()}
    return SweepStudy("tiny", filled, SweepConfig(axes=axes, **settings), "here")


def test_a_grid_is_every_combination_once_per_seed_in_the_order_of_the_file():
    space = grid(study({"method": ["kron_vl", "dense"], "train.lr": [1.0, 2.0]}, seeds=(0, 5)))
    assert [trial.name for trial in space.trials] == [
        f"{method} lr={lr} s{seed}" for method in ("kron_vl", "dense") for lr in (1, 2) for seed in (0, 5)
    ]
    assert space.axes == ("method", "train.lr")
    assert space.removed == {}


SHAPES = [[8, 8], [4, 16], [16, 16], [5, 5], [2, 64]]
METHODS = ["kron_vl", "kron_prune", {"name": "svd", "rank": 4}, "random_init", "kron_act"]


@settings(max_examples=10, deadline=None)
@given(
    methods=st.lists(st.sampled_from(METHODS), min_size=1, max_size=4, unique_by=str),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4, unique_by=str),
    terms=st.lists(st.integers(1, 3), min_size=1, max_size=2, unique=True),
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=2, unique=True),
)
def test_every_combination_is_a_trial_or_counted_and_no_model_is_trained_twice(methods, shapes, terms, seeds):
    axes = {"method": ["dense", *methods], "method.shape": shapes, "method.terms": terms}
    space = grid(study(axes, seeds=tuple(seeds)))
    assert len(space.arms) + sum(space.removed.values()) == (1 + len(methods)) * len(shapes) * len(terms)
    assert len(space.trials) == len(space.arms) * len(seeds)
    chains = Chains()
    runs = [chains.of(trial.config).run.fingerprint for trial in space.trials]
    for values in (runs, [t.key for t in space.trials], [t.name for t in space.trials],
                   [t.config.name for t in space.trials]):  # fmt: skip
        assert len(set(values)) == len(space.trials)
    assert set(space.examples) == set(space.removed)
    for trial in space.trials:
        outlook(trial.config)  # can be built
        assert validate(to_json(trial.config), source="here") == trial.config
        shape = getattr(trial.config.method, "shape", (1, 1))
        assert 16 % shape[0] == 0
        assert 64 % shape[1] == 0


def test_removed_combinations_say_why():
    axes = {
        "method": ["kron_vl", {"name": "svd", "rank": 4}, "dense"],
        "method.shape": [[8, 8], [5, 5], [4, 16]],
    }
    space = grid(study(axes, skip=({"method.name": "kron_vl", "method.shape": [4, 16]},)))
    assert space.arms == ("kron_vl 8x8", "svd", "dense")
    assert space.removed == {
        "a factor shape or its terms do not fit the weights (kron_vl)": 1,
        "skipped by sweep.skip": 1,
        "svd has no method.shape; one trial is enough": 2,
        "dense has no method.shape; one trial is enough": 2,
    }
    reason = "a factor shape or its terms do not fit the weights (kron_vl)"
    assert "first factor 5x5 does not fit a 16x64 weight" in space.examples[reason]


def test_what_cannot_keep_its_budget_is_removed():
    base = merge(BASE, {"budget": {"params": 70_000, "tolerance": 0.01}})
    space = grid(study({"method": ["dense", {"name": "svd", "rank": 0}]}, base=base))
    assert [trial.config.method.name for trial in space.trials] == ["svd"]
    assert "dense does not keep 70,000 parameters" in space.removed


def test_a_shape_of_several_terms_is_nothing_for_a_method_of_one():
    axes = {"method": ["kron_vl", "kron_prune"], "method.shape": {"shapes_of": "mlp", "terms": [1, 2]}}
    space = grid(study(axes))
    terms = {(trial.config.method.name, getattr(trial.config.method, "terms", 1)) for trial in space.trials}
    assert terms == {("kron_vl", 1), ("kron_vl", 2), ("kron_prune", 1)}
    assert any("kron_prune has no method.terms" in reason for reason in space.removed)


@pytest.mark.parametrize(("params", "terms"), [(B82, 1), (B82, 2), (96_128_304, 3)])
def test_shapes_near_a_size_are_those_of_an_exhaustive_search(params, terms):
    base = {"teacher": {"name": "hub"}, "method": {"name": "kron_vl"}}
    asked = {"shapes_of": [768, 3072], "terms": [1, terms], "params": params, "tolerance": 0.002}
    (axis,) = Sampler(study({"method.shape": asked}, base=base)).axes
    found = {(*option.choices["method.shape"], option.choices["method.terms"]) for option in axis.options}
    rows = search(SIZES["gpt2"], near=int(params * 1.002), tolerance=0.004, max_terms=terms, full_rank=True)
    near = [row for row in rows if abs(row.parameters - params) <= 0.002 * params]
    sides = [map(int, row.shape.split(")")[0].lstrip("(").split("x")) for row in near]
    assert found == {(*first, row.terms) for first, row in zip(sides, near, strict=True)}
    assert found


def test_a_condition_over_shapes_keeps_ranks_orders_and_limits():
    every = {"shapes_of": "mlp", "terms": 1, "keep_rank": False}
    sampler = Sampler(study({"method.shape": every}))
    assert len(sampler.axes[0].options) == 5 * 7  # divisors of 16 and of 64
    full = Sampler(study({"method.shape": every | {"keep_rank": True}}))
    assert len(full.axes[0].options) + sum(full.removed.counts.values()) == 35
    assert "16x64" in {option.label for option in full.axes[0].options}
    large = Sampler(study({"method.shape": every | {"large_first": True}})).axes[0].options
    assert all(
        a * b >= (16 // a) * (64 // b) for a, b in (option.choices["method.shape"] for option in large)
    )
    few = Sampler(study({"method.shape": every | {"limit": 3}}))
    assert [option.label for option in few.axes[0].options] == [o.label for o in sampler.axes[0].options[:3]]
    assert few.removed.counts["(shape, terms) beyond the limit of 3"] == 32


@pytest.mark.parametrize("track", ["M", "A"])
def test_every_method_at_a_budget_is_what_the_methods_themselves_plan(track):
    base = {"teacher": {"name": "hub"}, "method": {"name": "kron_vl", "scales": True}}
    sampler = Sampler(study({"method": [{"methods": "all", "track": track, "params": B82}]}, base=base))
    rows = recipes_at(ModelSpec.dense(SIZES["gpt2"]), B82, track=track)
    wanted = [row.recipe for row in rows if isinstance(row.plan, Plan)]
    trials = [sampler.arm({"method": option.label})[0] for option in sampler.axes[0].options]
    assert [trial.config.method for trial in trials] == wanted
    assert all(trial.config.budget.params == B82 for trial in trials)
    refused = {f"{row.label} does not keep {B82:,} parameters" for row in rows if isinstance(row.plan, str)}
    assert set(sampler.removed.counts) == refused
    assert "dense does not keep" in " ".join(refused)


def test_both_tracks_together_list_no_recipe_twice():
    base = {"teacher": {"name": "hub"}}
    sampler = Sampler(
        study({"method": ["dense", {"methods": "all", "track": "both", "params": B82}]}, base=base)
    )
    labels = [option.label for option in sampler.axes[0].options]
    assert len(set(labels)) == len(labels)
    assert {"svd", "svd all_linear", "kron_vl", "layerdrop"} <= set(labels)


def test_keys_are_the_same_on_every_machine():
    trials = grid(study({"method": ["kron_vl"], "method.shape": [[8, 8]]}, seeds=(0, 1))).trials
    assert [trial.key for trial in trials] == ["e345b26c03", "aa15dc9953"]
    renamed = grid(study({"method": ["kron_vl"], "method.shape": [[8, 8], [4, 16]]}, seeds=(0, 1))).trials
    assert [trial.key for trial in renamed[:2]] == [trial.key for trial in trials]


def test_a_trial_is_the_run_that_anybody_else_would_make(tmp_path: Path):
    file = tmp_path / "run.toml"
    file.write_text("""
        teacher = { n_layer = 2, n_head = 2, n_embd = 16, n_ctx = 32, train.seq_len = 32 }
        train = { seq_len = 32, batch_tokens = 64, max_steps = 4 }
        calibration = { length = 32 }
        seed = 1
        method = { name = "kron_vl", shape = [4, 16] }
    """)
    (trial,) = grid(study({"method.shape": [[4, 16]]}, seeds=(1,))).trials
    assert chain(trial.config).run.fingerprint == chain(load_study(file).first).run.fingerprint


SAMPLED = {
    "method": ["kron_vl", {"name": "svd", "rank": 4}],
    "method.shape": [[8, 8], [4, 16]],
    "train.lr": {"low": 1e-4, "high": 1e-2, "log": True},
    "train.warmup_steps": {"low": 1, "high": 3},
}


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6))
def test_a_sample_follows_from_its_seed_and_stays_inside(seed, count):
    asked = study(SAMPLED, search="random", samples=count, seeds=(0, 1))
    first, again = (draw(asked, random.Random(seed), count) for _ in range(2))
    assert first.trials == again.trials
    assert len(first.arms) == count
    for trial in first.trials:
        assert 1e-4 <= trial.config.train.lr <= 1e-2
        assert trial.config.train.warmup_steps in (1, 2, 3)
        assert ("method.shape" in trial.choices) == (trial.config.method.name == "kron_vl")


def test_a_small_space_is_drawn_whole_and_no_more():
    asked = study({"method.shape": [[8, 8], [4, 16], [5, 5]]}, search="random", samples=20)
    assert sorted(space_of(asked).arms) == ["4x16", "8x8"]


def test_a_searcher_is_told_labels_and_ranges_and_gets_trials():
    asked = study(SAMPLED, search="tpe", samples=3)
    told = distributions(asked)
    assert told["method"] == ("kron_vl", "svd")
    assert told["method.shape"] == ("8x8", "4x16")
    assert told["train.lr"] == Range("train.lr", 1e-4, 1e-2, log=True)
    assert told["train.warmup_steps"] == Range("train.warmup_steps", 1, 3, integer=True)
    sampler = Sampler(asked)
    picks = {"method": "svd", "method.shape": "8x8", "train.lr": 0.001, "train.warmup_steps": 2}
    (trial,) = sampler.arm(picks)
    assert trial.arm == "svd lr=0.001 warmup_steps=2"
    assert trial.config.train.lr == 0.001
    with pytest.raises(Refused):
        Sampler(study({"method.shape": [[5, 5]]})).arm({"method.shape": "5x5"})


def test_names_say_what_differs_and_nothing_else():
    act, svd = {"name": "kron_act", "shape": [8, 8]}, {"name": "svd", "rank": 2}
    methods = [act, act | {"bias_correction": False}, svd]
    space = grid(study({"method": methods, "method.terms": [1], "train.objective": ["ce", "kd"]}))
    assert space.arms == (
        "kron_act ce", "kron_act kd",
        "kron_act bias_correction=false ce", "kron_act bias_correction=false kd",
        "svd ce", "svd kd",
    )  # fmt: skip
    assert [trial.config.name for trial in space.trials][2] == "kron_act-bias_correction-false-ce-s0"


def test_the_shipped_smoke_sweep_is_twelve_trials_of_six_arms():
    space = grid(load_sweep(CONFIGS / "sweeps" / "smoke.toml"))
    pairs = itertools.product(("kron_vl", "kron_prune", "random_init"), ("128x128", "64x256"))
    assert space.arms == tuple(" ".join(pair) for pair in pairs)
    assert len(space.trials) == 12
    assert {outlook(trial.config).parameters for trial in space.trials} == {695_072}
    assert all(trial.config.ray.workers == 0 for trial in space.trials)


def test_the_shipped_shapes_sweep_compares_equals(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KRONY_SHARED", "/somewhere")
    asked = load_sweep(CONFIGS / "sweeps" / "shapes.toml")
    sampler = Sampler(asked)
    dense = ModelSpec.dense(GPT2Config(n_layer=4, n_head=4, n_embd=256, n_ctx=256, vocab_size=8192))
    assert outlook(asked.config({"method": "dense"}, 0)).parameters == dense.num_parameters()
    sizes = []
    for method, shape in itertools.product(*(axis.options for axis in sampler.axes)):
        picks = {"method": method.label, "method.shape": shape.label}
        if method.label == "kron_prune" and "r=2" in shape.label:
            with pytest.raises(Refused):
                sampler.arm(picks)
            continue
        sizes += [outlook(trial.config).parameters for trial in sampler.arm(picks)]
    assert len(sizes) == 51
    assert max(sizes) - min(sizes) <= 0.002 * max(sizes)


@pytest.mark.parametrize(
    "named", [{"method": "dense"}, {"method.name": "dense"}, {"method": "dense", "train.lr": 1}]
)
def test_a_section_is_skipped_by_its_name(named):
    space = grid(study({"method": ["kron_vl", "dense"], "train.lr": [1.0]}, skip=(named,)))
    assert [trial.arm for trial in space.trials] == ["kron_vl"]
    assert space.removed == {"skipped by sweep.skip": 1}


def test_what_an_axis_does_not_reach_is_named():
    space = grid(study({"corpus.paths": [["a"], ["b"]], "method": ["dense", "kron_vl"]}))
    assert space.removed == {"pydocs has no corpus.paths; one trial is enough": 2}
    both = grid(study({"method": ["dense"], "corpus.paths": [["a"]], "method.shape": [[4, 4], [2, 2]]}))
    assert both.removed == {"pydocs and dense have no corpus.paths, method.shape; one trial is enough": 1}


def test_values_that_are_places_are_named_by_what_they_lead_to():
    axis = label_values("corpus.paths", [["/far/away/a.txt"], ["/far/away/b.txt"]])
    assert axis == ['paths=["a.txt"]', 'paths=["b.txt"]']
    assert label_values("teacher.id", ["/one/gpt", "/two/gpt", "/two/t5"]) == ["/one/gpt", "/two/gpt", "t5"]
    assert label_values("teacher", [{"name": "hub", "id": "/x/y"}, {"name": "hub", "id": "org/z"}]) == [
        "hub y", "hub org/z"
    ]  # fmt: skip
