"""Budgets and plans: the cap holds, counts are known beforehand, and a refusal says what would do."""

import pytest

from model.algebra.shapes import legal_shapes
from model.compress.budget import Budget
from model.compress.contract import StatsSpec
from model.compress.kron_recipe import KronPrune, KronVL
from model.compress.methods import METHODS, make_method
from model.compress.recipe import Dense, MethodRecipe, RandomInit
from model.config import SIZES, Kron, ModelError, ModelSpec

GPT2_SMALL = ModelSpec.dense(SIZES["gpt2"])
BASE = 67_816_704


def plan(recipe, spec=GPT2_SMALL, **budget):
    return make_method(recipe).plan(spec, Budget(**budget))


BUDGET_TABLE = [
    (96_128_304, (384, 3072), 1, 384, 0.50),
    (96_128_304, (768, 1536), 1, 768, 0.50),
    (81_972_576, (384, 1536), 1, 768, 0.50),
    (81_972_576, (768, 768), 1, 768, 0.25),
    (81_972_576, (192, 3072), 1, 192, 0.25),
    (81_894_144, (48, 256), 47, 768, 3.12),
    (71_783_424, (256, 64), 10, 768, 0.25),
    (71_783_424, (128, 128), 10, 768, 0.49),
    (71_757_504, (64, 512), 5, 768, 0.43),
    (68_213_376, (256, 64), 1, 192, 0.02),
    (68_213_376, (128, 128), 1, 768, 0.05),
    (68_213_376, (64, 256), 1, 768, 0.09),
]
CAPS = (96_128_304, 81_972_576, 71_783_424, 68_213_376)


@pytest.mark.parametrize(("count", "shape", "terms", "rank", "macs"), BUDGET_TABLE)
def test_the_budget_table_is_reproduced_with_terms_given_and_with_terms_found(
    count, shape, terms, rank, macs
):
    cap = min(cap for cap in CAPS if cap >= count)
    for asked in (terms, 0):
        found = plan(KronVL(shape=shape, terms=asked), params=cap)
        assert found.num_parameters == count
        row = found.rows()[0]
        assert (row.role, row.blocks, row.rank_bound) == ("mlp.c_fc", tuple(range(12)), rank)
        assert row.macs / (row.n_in * row.n_out) == pytest.approx(macs, abs=0.006)
        assert found.spec.blocks[0].mlp_c_fc.terms == terms


def test_every_legal_shape_has_the_size_of_the_formula():
    for shape in legal_shapes(768, 3072):
        spec = plan(KronVL(shape=(shape.m1, shape.n1))).spec
        assert spec.num_parameters() == BASE + 24 * (shape.m1 * shape.n1 + shape.m2 * shape.n2)
        assert spec.blocks[3].mlp_c_proj == spec.blocks[3].mlp_c_fc.transposed()


def test_some_blocks_only():
    part = plan(KronVL(shape=(768, 768), layers=(3, 1)))
    assert part.num_parameters == 124_439_808 - 4 * (2_359_296 - 589_828)
    assert [row.blocks for row in part.rows()] == [(1, 3), (1, 3)]
    assert sorted(part.changed()) == ["h.1.mlp.c_fc", "h.1.mlp.c_proj", "h.3.mlp.c_fc", "h.3.mlp.c_proj"]


def test_a_plan_says_what_a_shape_cannot_do():
    assert "reach rank 384 of 768" in plan(KronVL(shape=(384, 3072))).notes[0]
    assert "1.34 times the multiplications" in plan(KronVL(shape=(256, 1024), terms=4)).notes[0]
    assert plan(KronVL(shape=(768, 768))).notes == ()


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (KronVL(shape=(250, 1024)), {}, "250 must divide 768 .*nearest legal first factors: 256x1024"),
        (KronVL(shape=(384, 3072), terms=3), {}, "choose 1 to 2; with 2 every 768x3072 weight is exact"),
        (KronVL(shape=(384, 3072), terms=0), {}, "set budget.params or terms"),
        (KronVL(layers=(12,)), {}, "layers names block 12; this model has blocks 0 to 11"),
        (
            KronVL(shape=(256, 1024), terms=2),
            {"params": 80_000_000},
            r"80,400,048 parameters, 400,048 above the cap of 80,000,000 .*nearest that keep it: shape = \[",
        ),
        (
            KronVL(shape=(256, 1024), terms=0),
            {"params": 81_972_576},
            r"1,572,528 \(1\.92%\) below the cap .*shape = \[384, 1536\], terms = 1 \(81,972,576\)",
        ),
        (
            KronVL(terms=0),
            {"params": 60_000_000},
            "no shape keeps it: these blocks leave 67,890,432 to 124,439,808",
        ),
        (
            KronPrune(),
            {"params": 81_972_576},
            r"kron_prune .* above the cap .*terms = 1 \(81,972,576\); .*terms = 1 \(81,972,576\)",
        ),
        (RandomInit(of=KronVL(shape=(7, 7))), {}, "7 must divide 768"),
        (Dense(), {"params": 100_000_000}, "dense has 124,439,808 parameters"),
        (KronPrune(), {"params": 96_128_304, "allocate": "greedy_gain"}, "set budget.allocate to 'uniform'"),
        (KronVL(), {"params": 81_972_576, "allocate": "modegpt_bi"}, "choose 'uniform' or 'greedy_gain'"),
        (KronVL(), {"params": -1}, "must be 0"),
        (KronVL(), {"tolerance": 1.0}, "must lie in"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(recipe, budget, message):
    with pytest.raises(ModelError, match=message) as caught:
        plan(recipe, **budget)
    assert "\n" not in str(caught.value)


def test_settings_that_an_error_names_do_keep_the_budget():
    import re

    with pytest.raises(ModelError) as caught:
        plan(KronVL(shape=(256, 1024), terms=2), params=80_000_000)
    named = re.findall(r"shape = \[(\d+), (\d+)\], terms = (\d+)", str(caught.value))
    assert len(named) == 3
    for m1, n1, terms in named:
        found = plan(KronVL(shape=(int(m1), int(n1)), terms=int(terms)), params=80_000_000)
        assert 80_000_000 * 0.998 <= found.num_parameters <= 80_000_000


def test_a_cap_counts_in_its_own_convention():
    same = plan(KronVL(shape=(768, 768)), params=81_186_144, convention="krony_no_wpe")
    assert same.num_parameters == 81_972_576
    with pytest.raises(ModelError, match="above the cap"):
        plan(KronVL(shape=(768, 768)), params=81_186_144)


def test_a_pruned_factor_is_exempt_from_decay_and_a_fitted_one_is_not():
    assert not plan(KronPrune()).spec.blocks[0].mlp_c_fc.decay_right
    assert plan(KronVL()).spec.blocks[0].mlp_c_fc.decay_right


def test_every_recipe_has_its_method():
    recipes = MethodRecipe.__args__
    assert {recipe().name for recipe in recipes} == set(METHODS)
    for recipe in recipes:
        method = make_method(recipe())
        assert method.name == recipe().name
        assert recipe.version >= 1
        assert method.stats(GPT2_SMALL).needs == tuple(sorted(recipe().needs))


def test_wishes_for_statistics_add_up():
    one, other = StatsSpec(gram=frozenset({"a"})), StatsSpec(gram=frozenset({"b"}), block_influence=True)
    assert one | other == StatsSpec(gram=frozenset({"a", "b"}), block_influence=True)
    assert not (one | other).is_empty


def test_a_model_with_other_widths_takes_shapes_of_its_own():
    from dataclasses import replace

    narrow = replace(GPT2_SMALL, blocks=tuple(replace(b, mlp_hidden=1536) for b in GPT2_SMALL.blocks))
    assert plan(KronVL(shape=(768, 384)), narrow).spec.blocks[0].mlp_c_fc == Kron(m1=768, n1=384, m2=1, n2=4)
    uneven = replace(narrow, blocks=(narrow.blocks[0], *GPT2_SMALL.blocks[1:]))
    with pytest.raises(ModelError, match=r"widths \[1536, 3072\] cannot share one factor shape"):
        plan(KronVL(), uneven)
    assert plan(KronVL(layers=(1, 2)), uneven).rows()
