"""Every method under every cap of the comparison: the exact plan, or an honest reason; integers only."""

from functools import cache
from typing import get_args

import pytest

from model.compress.at_budget import AtBudget, Track, recipes_at, tracks_of
from model.compress.budget import Budget
from model.compress.contract import Plan
from model.compress.methods import METHODS, make_method
from model.compress.recipe import MethodRecipe
from model.config import SIZES, GPT2Config, ModelSpec

SMALL = ModelSpec.dense(SIZES["gpt2"])
# cap: blocks and size of layerdrop · rank and size of SVD, MLP only · ranks of MLP, c_attn, c_proj and size,
# all linears · width and size of MoDeGPT, MLP only · width, head width and size, all linears
TABLE = {
    103_176_192: (
        (9, 103_176_192),
        (383, 103_113_984),
        (460, 432, 288, 103_132_416),
        (1919, 103_173_876),
        (2304, 48, 103_176_192),
    ),
    96_128_304: (
        (8, 96_088_320),
        (307, 96_109_824),
        (409, 384, 256, 96_072_960),
        (1537, 96_128_268),
        (2041, 43, 96_112_860),
    ),
    89_000_448: (
        (7, 89_000_448),
        (229, 88_921_344),
        (358, 335, 223, 88_958_208),
        (1150, 88_990_440),
        (1799, 37, 88_994_340),
    ),
    81_972_576: (
        (6, 81_912_576),
        (153, 81_917_184),
        (307, 288, 192, 81_954_048),
        (769, 81_963_276),
        (1538, 32, 81_967_896),
    ),
    71_783_424: (
        (4, 67_736_832),
        (43, 71_779_584),
        (233, 219, 146, 71_742_720),
        (217, 71_782_188),
        (1177, 24, 71_769_516),
    ),
    68_213_376: (
        (4, 67_736_832),
        (4, 68_185_344),
        (207, 194, 129, 68_111_616),
        (23, 68_204_052),
        (1032, 22, 68_210_112),
    ),
}


@cache
def rows(cap: int, track: Track) -> tuple[AtBudget, ...]:
    return tuple(recipes_at(SMALL, cap, track=track))


def plans(cap: int, track: Track) -> dict[str, Plan]:
    return {row.label: row.plan for row in rows(cap, track) if isinstance(row.plan, Plan)}


@pytest.mark.parametrize("cap", TABLE)
def test_the_table_of_budgets_is_reproduced_to_the_unit(cap):
    drop, svd_mlp, svd_all, width, heads = TABLE[cap]
    narrow, wide = plans(cap, "M"), plans(cap, "A")
    assert (len(wide["layerdrop"].spec.blocks), wide["layerdrop"].num_parameters) == drop
    for name in ("svd", "fwsvd", "asvd", "svdllm", "svdllm_bc", "kfac_svd"):
        assert (narrow[name].spec.blocks[5].mlp_c_fc.rank, narrow[name].num_parameters) == svd_mlp
        block = wide[name].spec.blocks[5]
        ranks = block.mlp_c_proj.rank, block.attn_c_attn.rank, block.attn_c_proj.rank
        assert (*ranks, wide[name].num_parameters) == svd_all
    for name in ("modegpt", "prune_mlp"):
        assert (narrow[name].spec.blocks[5].mlp_hidden, narrow[name].num_parameters) == width
    for name in ("modegpt", "modegpt_joint"):
        block = wide[name].spec.blocks[5]
        assert (block.mlp_hidden, block.head_qk, wide[name].num_parameters) == heads


@pytest.mark.parametrize("cap", TABLE)
@pytest.mark.parametrize("track", get_args(Track))
def test_a_plan_keeps_the_cap_and_its_recipe_repeats_it(cap, track):
    budget = Budget(params=cap)
    for label, recipe, plan in rows(cap, track):
        if isinstance(plan, str):
            assert plan
            assert "\n" not in plan
            continue
        assert make_method(recipe).plan(SMALL, budget) == plan
        assert plan.num_parameters <= cap
        if label != "layerdrop":
            assert plan.num_parameters >= cap * 0.998, label
        changed = {name.split(".", 2)[2] for name in plan.changed()}
        if track == "M":
            assert changed == {"mlp.c_fc", "mlp.c_proj"}
            assert plan.spec.embedding == SMALL.embedding


def test_every_registered_method_stands_on_a_track():
    found = {row.recipe.name for track in get_args(Track) for row in rows(81_972_576, track)}
    assert found == set(METHODS)
    assert all(tracks_of(kind) for kind in get_args(MethodRecipe))


def test_kronecker_methods_take_the_cheapest_shape_of_full_rank():
    for cap, shape in ((81_972_576, "(768x768)(1x4)"), (96_128_304, "(768x1536)(1x2)")):
        found = plans(cap, "M")
        for name in ("kron_vl", "kron_prune", "kron_perm", "kron_fisher", "kron_act", "kron_act_perm"):
            row = found[name].rows()[0]
            assert (row.structure, row.rank_bound) == (shape, 768)
            assert found[name].num_parameters == cap


def test_what_has_one_structure_says_what_size_it_is():
    reasons = {row.label: row.plan for row in rows(81_972_576, "A") if isinstance(row.plan, str)}
    assert set(reasons) == {"kngpt2", "tqcompressor", "dense"}
    assert "83,907,530 parameters, 1,934,954 above the cap" in reasons["kngpt2"]
    assert "81,336,388 parameters, 636,188 (0.78%) below the cap" in reasons["tqcompressor"]
    (prune,) = (row.plan for row in rows(89_000_448, "M") if row.recipe.name == "kron_prune")
    assert prune == "no shape at all MLPs keeps 88,822,447 to 89,000,448 parameters (tied_all)"


def test_other_sizes_and_conventions():
    spec = ModelSpec.dense(GPT2Config(n_layer=4, n_head=4, n_embd=256, vocab_size=8192, n_ctx=256))
    for convention in ("tied_all", "krony_no_wpe", "non_embedding"):
        cap = spec.num_parameters(convention) - 24 * 256 * 256
        found = [row.plan for row in recipes_at(spec, cap, track="M", convention=convention)]
        sizes = [plan.spec.num_parameters(convention) for plan in found if isinstance(plan, Plan)]
        assert len(sizes) >= 12
        assert all(cap * 0.998 <= size <= cap for size in sizes)
