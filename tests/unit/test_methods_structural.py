"""MoDeGPT, pruning, dropped blocks: exact where nothing is cut, predicted where something is, truly small."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from structural_lab import ARCH, IDX, RECIPES, errors, inputs_of, logits, measured, squeeze, teacher_of

from model.algebra.nystrom import selection_loss
from model.compress.recipe import RandomInit
from model.compress.structural_recipe import LayerDrop, ModeGPT, ModeGPTJoint, PruneMLP
from model.config import ModelSpec
from model.export import load_native, save_native, save_stock, to_dense
from model.gpt2 import GPT2


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


# --- what every method keeps --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_the_plan_counts_what_is_built_and_the_modules_are_small(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    assert result.plan.num_parameters == sum(p.numel() for p in result.model.parameters())
    assert result.model.spec == result.plan.spec
    assert {row.name for row in result.report} >= set(result.plan.changed())
    assert result.model.num_parameters() < teacher.num_parameters()
    assert result.model.spec.macs_per_token() < teacher.spec.macs_per_token()
    for row in result.report:
        layer = result.model.site(row.name)
        assert row.parameters == layer.weight_matrix().numel() < row.dense_parameters


@pytest.mark.parametrize("name", RECIPES)
def test_equal_bytes_and_the_teacher_stays(name, teacher, stats, tmp_path) -> None:
    before = {key: value.clone() for key, value in teacher.state_dict().items()}
    for folder in ("a", "b"):
        save_native(squeeze(RECIPES[name], teacher, stats).model, tmp_path / folder)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert all(torch.equal(before[key], value) for key, value in teacher.state_dict().items())


@pytest.mark.parametrize("name", RECIPES)
def test_folders_and_the_dense_form_give_the_same_logits(name, teacher, stats, tmp_path) -> None:
    model = squeeze(RECIPES[name], teacher, stats).model
    dense = to_dense(model)
    assert dense.spec == ModelSpec.dense(replace(ARCH, n_layer=len(model.h)))
    assert torch.allclose(logits(dense), logits(model), rtol=1e-12, atol=1e-12)
    save_native(model.float(), tmp_path)
    again = load_native(tmp_path).eval()
    assert torch.equal(logits(again), logits(model))
    assert again.num_parameters() == model.num_parameters()


@pytest.mark.parametrize("name", ["modegpt", "joint", "layerdrop", "prune"])
def test_plain_transformers_opens_the_stock_form(name, teacher, stats, tmp_path) -> None:
    from transformers import GPT2LMHeadModel

    model = squeeze(RECIPES[name], teacher, stats).model
    save_stock(model, tmp_path)
    stock = GPT2LMHeadModel.from_pretrained(tmp_path).eval().double()
    assert load_file(tmp_path / "model.safetensors")["transformer.h.0.mlp.c_fc.weight"].shape == (32, 128)
    with torch.no_grad():
        assert torch.allclose(stock(IDX).logits, logits(model), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", RECIPES)
def test_what_was_predicted_is_achieved(name, teacher, stats) -> None:
    for row in squeeze(RECIPES[name], teacher, stats).report:
        assert row.predicted_error is not None
        assert row.achieved_error == pytest.approx(row.predicted_error, rel=1e-6), row.name
        assert 0 < row.achieved_error < row.energy
        assert row.energy_kept == pytest.approx(1 - row.achieved_error / row.energy)


@pytest.mark.parametrize("name", ["modegpt", "joint"])
def test_a_training_step_lowers_the_loss_and_reaches_every_parameter(name, teacher, stats) -> None:
    model = squeeze(RECIPES[name], teacher, stats).model.float().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    losses = []
    for _ in range(2):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(IDX[:, :-1], IDX[:, 1:])
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["modegpt", "joint", "prune", "layerdrop"])
def test_random_weights_fill_the_same_structure(name, teacher, stats) -> None:
    recipe = RECIPES[name]
    control, real = squeeze(RandomInit(of=recipe), teacher, stats), squeeze(recipe, teacher, stats)
    assert control.model.spec == real.model.spec
    for site in control.plan.changed():
        new, old = (model.site(site).weight_matrix().detach() for model in (control.model, teacher))
        assert float(new.square().mean()) == pytest.approx(float(old.square().mean()), rel=1e-5)


# --- nothing cut, nothing lost ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [ModeGPT, ModeGPTJoint])
@pytest.mark.parametrize("correct", [False, True])
@pytest.mark.parametrize("vo_cov", ["input", "mixed"])
def test_full_widths_reproduce_the_logits_without_key_and_value_biases(
    recipe, correct, vo_cov, teacher, stats
) -> None:
    full = recipe(hidden=128, head_rank=16, bias_correction=correct, vo_cov=vo_cov)
    result = squeeze(full, teacher, stats)
    assert torch.allclose(logits(result.model), logits(teacher), rtol=1e-7, atol=1e-8)
    assert teacher.num_parameters() - result.model.num_parameters() == 2 * 2 * 32


def test_all_blocks_and_all_units_are_the_teacher(teacher, stats) -> None:
    for recipe in (LayerDrop(layers=2), PruneMLP(hidden=128), ModeGPT(targets="mlp", hidden=128)):
        result = squeeze(recipe, teacher, stats)
        assert torch.allclose(logits(result.model), logits(teacher), rtol=1e-9, atol=1e-9)


# --- the MLP ------------------------------------------------------------------------------------------------


def mlp_error(model: GPT2, teacher: GPT2, i: int) -> float:
    """Mean squared error of the MLP's output on the teacher's own inputs."""
    x = inputs_of(teacher)[f"h.{i}.mlp.c_fc"]
    with torch.no_grad():
        return float((model.h[i].mlp(x) - teacher.h[i].mlp(x)).square().sum(-1).mean())


@pytest.mark.parametrize("name", ["modegpt", "modegpt-bias", "joint", "joint-plain", "prune-activation"])
def test_the_reported_error_is_the_one_on_the_tokens(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    for i in range(2):
        assert mlp_error(result.model, teacher, i) == pytest.approx(
            errors(result)[f"h.{i}.mlp.c_proj"], rel=1e-6
        )


def test_a_refit_is_least_squares_and_never_worse_than_none(teacher, stats) -> None:
    result = squeeze(RECIPES["modegpt-mlp"], teacher, stats)
    hidden = inputs_of(teacher)["h.0.mlp.c_proj"]
    old = teacher.site("h.0.mlp.c_proj").weight_matrix().detach()
    columns = teacher.site("h.0.mlp.c_fc").weight_matrix().detach()
    chosen = result.model.site("h.0.mlp.c_fc").weight_matrix().detach()
    keep = torch.tensor([int((columns - c[:, None]).abs().sum(0).argmin()) for c in chosen.T])
    assert torch.equal(keep, keep.sort().values)
    best = torch.linalg.lstsq(hidden[:, keep], hidden @ old).solution
    assert torch.allclose(result.model.site("h.0.mlp.c_proj").weight_matrix(), best, rtol=1e-6, atol=1e-8)
    gram = stats.mean("gram/h.0.mlp.c_proj")
    assert selection_loss(gram, keep, old, best) <= selection_loss(gram, keep, old, old[keep])


@pytest.mark.parametrize("selector", ["rls", "greedy"])
def test_correction_refit_and_units_each_help(selector, teacher, stats) -> None:
    def total(recipe) -> float:
        return sum(row.achieved_error for row in squeeze(recipe, teacher, stats).report)

    refit = [ModeGPT(targets="mlp", hidden=k, selector="greedy") for k in (8, 20, 40, 90)]
    found = [total(recipe) for recipe in refit]
    assert all(more <= less * (1 + 1e-9) for less, more in itertools.pairwise(found))
    plain = total(ModeGPT(targets="mlp", hidden=40, selector=selector))
    pruned = total(PruneMLP(hidden=40, score="activation"))
    corrected = total(ModeGPT(targets="mlp", hidden=40, selector=selector, bias_correction=True))
    assert corrected < plain < pruned


def test_pruning_keeps_the_highest_scores(teacher, stats) -> None:
    up = teacher.site("h.1.mlp.c_fc").weight_matrix().detach()
    down = teacher.site("h.1.mlp.c_proj").weight_matrix().detach()
    hidden = inputs_of(teacher)["h.1.mlp.c_proj"]
    scores = {
        "magnitude": up.norm(dim=0) * down.norm(dim=1),
        "activation": hidden.square().mean(0) * down.square().sum(1),
    }
    for score, values in scores.items():
        model = squeeze(PruneMLP(hidden=30, score=score), teacher, stats).model
        keep = values.topk(30).indices.sort().values
        assert torch.equal(model.site("h.1.mlp.c_fc").weight_matrix(), up[:, keep])
        assert torch.equal(model.site("h.1.mlp.c_proj").weight_matrix(), down[keep])
        assert torch.equal(model.h[1].mlp.c_proj.bias, teacher.h[1].mlp.c_proj.bias)
