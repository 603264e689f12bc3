"""Terms by gain: whatever lowers the loss most per parameter, exactly the best under equal prices."""

import itertools
from dataclasses import replace

import pytest
import torch

from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import GainMethod, StatsSpec, Unmeasured
from model.compress.kron_recipe import KronAct, KronFisher, KronVL
from model.compress.methods import make_method, make_plan
from model.config import GPT2Config, ModelError, ModelSpec

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=61)
ROWS = torch.randint(61, (12, 24), generator=torch.Generator().manual_seed(7))
SHAPE = KronShape(8, 16, 2, 4)
RECIPES = {
    "vl": KronVL(shape=(8, 16), terms=0),
    "vl-scales": KronVL(shape=(8, 16), terms=0, scales=True),
    "act": KronAct(shape=(8, 16), terms=0, max_iter=8),
    "act-closed": KronAct(shape=(16, 8), terms=0, max_iter=8),
}


@pytest.fixture(scope="module")
def teacher(toy):
    """Matrices that are worth unequal numbers of terms: one almost a product, the others not."""
    model = toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)
    weight = model.site("h.1.mlp.c_fc").weight
    generator = torch.Generator().manual_seed(2)
    parts = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((8, 16), (2, 4)))
    with torch.no_grad():
        weight.copy_(torch.kron(*parts) / 4 + 0.05 * weight)
    return model


@pytest.fixture(scope="module")
def stats(teacher):
    return collect(teacher, StatsSpec.everywhere(("gram",), teacher.spec), ROWS, measurement=Measurement())


def cap_of(recipe, spec, terms):
    return make_method(replace(recipe, terms=terms)).plan(spec, Budget()).num_parameters


def squeeze(recipe, teacher, stats, **budget):
    method = make_method(recipe)
    plan = make_plan(method, teacher, Budget(**budget), stats)
    return method.compress(teacher, plan, stats, seed=0)


@pytest.mark.parametrize("name", RECIPES)
def test_terms_by_gain_keep_the_cap_and_are_worth_more_than_equal_ones(name, teacher, stats):
    recipe = RECIPES[name]
    cap = cap_of(recipe, teacher.spec, 3)
    even = squeeze(recipe, teacher, stats, params=cap)
    gain = squeeze(recipe, teacher, stats, params=cap, allocate="greedy_gain")
    assert gain.plan.num_parameters == even.plan.num_parameters == cap
    terms = {site: matrix.matrix.terms for site, matrix in gain.plan.changed().items()}
    assert sum(terms.values()) == 12
    assert terms["h.1.mlp.c_fc"] < 3 < max(terms.values())
    assert gain.plan.notes[0] == f"keeps {min(terms.values())} to {max(terms.values())} terms"
    gains = make_method(recipe).gains(teacher, stats)

    def expected(counts):
        return sum(1 - sum(gains[site][:count]) for site, count in counts.items())

    assert expected(terms) < expected(dict.fromkeys(terms, 3))
    if name in ("vl", "act-closed"):  # there the gains are what a fit really holds
        lost = {row.name: row.achieved_error / row.energy for row in gain.report}
        share = sum(lost.values())
        assert share < sum(row.achieved_error / row.energy for row in even.report)
        sites = terms if name == "vl" else [site for site in terms if site.endswith("c_fc")]
        for site in sites:
            assert lost[site] == pytest.approx(1 - sum(gains[site][: terms[site]]), rel=1e-6, abs=1e-9)


def test_no_other_terms_of_that_size_are_better(teacher, stats):
    recipe = RECIPES["vl"]
    gains = list(make_method(recipe).gains(teacher).values())
    cap = cap_of(recipe, teacher.spec, 2)
    plan = make_plan(make_method(recipe), teacher, Budget(params=cap, allocate="greedy_gain"))
    found = [site.matrix.terms for site in plan.changed().values()]
    best = max(
        sum(sum(gain[:count]) for gain, count in zip(gains, counts, strict=True))
        for counts in itertools.product(range(1, 8), repeat=4)
        if sum(counts) == 8
    )
    mine = sum(sum(gain[:count]) for gain, count in zip(gains, found, strict=True))
    assert mine == pytest.approx(best, rel=1e-12)


def test_shapes_by_block_have_their_own_prices_and_multiplications_can_be_the_cap(teacher, stats):
    recipe = KronVL(layer_shapes=((8, 16), (4, 32)), terms=0)
    cap = cap_of(replace(recipe, terms=2), teacher.spec, 2)
    plan = make_plan(make_method(recipe), teacher, Budget(params=cap, tolerance=0.02, allocate="greedy_gain"))
    assert cap * 0.98 <= plan.num_parameters <= cap
    even = make_method(KronVL(shape=(8, 16), terms=2)).plan(teacher.spec, Budget()).spec.macs_per_token()
    budget = Budget(macs=even, tolerance=0.02, allocate="greedy_gain")
    assert make_plan(make_method(RECIPES["vl"]), teacher, budget).spec.macs_per_token() == even


def test_no_matrix_becomes_larger_than_it_was(teacher):
    dense = teacher.spec.num_parameters()
    budget = Budget(params=dense, tolerance=0.5, allocate="greedy_gain")
    plan = make_plan(make_method(RECIPES["vl"]), teacher, budget)
    assert {site.matrix.terms for site in plan.changed().values()} == {(16 * 64 - 1) // SHAPE.params(1)}
    assert plan.num_parameters < dense


def test_what_depends_on_weights_is_known_with_them_and_given_terms_are_kept(teacher, stats):
    cap = cap_of(RECIPES["vl"], teacher.spec, 3)
    for name in ("vl", "act"):
        method = make_method(RECIPES[name])
        assert isinstance(method, GainMethod)
        with pytest.raises(Unmeasured, match="terms by gain depend on the weights"):
            method.plan(teacher.spec, Budget(params=cap, allocate="greedy_gain"))
        with pytest.raises(ModelError, match="cannot spread a budget by modegpt_bi; choose 'uniform' or"):
            method.plan(teacher.spec, Budget(params=cap, allocate="modegpt_bi"))
    with pytest.raises(Unmeasured, match="kron_act needs statistics: gram"):
        make_method(RECIPES["act"]).gains(teacher)
    given = make_plan(
        make_method(KronVL(shape=(8, 16), terms=3)), teacher, Budget(params=cap, allocate="greedy_gain")
    )
    assert {site.matrix.terms for site in given.changed().values()} == {3}
    with pytest.raises(ModelError, match="terms = 0 takes as many as the budget allows"):
        make_plan(make_method(RECIPES["vl"]), teacher, Budget(allocate="greedy_gain"))
    with pytest.raises(ModelError, match=r"1 unit\(s\) of every matrix need"):
        make_plan(make_method(RECIPES["vl"]), teacher, Budget(params=4_000, allocate="greedy_gain"))
    with pytest.raises(ModelError, match="spreads a budget evenly only"):
        make_plan(
            make_method(KronFisher(shape=(8, 16), terms=0)),
            teacher,
            Budget(params=cap, allocate="greedy_gain"),
        )
