"""Kronecker fits that weigh: by Fisher information, by the inputs, and in an order chosen by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from kronecker_lab import RECIPES, inputs, matrix, measured, row_of, squeeze, teacher_of

from model.algebra.activation_permute import permuted_activation_kron_pair
from model.algebra.kron import rearrange
from model.algebra.psd import centred
from model.algebra.shapes import KronShape
from model.compress.contract import Stats
from model.compress.kron_recipe import KronAct, KronFisher, KronVL
from model.compress.kron_weighted import input_metric, solver_of

UP, DOWN = "h.0.mlp.c_fc", "h.1.mlp.c_proj"
LOOKED_AT = ("act", "act-plain", "act-closed", "act-perm", "act-perm-square")


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


@pytest.fixture(scope="module")
def results(teacher, stats):
    """What these recipes make of the teacher."""
    return {name: squeeze(RECIPES[name], teacher, stats) for name in LOOKED_AT}


def with_sums(stats, **sums):
    """The same statistics with other sums under `field/module`, for every module."""
    changed = {
        key: sums.get(key.partition("/")[0], lambda value: value)(value) for key, value in stats.sums.items()
    }
    return Stats(tokens=stats.tokens, sequences=stats.sequences, sums=changed)


# --- kron_fisher --------------------------------------------------------------------------------------------


def test_separable_weights_have_their_closed_form(teacher, stats, oracle):
    generator = np.random.default_rng(0)
    shapes = {(16, 64): (8, 32, 2, 2), (64, 16): (32, 8, 2, 2)}
    sides = {
        size: (generator.uniform(0.1, 2, s[:2]), generator.uniform(0.1, 2, s[2:]))
        for size, s in shapes.items()
    }
    fisher = with_sums(
        stats,
        full_fisher=lambda f: (
            torch.from_numpy(np.kron(*sides[tuple(f.shape)])) if tuple(f.shape) in sides else f
        ),
    )
    for solver in ("separable", "als"):
        result = squeeze(
            KronFisher(shape=(8, 32), solver=solver, terms=2, rtol=1e-12, max_iter=400), teacher, fisher
        )
        for row in result.report:
            weight = matrix(teacher, row.name).numpy()
            p, q = sides[weight.shape]
            shape = oracle.KronShape(*shapes[weight.shape])
            sigma = oracle.separable_kron(weight, p, q, shape, 2)[2]
            assert row.achieved_error * stats.sequences == pytest.approx(
                float((sigma[2:] ** 2).sum()), rel=1e-5
            )


@pytest.mark.parametrize("solver", ["als", "em", "separable"])
def test_equal_weights_and_their_scale_mean_van_loan(solver, teacher, stats):
    flat = with_sums(stats, full_fisher=lambda f: torch.full_like(f, 3.7))
    weighted = squeeze(KronFisher(shape=(8, 32), solver=solver), teacher, flat)
    plain = squeeze(KronVL(shape=(8, 32)), teacher)
    for one, other in zip(weighted.report, plain.report, strict=True):
        assert one.energy_kept == pytest.approx(other.energy_kept, rel=1e-9)


def test_a_weighted_fit_ends_at_or_below_its_starts_and_keeps_unweighted_rows(teacher, stats, oracle):
    def half(fisher):
        fisher = fisher.clone()
        fisher[::3] = 0
        return fisher

    holes = with_sums(stats, full_fisher=half)
    for source in (stats, holes):
        result = squeeze(KronFisher(shape=(8, 32), terms=2), teacher, source)
        plain = squeeze(KronVL(shape=(8, 32), terms=2), teacher)
        for row in result.report:
            fisher = source.mean(f"full_fisher/{row.name}").numpy()
            weight = matrix(teacher, row.name).numpy()
            kept = matrix(result.model, row.name).numpy()
            assert np.isfinite(kept).all()
            assert row.metric == "Fisher"
            assert row.achieved_error == pytest.approx(oracle.weighted_loss(weight, kept, fisher))
            vl = oracle.weighted_loss(weight, matrix(plain.model, row.name).numpy(), fisher)
            assert row.achieved_error <= vl * (1 + 1e-12)
            assert row.achieved_error <= row.details["loss_at_start"]


# --- kron_act -----------------------------------------------------------------------------------------------


def test_white_inputs_mean_van_loan(teacher, stats):
    white = with_sums(stats, gram=lambda g: torch.eye(len(g)).double() * stats.tokens, mean=torch.zeros_like)
    for terms in (1, 2):
        weighted = squeeze(KronAct(shape=(8, 32), terms=terms), teacher, white)
        plain = squeeze(KronVL(shape=(8, 32), terms=terms), teacher)
        for one, other in zip(weighted.report, plain.report, strict=True):
            assert one.achieved_error == pytest.approx(other.achieved_error, rel=1e-6)


@pytest.mark.parametrize("terms", [1, 2])
def test_one_row_factors_are_solved_at_once_for_any_metric(terms, teacher, stats):
    result = squeeze(KronAct(shape=(16, 16), terms=terms), teacher, stats)
    row, weight = row_of(result, UP), matrix(teacher, UP)
    metric = centred(stats.mean(f"gram/{UP}"), stats.mean(f"mean/{UP}"))
    values, vectors = torch.linalg.eigh(metric)
    root = vectors * values.clamp_min(0).sqrt()
    sigma = torch.linalg.svdvals(rearrange(root.T @ weight, KronShape(16, 16, 1, 4)))
    assert row.details["stopped"] == "closed_form"
    assert row.achieved_error == pytest.approx(float(sigma[terms:].square().sum()), rel=1e-8)


def test_alternating_ends_where_no_half_step_helps(teacher, stats, oracle):
    result = squeeze(KronAct(shape=(8, 32), terms=2, rtol=1e-13, max_iter=3000), teacher, stats)
    for name in (UP, DOWN):
        weight = matrix(teacher, name).numpy()
        metric = centred(stats.mean(f"gram/{name}"), stats.mean(f"mean/{name}")).numpy()
        layer = result.model.site(name)
        a, b = layer.left.detach().numpy(), layer.right.detach().numpy()
        loss = oracle.activation_loss(weight, oracle.kron_sum(a, b), metric)
        assert row_of(result, name).achieved_error == pytest.approx(loss, rel=1e-9)
        for better in (
            oracle.kron_sum(oracle.awk_a_step(weight, metric, a, b), b),
            oracle.kron_sum(a, oracle.awk_b_step(weight, metric, a, b)),
        ):
            assert oracle.activation_loss(weight, better, metric) >= loss * (1 - 1e-6)


@pytest.mark.parametrize("name", ["act", "act-plain", "act-closed", "act-perm", "act-perm-square"])
def test_the_reported_error_is_measured_on_the_calibration_tokens(name, teacher, stats, results):
    result, orders = results[name], [torch.arange(64)] * 2
    if "perm" in name:
        orders = hidden_orders(RECIPES[name], teacher, stats, result)
    for row in result.report:
        x, old, new = inputs(teacher, row.name), teacher.site(row.name), result.model.site(row.name)
        hidden = orders[int(row.name.split(".")[1])]
        with torch.no_grad():
            y = x @ old.weight + old.bias
            y, x = (y[:, hidden], x) if row.name.endswith("c_fc") else (y, x[:, hidden])
            error = float((new(x) - y).square().sum(dim=1).mean())
        assert row.achieved_error == pytest.approx(error, rel=1e-6)
        assert row.metric == "output error"
        assert 0 < row.details["top_share"] <= 1


def hidden_orders(recipe, teacher, stats, result):
    """Which unit of the teacher each hidden unit is, by block: what the search of the algebra finds."""
    found = []
    for i in range(2):
        up, down = (f"h.{i}.mlp.{role}" for role in ("c_fc", "c_proj"))
        fit = permuted_activation_kron_pair(
            matrix(teacher, up),
            matrix(teacher, down),
            input_metric(stats, up, recipe)[0],
            input_metric(stats, down, recipe)[0],
            result.model.site(up).shape,
            terms=recipe.terms,
            starts=recipe.orders,
            max_sweeps=recipe.max_sweeps,
            refit_iter=recipe.refit_iter,
            solver=solver_of(recipe),
        )
        found.append(fit.hidden)
    return found


def test_a_corrected_bias_never_costs_and_is_the_best_one(teacher, stats, results):
    for i, row in enumerate(results["act"].report):
        x, old, new = inputs(teacher, row.name), teacher.site(row.name), results["act"].model.site(row.name)
        with torch.no_grad():
            lost = x @ (old.weight - new.weight_matrix())
            best = old.bias + lost.mean(dim=0)
            without = float(lost.square().sum(dim=1).mean())
        torch.testing.assert_close(new.bias.detach(), best, atol=1e-9, rtol=0)
        assert row.achieved_error <= without
        second_moment = squeeze(replace(RECIPES["act"], bias_correction=False), teacher, stats).report[i]
        assert row.achieved_error <= second_moment.achieved_error * (1 + 1e-3)


def test_a_null_direction_of_the_inputs_does_no_harm(teacher, stats):
    metric = centred(stats.mean(f"gram/{UP}"), stats.mean(f"mean/{UP}"))
    gain = teacher.h[0].ln_2.weight.detach().double()
    assert float((metric @ (1 / gain)).abs().max()) < 1e-10
    for recipe in (KronAct(shape=(16, 16)), KronAct(shape=(4, 32), terms=3)):
        model = squeeze(recipe, teacher, stats).model
        assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# --- kron_act_perm ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["act-perm", "act-perm-square"])
def test_an_order_of_its_own_is_never_worse_than_the_stored_one(name, teacher, stats, results):
    recipe, result = RECIPES[name], results[name]
    stored = squeeze(
        KronAct(shape=recipe.shape, terms=recipe.terms, bias_correction=recipe.bias_correction),
        teacher,
        stats,
    )
    for i in range(2):
        names = [f"h.{i}.mlp.{role}" for role in ("c_fc", "c_proj")]
        ours, theirs = (
            sum(row_of(each, n).achieved_error / row_of(each, n).energy for n in names)
            for each in (result, stored)
        )
        assert ours <= theirs * (1 + 1e-6)
        assert row_of(result, names[0]).details["pair_loss"] == pytest.approx(ours, rel=1e-6)
    assert not list(result.model.buffers())
