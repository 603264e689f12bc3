"""Ranks of the low-rank family under a budget: the published table, even ranks, ranks by gain, refusals."""

import re
from dataclasses import replace

import pytest
from low_rank_lab import RECIPES, measured, squeeze, teacher_of

from model.compress.budget import Budget
from model.compress.contract import Unmeasured
from model.compress.low_rank_recipe import ASVD, FWSVD, KFACSVD, SVD, SVDLLM, SVDLLMBC
from model.compress.methods import make_method
from model.config import SIZES, LowRank, ModelError, ModelSpec

GPT2_SMALL = ModelSpec.dense(SIZES["gpt2"])
TABLE = [
    (103_176_192, 383, 103_113_984, (460, 432, 288), 103_132_416),
    (96_128_304, 307, 96_109_824, (409, 384, 256), 96_072_960),
    (89_000_448, 229, 88_921_344, (358, 335, 223), 88_958_208),
    (81_972_576, 153, 81_917_184, (307, 288, 192), 81_954_048),
    (71_783_424, 43, 71_779_584, (233, 219, 146), 71_742_720),
    (68_213_376, 4, 68_185_344, (207, 194, 129), 68_111_616),
]


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


# --- plans and budgets --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cap", "rank", "mlp_only", "ranks", "everywhere"), TABLE)
@pytest.mark.parametrize("recipe", [SVD(), SVDLLMBC(), KFACSVD()], ids=lambda r: r.name)
def test_the_budget_table_is_reproduced(recipe, cap, rank, mlp_only, ranks, everywhere):
    found = make_method(recipe).plan(GPT2_SMALL, Budget(params=cap))
    assert found.num_parameters == mlp_only == 67_816_704 + 92_160 * rank
    assert {site.matrix.rank for site in found.changed().values()} == {rank}
    mlp, qkv, out = ranks
    found = make_method(replace(recipe, targets="all_linear")).plan(GPT2_SMALL, Budget(params=cap))
    assert found.num_parameters == everywhere == 39_505_152 + 92_160 * mlp + 36_864 * qkv + 18_432 * out
    assert [(row.role, row.structure) for row in found.rows()] == [
        ("attn.c_attn", f"rank {qkv}"),
        ("attn.c_proj", f"rank {out}"),
        ("mlp.c_fc", f"rank {mlp}"),
        ("mlp.c_proj", f"rank {mlp}"),
    ]


def test_no_larger_uniform_ratio_fits():
    cap = 81_972_576
    found = make_method(SVD(targets="all_linear")).plan(GPT2_SMALL, Budget(params=cap)).changed()
    breaks = {"attn.c_attn": 576, "attn.c_proj": 384, "mlp.c_fc": 614.4, "mlp.c_proj": 614.4}
    ratios = [(found[f"h.0.{role}"].matrix.rank + 1) / even for role, even in breaks.items()]
    larger = {
        f"h.{i}.{role}": LowRank(rank=int(min(ratios) * even + 1e-9))
        for i in range(12)
        for role, even in breaks.items()
    }
    assert GPT2_SMALL.with_matrices(larger).num_parameters() > cap


def test_ranks_of_a_multiple_and_of_some_blocks():
    budget = Budget(params=110_000_000, tolerance=0.02)
    recipe = SVD(targets="all_linear", rank_multiple=8, layers=(2, 5, 7))
    found = make_method(recipe).plan(GPT2_SMALL, budget).changed()
    assert {name.split(".")[1] for name in found} == {"2", "5", "7"}
    assert {site.matrix.rank % 8 for site in found.values()} == {0}


@pytest.mark.parametrize(
    ("recipe", "budget", "message"),
    [
        (
            SVD(rank=615),
            {},
            "rank 615 of a 768x3072 weight: choose 1 to 614; from 615 on two factors are no smaller",
        ),
        (SVD(rank=400, targets="all_linear"), {}, r"svd: h\.0\.attn\.c_proj: rank 400 .*choose 1 to 383"),
        (SVDLLM(rank=-1), {}, "rank=-1 and rank_multiple=1 must be at least 0 and 1"),
        (SVD(), {}, "rank = 0 takes as much as the budget allows; set budget.params or rank"),
        (SVD(layers=(12,)), {"params": 9}, "layers names block 12; this model has blocks 0 to 11"),
        (
            ASVD(rank=400),
            {"params": 81_972_576},
            r"asvd, rank 400 has 104,680,704 .* above the cap .*rank = 0 keeps it with mlp\.c_fc 153, ",
        ),
        (
            FWSVD(),
            {"params": 60_000_000},
            "low rank at these matrices leaves 67,908,864 to 124,402,944 parameters",
        ),
        (
            SVD(rank_multiple=64),
            {"params": 81_972_576},
            r"2\.88%\) below the cap .*mlp\.c_proj 128 \(79,613,184\); raise budget\.tolerance",
        ),
        (SVD(), {"params": 81_972_576, "allocate": "modegpt_bi"}, "choose 'uniform' or 'greedy_gain'"),
    ],
)
def test_what_cannot_be_is_refused_with_what_could(recipe, budget, message):
    with pytest.raises(ModelError, match=message) as caught:
        make_method(recipe).plan(GPT2_SMALL, Budget(**budget))
    assert "\n" not in str(caught.value)


def test_ranks_that_an_error_names_keep_the_budget():
    budget = Budget(params=81_972_576)
    with pytest.raises(ModelError) as caught:
        make_method(SVD(rank=200)).plan(GPT2_SMALL, budget)
    rank = int(re.search(r"mlp\.c_fc (\d+)", str(caught.value)).group(1))
    assert budget.fits(budget.size(make_method(SVD(rank=rank)).plan(GPT2_SMALL, budget).spec))


# --- ranks by gain ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["svd", "svdllm-bc", "kfac", "fwsvd-two"])
def test_ranks_by_gain_beat_equal_ranks_of_no_smaller_size(name, teacher, stats):
    recipe = replace(RECIPES[name], rank=0)
    method = make_method(recipe)
    cap = make_method(replace(recipe, rank=7)).plan(teacher.spec, Budget()).num_parameters
    budget = {"params": cap, "tolerance": 0.05}
    with pytest.raises(Unmeasured, match="depend on the weights"):
        method.plan(teacher.spec, Budget(**budget, allocate="greedy_gain"))
    equal = squeeze(recipe, teacher, stats, **budget)
    greedy = squeeze(recipe, teacher, stats, **budget, allocate="greedy_gain")
    assert cap * 0.99 <= greedy.plan.num_parameters <= cap  # one unit of the largest matrix at most is left

    def loss(result):  # shares of each matrix where outputs of different matrices have different units
        own = name in ("kfac", "fwsvd-two")
        return sum(row.achieved_error / (1 if own else row.energy) for row in result.report)

    assert loss(greedy) <= loss(equal) * (1 + 1e-9)
    assert len({site.matrix.rank for site in greedy.plan.changed().values()}) > 1
    for row in greedy.report:
        assert row.predicted_error == pytest.approx(row.achieved_error, rel=1e-6)


def test_ranks_by_gain_are_whole_units_and_name_what_is_too_little(teacher, stats):
    recipe = SVDLLM(rank_multiple=4)
    result = squeeze(recipe, teacher, stats, params=24_000, tolerance=0.05, allocate="greedy_gain")
    assert {site.matrix.rank % 4 for site in result.plan.changed().values()} == {0}
    with pytest.raises(
        ModelError, match=r"1 unit\(s\) of every matrix need .*leaves [\d,]+ to [\d,]+ parameters"
    ):
        squeeze(recipe, teacher, stats, params=14_000, allocate="greedy_gain")
    explicit = squeeze(SVD(rank=3), teacher, stats, allocate="greedy_gain")
    assert {site.matrix.rank for site in explicit.plan.changed().values()} == {3}
