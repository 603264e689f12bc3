"""What every registered method keeps, one recipe of each on one toy GPT-2; a method without a row fails here.

Count, folders, seed, prediction, growth, one step of training, refusal, and settings that lose nothing. What
a method is by its own definition stands in the tests of its family.
"""

import copy
import hashlib
import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.algebra.shapes import legal_shapes
from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import Plan, StatsSpec
from model.compress.kron_recipe import (
    KnGPT2,
    KronAct,
    KronActPerm,
    KronFisher,
    KronPerm,
    KronPrune,
    KronUnits,
    KronVL,
    TQCompressor,
)
from model.compress.low_rank_recipe import ASVD, FWSVD, KFACSVD, SVD, SVDLLM, SVDLLMBC
from model.compress.methods import METHODS, make_method
from model.compress.recipe import Dense, RandomInit
from model.compress.structural_recipe import LayerDrop, ModeGPT, ModeGPTJoint, PruneMLP
from model.config import GPT2Config, LowRank, ModelError, ModelSpec
from model.export import load_native, save_native, save_stock, to_dense
from model.layers.structured import set_mode

ARCH = GPT2Config(n_layer=3, n_head=2, n_embd=16, n_ctx=16, vocab_size=61)
ROWS = torch.randint(61, (8, 16), generator=torch.Generator().manual_seed(7))
RECIPES = {
    "kron_vl": KronVL(shape=(8, 32), terms=2, scales=True),
    "kron_prune": KronPrune(shape=(8, 64)),
    "kron_perm": KronPerm(shape=(8, 32), random_starts=1),
    "kron_fisher": KronFisher(shape=(8, 32)),
    "kron_act": KronAct(shape=(8, 32), terms=2),
    "kron_act_perm": KronActPerm(shape=(16, 16)),
    "kron_units": KronUnits(shape=(16, 32)),
    "kngpt2": KnGPT2(),
    "tqcompressor": TQCompressor(head="tied", random_starts=1),
    "svd": SVD(rank=5, targets="all_linear"),
    "fwsvd": FWSVD(rank=5),
    "asvd": ASVD(rank=5),
    "svdllm": SVDLLM(rank=5, targets="all_linear"),
    "svdllm_bc": SVDLLMBC(rank=5, targets="all_linear"),
    "kfac_svd": KFACSVD(rank=5),
    "modegpt": ModeGPT(hidden=24, head_rank=5),
    "modegpt_joint": ModeGPTJoint(hidden=24, head_rank=5),
    "prune_mlp": PruneMLP(hidden=24),
    "layerdrop": LayerDrop(layers=2),
    "random_init": RandomInit(of=KronVL(shape=(8, 32))),
    "dense": Dense(),
}
FULL_RANK = ("svd", "fwsvd", "asvd", "svdllm", "svdllm_bc", "kfac_svd")
LOSSLESS = {
    "kron_vl": KronVL(shape=(8, 16), terms=8),
    "kron_prune": KronPrune(shape=(16, 64)),
    "kron_perm": KronPerm(shape=(8, 16), terms=8, random_starts=0),
    "kron_fisher": KronFisher(shape=(8, 16), terms=8),
    "kron_act": KronAct(shape=(8, 16), terms=8),
    "kron_act_perm": KronActPerm(shape=(16, 16), terms=4),
    "kron_units": KronUnits(shape=(16, 64)),
    **{name: RECIPES[name] for name in FULL_RANK},
    "modegpt": ModeGPT(hidden=64, head_rank=8),
    "modegpt_joint": ModeGPTJoint(hidden=64, head_rank=8),
    "prune_mlp": PruneMLP(hidden=64),
    "layerdrop": LayerDrop(layers=3),
    "dense": Dense(),
}
GROWING = {
    "kron_vl": [KronVL(shape=(8, 16), terms=k) for k in (1, 2, 5, 8)],
    "kron_act": [KronAct(shape=(16, 16), terms=k) for k in (1, 2, 3, 4)],  # closed: B has one row
    "kron_units": [KronUnits(shape=(16, k)) for k in (4, 16, 32)],
    **{name: [replace(RECIPES[name], rank=k) for k in (1, 3, 5, 7)] for name in FULL_RANK},
    "modegpt": [ModeGPT(hidden=k, targets="mlp", selector="greedy") for k in (4, 16, 40, 60)],
    "modegpt_joint": [
        ModeGPTJoint(hidden=k, head_rank=r, selector="greedy") for k, r in ((8, 2), (20, 4), (50, 7))
    ],
}
IMPOSSIBLE = [
    (KronVL(shape=(5, 16)), r"5 must divide 16"),
    (KronPerm(shape=(8, 32), terms=5), r"choose 1 to 4"),
    (KronUnits(shape=(8, 32)), r"all 16 input rows"),
    (TQCompressor(terms=9), r"choose 1 to 8"),
    (KnGPT2(layers=(3,)), r"names block 3"),
    (SVD(rank=13), r"choose 1 to 12"),
    (KFACSVD(rank=6, targets="all_linear", layers=(9,)), r"names block 9; this model has blocks 0 to 2"),
    (ModeGPT(hidden=65, head_rank=8), r"at most 64 and 8"),
    (ModeGPTJoint(hidden=64, head_rank=9), r"at most 64 and 8"),
    (PruneMLP(hidden=65), r"at most 64"),
    (LayerDrop(layers=4), r"cannot keep 4 of 3"),
    (RandomInit(of=SVD(rank=13)), r"choose 1 to 12"),
]


@pytest.fixture(scope="module")
def teacher(toy):
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def stats(teacher):
    needs = sorted({need for recipe in RECIPES.values() for need in recipe.needs})
    return collect(teacher, StatsSpec.everywhere(needs, teacher.spec), ROWS, measurement=Measurement())


@pytest.fixture(scope="module")
def results(teacher, stats):
    """Every method once, for the tests that only look."""
    return {name: squeeze(recipe, teacher, stats) for name, recipe in RECIPES.items()}


def squeeze(recipe, model, stats):
    method = make_method(recipe)
    return method.compress(model, method.plan(model.spec, Budget(), stats), stats, seed=0)


def logits(model):
    with torch.no_grad():
        return model(ROWS)


def test_every_registered_method_stands_here():
    assert set(RECIPES) == set(METHODS)
    assert all(recipe.name == name for name, recipe in RECIPES.items())
    structure_is_given = {"kngpt2", "tqcompressor", "random_init"}
    assert set(LOSSLESS) == set(METHODS) - structure_is_given


@pytest.mark.parametrize("name", METHODS)
def test_the_planned_count_is_the_number_of_numbers(name, results):
    result = results[name]
    unique = {id(parameter): parameter.numel() for parameter in result.model.parameters()}
    assert result.plan.num_parameters == sum(unique.values()) == result.model.num_parameters()
    assert result.model.spec == result.plan.spec


@pytest.mark.parametrize("name", METHODS)
def test_a_saved_model_and_its_dense_export_in_transformers_are_the_model(name, results, tmp_path):
    import transformers

    model = load_native(_saved(results[name].model, tmp_path / "native")).eval()
    assert logits(model).dtype == torch.float32
    torch.testing.assert_close(logits(model).double(), logits(results[name].model), atol=1e-4, rtol=1e-4)
    again = load_native(_saved(model, tmp_path / "again")).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.num_parameters() == results[name].plan.num_parameters
    assert (again.lm_head is None) == again.spec.tied == model.spec.tied
    save_stock(model, tmp_path / "stock")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(stock(ROWS).logits, logits(model), atol=1e-4, rtol=1e-4)


def _saved(model, folder):
    save_native(model, folder)
    return folder


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-4), (torch.float64, 1e-10)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_every_way_to_multiply_gives_the_same_logits(name, dtype, near, results):
    model = copy.deepcopy(results[name].model).to(dtype)
    expected = logits(to_dense(model))
    for mode, order in itertools.product(("factored", "materialize", "cached"), ("b_first", "a_first")):
        set_mode(model, mode)
        for site in model.spec.sites():
            model.site(site.name).order = order
        assert float((logits(model) - expected).abs().max()) <= near


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_gives_one_hash_and_inputs_stay_as_they_were(name, teacher, stats, results, tmp_path):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    sums = {key: value.clone() for key, value in stats.sums.items()}
    found = set()
    for folder, model in (("a", results[name].model), ("b", squeeze(RECIPES[name], teacher, stats).model)):
        save_native(model, tmp_path / folder)
        files = sorted((tmp_path / folder).iterdir())
        found.add(hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest())
    assert len(found) == 1
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    assert all(torch.equal(value, sums[key]) for key, value in stats.sums.items())


@pytest.mark.parametrize("name", GROWING)
def test_more_rank_terms_or_units_never_raise_the_loss_of_the_method(name, teacher, stats):
    losses = [
        {row.name: row.achieved_error for row in squeeze(recipe, teacher, stats).report}
        for recipe in GROWING[name]
    ]
    for less, more in itertools.pairwise(losses):
        assert all(more[key] <= less[key] * (1 + 1e-9) for key in less)


@pytest.mark.parametrize("name", METHODS)
def test_the_predicted_loss_is_the_achieved_one(name, results):
    rows = results[name].report
    assert rows or name in ("dense", "layerdrop")
    for row in rows:
        assert (row.predicted_error is None) == (name == "random_init")
        if row.predicted_error is not None:
            assert row.achieved_error == pytest.approx(row.predicted_error, rel=1e-6, abs=1e-12 * row.energy)


@pytest.mark.parametrize("name", METHODS)
def test_one_bf16_step_lowers_the_loss_and_reaches_every_number(name, results, tmp_path):
    model = load_native(_saved(results[name].model, tmp_path)).train()
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=1e-4), []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(ROWS, ROWS.roll(-1, dims=1))
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", METHODS)
def test_a_budget_below_all_it_can_be_is_refused_by_its_number(name, teacher, stats):
    method = make_method(replace(RECIPES[name], layers=0) if name == "layerdrop" else RECIPES[name])
    with pytest.raises(ModelError, match=r"above the cap of 1,000 \(tied_all\)") as caught:
        method.plan(teacher.spec, Budget(params=1_000), stats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("recipe", "limit"), IMPOSSIBLE, ids=lambda value: getattr(value, "name", ""))
def test_an_impossible_shape_rank_or_width_names_its_limit(recipe, limit, teacher, stats):
    with pytest.raises(ModelError, match=limit) as caught:
        make_method(recipe).plan(teacher.spec, Budget(), stats)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOSSLESS)
def test_settings_that_lose_nothing_give_the_logits_of_the_teacher(name, teacher, stats):
    method = make_method(LOSSLESS[name])
    plan = method.plan(teacher.spec, Budget(), stats)
    if name in FULL_RANK:  # past the refusal of ranks that save nothing
        full = {site.name: LowRank(rank=min(site.n_in, site.n_out)) for site in plan.changed().values()}
        plan = Plan(method=name, source=teacher.spec, spec=teacher.spec.with_matrices(full))
    result = method.compress(teacher, plan, stats, seed=0)
    assert float((logits(result.model) - logits(teacher)).abs().max()) <= 1e-6


TINY = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_ctx=12, vocab_size=31)
TERMS = (KronVL, KronPerm, KronFisher, KronAct, KronActPerm)


@pytest.fixture(scope="module")
def tiny(toy):
    model = toy(ModelSpec.dense(TINY), seed=2, dtype=torch.float64)
    rows = torch.randint(31, (8, 12), generator=torch.Generator().manual_seed(3))
    spec = StatsSpec.everywhere(("gram", "full_fisher"), model.spec)
    return model, collect(model, spec, rows, measurement=Measurement())


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(TERMS),
    st.sampled_from(legal_shapes(8, 32)),
    st.sampled_from(["rms", "sqrt"]),
    st.booleans(),
    st.data(),
)
def test_whatever_shape_and_terms_a_plan_allows_can_be_built(tiny, kind, shape, gauge, scales, data):
    terms = data.draw(st.integers(1, min(shape.max_terms, 8)))
    recipe = kind(shape=(shape.m1, shape.n1), terms=terms, gauge=gauge, scales=scales)
    result = squeeze(recipe, *tiny)
    assert all(bool(torch.isfinite(parameter).all()) for parameter in result.model.parameters())
    for row in result.report:
        assert row.achieved_error == pytest.approx(row.predicted_error, rel=1e-6, abs=1e-12 * row.energy)
        assert row.rank_bound == shape.rank_bound(terms)
