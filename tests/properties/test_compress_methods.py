"""What every method keeps (count, seed, input, prediction), and what each one is by its own definition."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from model.algebra.kron import rearrange
from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.kron_recipe import KronPrune, KronVL
from model.compress.methods import make_method
from model.compress.recipe import Dense, RandomInit
from model.config import GPT2Config, ModelError, ModelSpec
from model.export import load_native, save_native, to_dense
from model.layers.structured import set_mode

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=24, n_ctx=16, vocab_size=61)
IDX = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(5))
RECIPES = {
    "vl": KronVL(shape=(12, 24), terms=2),
    "vl-sqrt-scales": KronVL(shape=(6, 16), terms=3, scales=True, gauge="sqrt"),
    "vl-norm": KronVL(shape=(24, 24), terms=2, norm="frobenius"),
    "vl-norm-scales": KronVL(shape=(24, 24), terms=2, norm="frobenius", scales=True, layers=(1,)),
    "vl-many": KronVL(shape=(4, 8), terms=20),
    "prune": KronPrune(shape=(12, 96)),
    "prune-energy": KronPrune(shape=(8, 48), offset="energy", eps_init=0.1, layers=(0,)),
    "random": RandomInit(of=KronVL(shape=(12, 24), terms=2)),
    "random-sqrt": RandomInit(of=KronVL(shape=(24, 48)), gauge="sqrt"),
    "dense": Dense(),
}
COMPRESSING = [name for name in RECIPES if name != "dense"]


@pytest.fixture(scope="module")
def teacher(toy):
    return toy(ModelSpec.dense(ARCH), seed=1)


def squeeze(recipe, model, *, seed=0):
    method = make_method(recipe)
    return method.compress(model, method.plan(model.spec, Budget()), seed=seed)


def weights(model, name):
    return model.site(name).weight_matrix().detach().double()


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_counts_what_is_built(name, teacher):
    result = squeeze(RECIPES[name], teacher)
    assert result.plan.num_parameters == sum(p.numel() for p in result.model.parameters())
    assert result.model.spec == result.plan.spec
    assert [row.name for row in result.report] == list(result.plan.changed())
    saved = sum(row.dense_parameters - row.parameters for row in result.report)
    assert teacher.num_parameters() - result.model.num_parameters() == saved


@pytest.mark.parametrize("name", RECIPES)
def test_a_seed_gives_the_same_bytes_and_the_teacher_stays(name, teacher, tmp_path):
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for folder in ("a", "b"):
        result = squeeze(RECIPES[name], teacher, seed=3)
        save_native(result.model, tmp_path / folder)
        with torch.no_grad():  # the result shares nothing with the teacher
            for parameter in result.model.parameters():
                parameter.zero_()
    first, again = ((tmp_path / folder / "model.safetensors").read_bytes() for folder in ("a", "b"))
    assert first == again
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", RECIPES)
def test_only_replaced_matrices_change(name, teacher):
    result = squeeze(RECIPES[name], teacher)
    changed = set(result.plan.changed())
    for key, value in teacher.state_dict().items():
        module = key.rpartition(".")[0]
        if module not in changed:
            assert torch.equal(result.model.state_dict()[key], value), key
        elif key.endswith("bias") and not name.startswith("random"):
            assert torch.equal(result.model.get_parameter(key), value), key


@pytest.mark.parametrize("name", RECIPES)
def test_all_modes_the_dense_export_and_the_saved_model_agree(name, teacher, tmp_path):
    model = squeeze(RECIPES[name], teacher).model
    save_native(model, tmp_path)
    again = load_native(tmp_path).eval()
    with torch.no_grad():
        expected = model(IDX)
        assert torch.equal(again(IDX), expected)
        for mode in ("factored", "materialize", "cached"):
            set_mode(model, mode)
            torch.testing.assert_close(model(IDX), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(to_dense(model)(IDX), expected, atol=1e-4, rtol=1e-4)
        exact = model.double()
        set_mode(exact, "factored")
        assert (to_dense(exact)(IDX) - exact(IDX)).abs().max() <= 1e-10


@pytest.mark.parametrize("name", COMPRESSING)
def test_predicted_error_is_achieved_error_and_both_are_measured(name, teacher):
    result = squeeze(RECIPES[name], teacher)
    for row in result.report:
        weight, kept = weights(teacher, row.name), weights(result.model, row.name)
        error = float((weight - kept).square().sum())
        assert row.achieved_error == pytest.approx(error, rel=1e-6)
        assert row.energy == pytest.approx(float(weight.square().sum()))
        assert row.energy_kept == pytest.approx(1 - error / row.energy)
        assert row.rank_bound >= np.linalg.matrix_rank(kept.numpy())
        if name.startswith("random"):
            assert row.predicted_error is None
        else:
            assert row.predicted_error == pytest.approx(row.achieved_error, rel=1e-5)


@pytest.mark.parametrize("name", RECIPES)
def test_one_step_in_bf16_lowers_the_loss_and_reaches_every_parameter(name, teacher):
    model = squeeze(RECIPES[name], teacher).model.train()
    targets = IDX.roll(-1, dims=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(IDX, targets)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        optimizer.step()
    assert losses[1] < losses[0]


# --- kron_vl -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "terms"), [((12, 24), 1), ((12, 24), 3), ((12, 24), 8), ((24, 24), 2), ((4, 8), 30)]
)
def test_the_error_is_the_tail_of_the_rearranged_weight(teacher, shape, terms):
    result = squeeze(KronVL(shape=shape, terms=terms), teacher)
    for row in result.report:
        weight, factors = weights(teacher, row.name), result.model.site(row.name).shape
        values = np.linalg.svd(rearrange(weight, factors).numpy(), compute_uv=False)
        tail, energy = float((values[terms:] ** 2).sum()), float(weight.square().sum())
        assert row.predicted_error == pytest.approx(tail, rel=1e-8, abs=1e-20 * energy)
        assert row.achieved_error == pytest.approx(
            tail, rel=1e-5, abs=1e-12 * energy
        )  # factors are stored in fp32


@pytest.mark.parametrize("shape", [(12, 24), (6, 16), (24, 96), (1, 1), (24, 1)])
def test_all_terms_reproduce_the_teacher(teacher, shape):
    most = KronShape(shape[0], shape[1], 24 // shape[0], 96 // shape[1]).max_terms
    result = squeeze(KronVL(shape=shape, terms=most), teacher)
    assert all(row.energy_kept > 1 - 1e-12 for row in result.report)
    with torch.no_grad():
        torch.testing.assert_close(result.model(IDX), teacher(IDX), atol=1e-3, rtol=1e-4)


def test_more_terms_never_fit_worse(teacher):
    errors = [
        [row.achieved_error for row in squeeze(KronVL(shape=(6, 16), terms=terms), teacher).report]
        for terms in range(1, 25)
    ]
    assert all(
        now <= before
        for earlier, later in pairwise(errors)
        for before, now in zip(earlier, later, strict=True)
    )


def test_a_thin_shape_stays_below_full_rank_and_random_factors_reach_the_bound(teacher):
    result = squeeze(RandomInit(of=KronVL(shape=(8, 96))), teacher)
    for row in result.report:
        assert np.linalg.matrix_rank(weights(result.model, row.name).numpy(), tol=1e-5) == row.rank_bound == 8


def test_gauges_share_a_term_as_they_promise_and_mean_the_same_model(teacher):
    sqrt, rms = (
        squeeze(KronVL(shape=(12, 24), terms=3, gauge=gauge), teacher).model for gauge in ("sqrt", "rms")
    )
    for name in ("h.0.mlp.c_fc", "h.1.mlp.c_proj"):
        for model, size in (
            (sqrt, lambda f: f.flatten(1).norm(dim=1)),
            (rms, lambda f: f.square().mean(dim=(1, 2)).sqrt()),
        ):
            layer = model.site(name)
            torch.testing.assert_close(size(layer.left), size(layer.right), rtol=1e-4, atol=1e-6)
            flat = layer.right.detach().flatten(1)
            assert (flat.gather(1, flat.abs().argmax(dim=1, keepdim=True)) > 0).all()
    with torch.no_grad():
        torch.testing.assert_close(sqrt(IDX), rms(IDX), atol=1e-4, rtol=1e-4)


def test_matching_the_norm_matches_it_and_costs_what_is_said(teacher):
    plain, matched, scaled = (
        squeeze(KronVL(shape=(24, 24), terms=1, norm=norm, scales=scales), teacher)
        for norm, scales in (("none", False), ("frobenius", False), ("frobenius", True))
    )
    for row, other, third in zip(plain.report, matched.report, scaled.report, strict=True):
        ratio = row.energy_kept**0.5
        assert other.achieved_error / other.energy == pytest.approx(2 - 2 * ratio, rel=1e-4)
        for result in (matched, scaled):
            assert float(weights(result.model, row.name).square().sum()) == pytest.approx(
                row.energy, rel=1e-5
            )
        assert third.achieved_error == pytest.approx(other.achieved_error, rel=1e-4)


def test_fitted_scales_never_raise_the_error(teacher):
    with_scales, without = (
        squeeze(KronVL(shape=(6, 16), terms=3, scales=s), teacher).report for s in (True, False)
    )
    for one, other in zip(with_scales, without, strict=True):
        assert one.achieved_error <= other.achieved_error * (1 + 1e-6)


# --- kron_prune ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", ["first", "energy"])
@pytest.mark.parametrize("shape", [(12, 96), (24, 48), (8, 48)])
def test_pruning_is_the_teacher_with_all_other_entries_zero(teacher, toy, shape, offset):
    result = squeeze(KronPrune(shape=shape, offset=offset), teacher)
    masked, m2, n2 = toy(ModelSpec.dense(ARCH), seed=1), 24 // shape[0], 96 // shape[1]
    offsets = {
        row.name: (int(row.details["offset_row"]), int(row.details["offset_col"])) for row in result.report
    }
    for i in range(2):
        up, down = offsets[f"h.{i}.mlp.c_fc"], offsets[f"h.{i}.mlp.c_proj"]
        assert up[1] == down[0], "both matrices keep the same hidden units"
        for name, (row, col), (rows, cols) in (("c_fc", up, (m2, n2)), ("c_proj", down, (n2, m2))):
            weight = masked.get_parameter(f"h.{i}.mlp.{name}.weight").data
            kept = torch.zeros_like(weight)
            kept[row::rows, col::cols] = weight[row::rows, col::cols]
            dropped = float((weight - kept).double().square().sum())
            report = next(r for r in result.report if r.name == f"h.{i}.mlp.{name}")
            assert report.predicted_error == pytest.approx(dropped, rel=1e-6)
            weight.copy_(kept)
    with torch.no_grad():
        torch.testing.assert_close(result.model(IDX), masked(IDX), atol=1e-5, rtol=1e-5)


def test_the_energy_offset_keeps_at_least_as_much_of_each_pair(teacher):
    first, energy = (
        squeeze(KronPrune(shape=(8, 48), offset=offset), teacher).report for offset in ("first", "energy")
    )
    for i in (0, 2):  # c_fc and c_proj of a block
        assert sum(r.achieved_error for r in energy[i : i + 2]) <= sum(
            r.achieved_error for r in first[i : i + 2]
        )


def test_the_papers_start_fills_the_zeros_of_b(teacher):
    right = squeeze(KronPrune(shape=(12, 96), eps_init=0.1), teacher).model.site("h.0.mlp.c_fc").right
    torch.testing.assert_close(right.detach(), torch.tensor([[[1.0], [0.1]]]))


# --- controls ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["random", "random-sqrt"])
def test_random_weights_have_the_scale_of_the_teachers_and_no_bias(name, teacher):
    result, other = (squeeze(RECIPES[name], teacher, seed=seed) for seed in (0, 1))
    for row in result.report:
        size = float(weights(result.model, row.name).square().mean())
        assert size == pytest.approx(float(weights(teacher, row.name).square().mean()), rel=1e-6)
        assert result.model.site(row.name).bias.eq(0).all()
        assert not torch.equal(weights(result.model, row.name), weights(other.model, row.name))


def test_the_dense_control_is_the_teacher(teacher):
    assert torch.equal(squeeze(Dense(), teacher).model(IDX), teacher(IDX))


# --- refusals ------------------------------------------------------------------------------------------


def test_a_plan_for_another_model_is_refused(teacher, toy):
    method = make_method(KronVL(shape=(12, 24)))
    other = toy(ModelSpec.dense(GPT2Config(n_layer=3, n_head=2, n_embd=24, n_ctx=16, vocab_size=61)))
    with pytest.raises(ModelError, match="was made for another model"):
        method.compress(other, method.plan(teacher.spec, Budget()), seed=0)


def test_a_weight_that_is_not_finite_is_refused(toy):
    broken = toy(ModelSpec.dense(ARCH))
    broken.h[1].mlp.c_proj.weight.data[3, 3] = float("nan")
    with pytest.raises(ModelError, match="NaN or infinity"):
        squeeze(KronVL(shape=(12, 24)), broken)
