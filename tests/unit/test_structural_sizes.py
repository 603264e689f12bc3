"""Sizes of structural methods: evenly or by block influence under a cap, whole blocks, refusals."""

import itertools
from dataclasses import replace

import pytest
import torch
from structural_lab import ARCH, IDX, RECIPES, WIDTHS, measured, squeeze, teacher_of

from model.compress.budget import Budget
from model.compress.contract import Stats, Unmeasured
from model.compress.layer_drop import LayerDropMethod
from model.compress.methods import make_method
from model.compress.structural_recipe import LayerDrop, ModeGPT, ModeGPTJoint, PruneMLP
from model.config import GPT2Config, ModelError, ModelSpec

SMALL = ModelSpec.dense(GPT2Config())
TABLE = {
    103_176_192: ((1919, 103_173_876), (2304, 48, 103_176_192), (9, 103_176_192)),
    96_128_304: ((1537, 96_128_268), (2041, 43, 96_112_860), (8, 96_088_320)),
    89_000_448: ((1150, 88_990_440), (1799, 37, 88_994_340), (7, 89_000_448)),
    81_972_576: ((769, 81_963_276), (1538, 32, 81_967_896), (6, 81_912_576)),
    71_783_424: ((217, 71_782_188), (1177, 24, 71_769_516), (4, 67_736_832)),
    68_213_376: ((23, 68_204_052), (1032, 22, 68_210_112), (4, 67_736_832)),
}
SCORES = (0.4, 0.2, 0.15, 0.12, 0.1, 0.08, 0.07, 0.06, 0.05, 0.06, 0.1, 0.3)


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


def influence(scores) -> Stats:
    """Statistics that hold block influence alone."""
    sums = {f"block_influence/h.{i}": torch.tensor(10 * (1.0 - s)) for i, s in enumerate(scores)}
    return Stats(tokens=10, sequences=1, sums=sums)


# --- sizes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", TABLE)
def test_uniform_sizes_of_gpt2_small(cap: int) -> None:
    (mlp, mlp_count), (hidden, head, count), (layers, drop_count) = TABLE[cap]
    budget = Budget(params=cap)
    for recipe in (ModeGPT(targets="mlp"), PruneMLP()):
        plan = make_method(recipe).plan(SMALL, budget)
        assert {block.mlp_hidden for block in plan.spec.blocks} == {mlp}
        assert plan.num_parameters == mlp_count == 67_779_840 + 1_537 * 12 * mlp
    for recipe in (ModeGPT(), ModeGPTJoint()):
        plan = make_method(recipe).plan(SMALL, budget)
        assert {(b.mlp_hidden, b.head_qk, b.head_vo) for b in plan.spec.blocks} == {(hidden, head, head)}
        assert plan.num_parameters == count
        assert count == 39_440_640 + 12 * (1_537 * hidden + 18_444 * head + 18_432 * head)
    plan = make_method(LayerDrop(layers=0)).plan(SMALL, budget)
    assert len(plan.spec.blocks) == layers
    assert plan.num_parameters == drop_count == 39_385_344 + 7_087_872 * layers
    assert any(f"{cap - drop_count:,}" in note for note in plan.notes)


def test_full_sizes_of_gpt2_small() -> None:
    full = make_method(ModeGPT(hidden=3072, head_rank=64)).plan(SMALL, Budget())
    assert full.num_parameters == 124_421_376
    mlp = make_method(ModeGPT(targets="mlp", hidden=3072)).plan(SMALL, Budget())
    assert mlp.num_parameters == SMALL.num_parameters() == 124_439_808


@pytest.mark.parametrize("cap", TABLE)
@pytest.mark.parametrize("recipe", [ModeGPT(), ModeGPT(targets="mlp", max_sparsity=0.999), PruneMLP()])
def test_influence_spreads_a_budget_without_exceeding_it(cap: int, recipe) -> None:
    budget = Budget(params=cap, allocate="modegpt_bi")
    if isinstance(recipe, PruneMLP) and cap < 80_000_000:
        with pytest.raises(ModelError, match=r"below|above"):  # at most 0.8 may go from each block
            make_method(recipe).plan(SMALL, budget, influence(SCORES))
        return
    plan = make_method(recipe).plan(SMALL, budget, influence(SCORES))
    assert cap - 2 * 1_537 < plan.num_parameters <= cap
    hidden = [block.mlp_hidden for block in plan.spec.blocks]
    for (s, k), (t, j) in itertools.combinations(zip(SCORES, hidden, strict=True), 2):
        assert (s - t) * (k - j) >= 0 or abs(k - j) <= 1


def test_a_large_eps_is_uniform_and_multiples_are_kept() -> None:
    budget = Budget(params=81_972_576, allocate="modegpt_bi")
    plan = make_method(ModeGPT(eps=1e6, max_sparsity=0.95)).plan(SMALL, budget, influence(SCORES))
    hidden = [block.mlp_hidden for block in plan.spec.blocks]
    assert max(hidden) - min(hidden) <= 1
    for allocate in ("uniform", "modegpt_bi"):
        eight = make_method(ModeGPT(rank_multiple=8)).plan(
            SMALL, Budget(params=81_972_576, allocate=allocate), influence(SCORES)
        )
        assert all(b.mlp_hidden % 8 == 0 and b.head_qk % 8 == 0 for b in eight.spec.blocks)
        assert eight.num_parameters <= 81_972_576


def test_what_cannot_be_is_refused_with_what_can(teacher, stats) -> None:
    def plan(recipe, **budget):
        return make_method(recipe).plan(SMALL, Budget(**budget))

    with pytest.raises(ModelError, match="can have 40,362,552 to 124,421,376 parameters"):
        plan(ModeGPT(), params=30_000_000)
    with pytest.raises(ModelError, match=r"hidden = 1538, head_rank = 32 has 81,967,896"):
        plan(ModeGPT(hidden=2000, head_rank=32), params=81_972_576)
    with pytest.raises(ModelError, match="needs head_rank"):
        plan(ModeGPT(hidden=2000))
    with pytest.raises(ModelError, match="at most 3072 and 64"):
        plan(ModeGPT(hidden=4000, head_rank=64))
    with pytest.raises(ModelError, match=r"set budget\.params or hidden"):
        plan(ModeGPT())
    with pytest.raises(ModelError, match="cannot spread a budget by greedy_gain"):
        plan(ModeGPT(), params=81_972_576, allocate="greedy_gain")
    with pytest.raises(Unmeasured):
        plan(ModeGPT(), params=81_972_576, allocate="modegpt_bi")
    with pytest.raises(ModelError, match=r"layers = 6 has 81,912,576"):
        plan(LayerDrop(layers=7), params=81_972_576)
    with pytest.raises(ModelError, match="below the cap"):
        plan(LayerDrop(layers=5), params=81_972_576)
    with pytest.raises(ModelError, match="cannot keep 13 of 12"):
        plan(LayerDrop(layers=13))
    small = squeeze(RECIPES["modegpt"], teacher, stats).model.spec
    method = make_method(ModeGPT(**WIDTHS))
    with pytest.raises(ModelError, match="compressed already"):
        method.plan(small, Budget())
    whole = method.plan(teacher.spec, Budget())
    with pytest.raises(Unmeasured):
        method.compress(teacher, whole, None, seed=0)


# --- dropped blocks -----------------------------------------------------------------------------------------


def test_dropped_blocks_leave_the_others_bit_equal(toy) -> None:
    model = toy(ModelSpec.dense(replace(ARCH, n_layer=12)), seed=3)
    for layers, kept in ((6, (0, 2, 4, 7, 9, 11)), (8, (0, 2, 3, 5, 6, 8, 9, 11))):
        method = LayerDropMethod(LayerDrop(layers=layers))
        result = method.compress(model, method.plan(model.spec, Budget()), seed=0)
        assert tuple(block.source for block in result.model.spec.blocks) == kept
        for i, source in enumerate(kept):
            old, new = model.h[source].state_dict(), result.model.h[i].state_dict()
            assert all(torch.equal(value, new[name]) for name, value in old.items())
        x = result.model.embed(IDX)
        for source in kept:
            x = model.h[source](x)
        assert torch.equal(result.model(IDX), model.logits(model.ln_f(x)))


def test_influence_keeps_the_blocks_that_turn_the_stream(toy) -> None:
    plan = make_method(LayerDrop(layers=4, select="bi")).plan(SMALL, Budget(), influence(SCORES))
    assert [block.source for block in plan.spec.blocks] == [0, 1, 2, 11]
    ties = make_method(LayerDrop(layers=3, select="bi")).plan(SMALL, Budget(), influence([0.5] * 12))
    assert [block.source for block in ties.spec.blocks] == [0, 1, 2]
    with pytest.raises(Unmeasured):
        make_method(LayerDrop(layers=4, select="bi")).plan(SMALL, Budget())
