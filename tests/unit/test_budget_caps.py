"""Caps on parameters, multiplications, cached keys and values: all that are set hold, one is used."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.compress.budget import Budget, BudgetError, Size, kv_bytes
from model.compress.contract import Stats
from model.compress.kron_recipe import KronPrune, KronVL
from model.compress.low_rank_recipe import SVD
from model.compress.methods import make_method
from model.compress.recipe import Dense
from model.compress.structural_recipe import LayerDrop, ModeGPT, PruneMLP
from model.config import SIZES, GPT2Config, ModelError, ModelSpec

SMALL = ModelSpec.dense(SIZES["gpt2"])
TOY = ModelSpec.dense(GPT2Config(n_layer=3, n_head=4, n_embd=64, vocab_size=211, n_ctx=32))
DENSE_MACS, DENSE_KV = 123_532_032, 36_864


def plan(recipe, spec=SMALL, **caps):
    return make_method(recipe).plan(spec, Budget(**caps))


def test_the_dense_model_costs_what_the_formulas_say():
    every = Budget(params=1, macs=1, kv_bytes=1)
    assert every.size(SMALL) == Size(124_439_808, DENSE_MACS, DENSE_KV)
    assert kv_bytes(SMALL) == 12 * 2 * 768 * 2
    assert Budget(macs=1).size(SMALL) == Size(0, DENSE_MACS, 0)


@pytest.mark.parametrize(
    "recipe",
    [
        KronVL(shape=(768, 768), terms=0),
        KronVL(shape=(256, 64), terms=0),
        SVD(),
        SVD(targets="all_linear"),
        ModeGPT(),
        ModeGPT(targets="mlp"),
        PruneMLP(rank_multiple=8),
        LayerDrop(layers=0),
    ],
    ids=str,
)
def test_a_cap_on_multiplications_is_kept_and_one_more_step_would_break_it(recipe):
    cap = 90_000_000
    found = plan(recipe, macs=cap, tolerance=0.2).spec
    assert cap * 0.8 <= found.macs_per_token() <= cap
    both = plan(recipe, macs=cap, params=100_000_000, tolerance=0.2).spec
    assert both.macs_per_token() <= cap
    assert both.num_parameters() <= 100_000_000
    assert both.num_parameters() <= found.num_parameters()


def test_the_tighter_cap_decides():
    loose = plan(SVD(), params=81_972_576)
    assert plan(SVD(), params=81_972_576, macs=DENSE_MACS) == loose
    tight = plan(SVD(), params=124_439_808, macs=81_009_408)
    assert tight == loose  # rank 153 costs 81,009,408 multiplications
    assert (
        plan(SVD(), params=124_439_808, macs=81_009_407, tolerance=0.01).spec.blocks[0].mlp_c_fc.rank == 152
    )


def test_a_cap_on_keys_and_values_narrows_heads():
    half = plan(ModeGPT(), kv_bytes=DENSE_KV // 2)
    assert kv_bytes(half.spec) == DENSE_KV // 2
    assert half.spec.blocks[0].head_qk == half.spec.blocks[0].head_vo == 32
    fewer = plan(LayerDrop(layers=0), kv_bytes=DENSE_KV // 2)
    assert len(fewer.spec.blocks) == 6
    with pytest.raises(
        BudgetError, match=r"36,864 bytes of keys and values per token, 18,432 above the cap of"
    ):
        plan(SVD(targets="all_linear"), params=81_972_576, kv_bytes=DENSE_KV // 2)
    kept = plan(KronVL(), params=81_972_576, kv_bytes=DENSE_KV)
    assert kept.num_parameters == 81_972_576


@pytest.mark.parametrize(
    ("recipe", "caps", "message"),
    [
        (
            KronVL(),
            {"macs": 80_000_000},
            r"81,138,432 multiply-accumulates per token, 1,138,432 above the cap",
        ),
        (
            KronVL(),
            {"macs": 90_000_000},
            r"8,861,568 \(9\.85%\) below the cap of 90,000,000, more than the 0\.20%",
        ),
        (Dense(), {"params": 130_000_000, "macs": 100_000_000}, "23,532,032 above the cap of 100,000,000"),
        (SVD(), {"macs": 60_000_000}, "above the cap of 60,000,000"),
        (KronPrune(), {"kv_bytes": -1}, "budget.kv_bytes=-1 must be 0"),
        (KronVL(terms=0), {}, "set budget.params or terms"),
    ],
)
def test_what_keeps_no_cap_says_which_and_by_how_much(recipe, caps, message):
    with pytest.raises(ModelError, match=message) as caught:
        plan(recipe, **caps)
    assert "\n" not in str(caught.value)


def test_importance_keeps_every_cap_too():
    scores = {f"block_influence/h.{i}": 0.5 + 0.1 * i for i in range(3)}
    import torch

    stats = Stats(tokens=1, sequences=1, sums={key: torch.tensor(value) for key, value in scores.items()})
    dense = Budget(params=1, macs=1, kv_bytes=1).size(TOY)
    caps = Budget(
        params=dense.params,
        macs=dense.macs * 7 // 10,
        kv_bytes=dense.kv_bytes,
        allocate="modegpt_bi",
        tolerance=0.05,
    )
    found = make_method(ModeGPT()).plan(TOY, caps, stats)
    assert caps.fits(caps.size(found.spec))
    assert found.spec.blocks[0].mlp_hidden > found.spec.blocks[2].mlp_hidden


@settings(max_examples=60, deadline=None)
@given(
    params=st.integers(min_value=0, max_value=200_000),
    macs=st.integers(min_value=0, max_value=200_000),
    kv=st.integers(min_value=0, max_value=1_600),
    kind=st.sampled_from(
        [KronVL(shape=(64, 64), terms=0), SVD(), ModeGPT(), PruneMLP(), LayerDrop(layers=0)]
    ),
)
def test_no_plan_ever_exceeds_a_cap(params, macs, kv, kind):
    budget = Budget(params=params, macs=macs, kv_bytes=kv, tolerance=0.3)
    try:
        found = make_method(kind).plan(TOY, budget)
    except ModelError:
        return
    size = replace(budget, params=params or 1, macs=macs or 1, kv_bytes=kv or 1).size(found.spec)
    for value, cap in zip(size, (params, macs, kv), strict=True):
        assert value <= cap or not cap
