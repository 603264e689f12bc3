"""`kron_units`: a narrow MLP held exactly by a Kronecker product, and what else that product can do."""

import pytest
import torch

from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import StatsSpec
from model.compress.kron_recipe import KronUnits
from model.compress.kron_units import mixture_scales
from model.compress.methods import make_method
from model.compress.structural_recipe import ModeGPT
from model.config import SIZES, GPT2Config, ModelError, ModelSpec

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=61)
ROWS = torch.randint(61, (12, 24), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def teacher(toy):
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


@pytest.fixture(scope="module")
def stats(teacher):
    spec = StatsSpec.everywhere(("gram", "block_influence"), teacher.spec)
    return collect(teacher, spec, ROWS, measurement=Measurement())


def squeeze(recipe, model, stats):
    method = make_method(recipe)
    return method.compress(model, method.plan(model.spec, Budget(), stats), stats, seed=0)


@pytest.mark.parametrize("corrected", [True, False])
@pytest.mark.parametrize("selector", ["greedy", "rls"])
@pytest.mark.parametrize("count", [8, 16, 32, 64])
def test_it_is_modegpt_with_as_many_units(teacher, stats, count, selector, corrected):
    mine = squeeze(KronUnits(shape=(16, count), selector=selector, bias_correction=corrected), teacher, stats)
    narrow = ModeGPT(hidden=count, targets="mlp", selector=selector, bias_correction=corrected)
    theirs = squeeze(narrow, teacher, stats)
    with torch.no_grad():
        torch.testing.assert_close(mine.model(ROWS), theirs.model(ROWS), atol=1e-10, rtol=0)
    by_name = {row.name: row for row in theirs.report}
    for row in mine.report:
        assert row.achieved_error == pytest.approx(by_name[row.name].achieved_error, rel=1e-6, abs=1e-12)
        assert row.predicted_error == pytest.approx(row.achieved_error, rel=1e-6, abs=1e-12)
    numbers = 2 * 2 * (64 // count) + 2 * (64 - count)  # both small factors, and a bias for every hidden unit
    assert mine.plan.num_parameters == theirs.plan.num_parameters + numbers


def test_training_can_wake_the_silent_units(teacher, stats):
    model = squeeze(KronUnits(shape=(16, 16)), teacher, stats).model.double()
    before = float(model(ROWS[:, :-1], ROWS[:, 1:]).detach())
    optimizer = torch.optim.SGD([model.site(f"h.{i}.mlp.c_proj").right for i in range(2)], lr=1e-4)
    for _ in range(5):
        optimizer.zero_grad()
        model(ROWS[:, :-1], ROWS[:, 1:]).backward()
        optimizer.step()
    for i in range(2):
        assert (model.site(f"h.{i}.mlp.c_proj").right.abs() > 0).all()
    assert float(model(ROWS[:, :-1], ROWS[:, 1:]).detach()) < before
    model(ROWS[:, :-1], ROWS[:, 1:]).backward()
    assert (model.site("h.0.mlp.c_fc").right.grad.abs() > 0).all()


@pytest.mark.parametrize(("count", "expected"), [(1, [1]), (3, [1, -1, 2]), (6, [1, -1, 2, -2, 0.5, -0.5])])
def test_scales_of_one_feature(count, expected):
    assert mixture_scales(count).tolist() == expected
    assert len(set(mixture_scales(12).tolist())) == 12


def test_sizes_on_gpt2_are_those_of_krony(teacher):
    plan = make_method(KronUnits()).plan(ModelSpec.dense(SIZES["gpt2"]), Budget(params=81_972_576))
    assert plan.num_parameters == 81_972_576
    with pytest.raises(ModelError, match=r"all 16 input rows: \[16, k\]"):
        make_method(KronUnits(shape=(8, 32))).plan(teacher.spec, Budget())
