"""Kronecker sums under an input metric: exact half-steps, closed forms, and the loss that tokens measure."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.algebra.activation import (
    ActivationProblem,
    activation_kron,
    nearest_kron_psd,
    separable_metric_kron,
)
from model.algebra.alternate import Solver, proximal_solve
from model.algebra.bias import corrected_bias
from model.algebra.kron import kron_sum, nearest_kron
from model.algebra.low_rank import low_rank
from model.algebra.psd import centred, metric_loss
from model.algebra.shapes import KronShape
from model.config import ModelError

small = settings(max_examples=12, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
SHAPE = KronShape(4, 6, 3, 2)
PATIENT = Solver(max_iter=3000, rtol=1e-13)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def tokens(seed: int, width: int, count: int = 200) -> torch.Tensor:
    spread = normal(seed, width, width) * torch.linspace(2, 0.05, width)
    return normal(seed + 1, count, width) @ spread + normal(seed + 2, width)


def gram_of(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x / len(x)


def spd(seed: int, size: int) -> torch.Tensor:
    half = normal(seed, size, size)
    return half @ half.T + 0.1 * torch.eye(size)


def never_rises(history: tuple[float, ...]) -> bool:
    return all(later <= earlier for earlier, later in pairwise(history))


@small
@given(seeds, st.integers(1, 3), st.sampled_from([SHAPE, KronShape(6, 4, 2, 3), KronShape(3, 2, 4, 6)]))
def test_history_never_rises_and_is_the_measured_output_error(seed, terms, shape):
    x, weight = tokens(seed, 12), normal(seed + 3, 12, 12)
    fit = activation_kron(weight, gram_of(x), shape, terms=terms, solver=Solver(max_iter=15))
    how = fit.convergence
    assert never_rises(how.history)
    measured = float((x @ (weight - fit.dense())).square().sum()) / len(x)
    assert fit.loss == pytest.approx(measured, rel=1e-8)
    assert fit.energy == pytest.approx(float((x @ weight).square().sum()) / len(x))
    assert {name for name, _ in how.by_start} == {"vl", "kron_gram"}
    plain = nearest_kron(weight, shape, terms=terms)
    assert fit.loss <= metric_loss(weight - plain.dense(), input_metric=gram_of(x)) * (1 + 1e-12)


@small
@given(seeds, st.integers(1, 2))
def test_half_steps_are_stationary_and_optimal(seed, terms):
    metric, weight = gram_of(tokens(seed, 12)), normal(seed + 3, 12, 12)
    problem = ActivationProblem.of(weight, metric, SHAPE)
    left, right = normal(seed + 4, terms, 4, 6), normal(seed + 5, terms, 3, 2)
    a = problem.best_left(left, right, ridge_rel=0.0)
    b = problem.best_right(a, right, ridge_rel=0.0)
    for free, dense in (
        (a.requires_grad_(), kron_sum(a, right)),
        (b.requires_grad_(), kron_sum(a.detach(), b)),
    ):
        rest = weight - dense
        (rest * (metric @ rest)).sum().backward()
        assert float(free.grad.abs().max()) < 1e-7 * problem.energy
    a, b = a.detach(), b.detach()
    before, middle, after = (problem.loss(pair) for pair in ((left, right), (a, right), (a, b)))
    assert after <= middle * (1 + 1e-12)
    assert middle <= before * (1 + 1e-12)
    (stepped_a, stepped_b), loss = problem.step((left, right), ridge_rel=0.0)
    assert_close(stepped_a, a)
    assert_close(stepped_b, b)
    assert loss == pytest.approx(after, rel=1e-8)


def test_a_half_step_agrees_with_a_numeric_gradient():
    metric, weight = gram_of(tokens(0, 12)), normal(3, 12, 12)
    problem = ActivationProblem.of(weight, metric, SHAPE)
    right = normal(5, 2, 3, 2)
    a = problem.best_left(normal(4, 2, 4, 6), right, ridge_rel=0.0)
    for index in np.ndindex(*a.shape):
        losses = []
        for step in (1e-4, -1e-4):
            moved = a.clone()
            moved[index] += step
            losses.append(problem.loss((moved, right)))
        assert abs(losses[0] - losses[1]) / 2e-4 < 1e-6 * problem.energy


def test_the_identity_metric_gives_van_loan():
    weight = normal(0, 12, 12)
    exact = nearest_kron(weight, SHAPE, terms=2)
    fit = activation_kron(weight, torch.eye(12), SHAPE, terms=2)
    assert fit.loss == pytest.approx(exact.error, rel=1e-9)
    warm = normal(1, 2, 4, 6), normal(2, 2, 3, 2)
    far = activation_kron(weight, torch.eye(12), SHAPE, terms=2, starts=(), warm=warm, solver=PATIENT)
    assert far.loss == pytest.approx(exact.error, rel=1e-7)


@small
@given(seeds, st.integers(1, 2), st.sampled_from([SHAPE, KronShape(3, 2, 4, 6)]))
def test_a_kronecker_metric_has_a_closed_form_that_nothing_beats(seed, terms, shape):
    weight, first, second = normal(seed, 12, 12), spd(seed + 1, shape.m1), spd(seed + 2, shape.m2)
    metric = torch.kron(first, second)
    fit = separable_metric_kron(weight, first, second, shape, terms=terms)
    assert fit.loss == pytest.approx(metric_loss(weight - fit.dense(), input_metric=metric), rel=1e-8)
    assert fit.energy == pytest.approx(metric_loss(weight, input_metric=metric), rel=1e-8)
    als = activation_kron(weight, metric, shape, terms=terms, starts=("vl",), solver=Solver(max_iter=20))
    assert als.loss >= fit.loss * (1 - 1e-9)
    both = activation_kron(weight, metric, shape, terms=terms, solver=Solver(max_iter=0))
    assert both.loss == pytest.approx(fit.loss, rel=1e-6)  # the start `kron_gram` is that closed form


def test_alternating_reaches_the_closed_form():
    weight, first, second = normal(0, 12, 12), spd(1, 4), spd(2, 3)
    exact = separable_metric_kron(weight, first, second, SHAPE, terms=2)
    als = activation_kron(weight, torch.kron(first, second), SHAPE, terms=2, starts=("vl",), solver=PATIENT)
    assert als.loss == pytest.approx(exact.loss, rel=1e-6)


@small
@given(seeds, st.sampled_from([KronShape(12, 6, 1, 2), KronShape(12, 2, 1, 6), KronShape(1, 6, 12, 2)]))
def test_a_factor_with_one_row_makes_every_metric_closed(seed, shape):
    weight, metric = normal(seed, 12, 12), gram_of(tokens(seed + 1, 12))
    fit = activation_kron(weight, metric, shape, terms=1)
    assert fit.convergence.stopped == "closed_form"
    assert fit.loss == pytest.approx(metric_loss(weight - fit.dense(), input_metric=metric), rel=1e-8)
    problem = ActivationProblem.of(weight, metric, shape)
    near = nearest_kron(weight, shape, terms=1)
    pair = near.left, near.right
    for _ in range(200):
        pair, loss = problem.step(pair, ridge_rel=1e-10)
    assert fit.loss <= loss * (1 + 1e-9)


@small
@given(seeds, st.integers(1, 5), st.sampled_from([(12, 7), (7, 12)]))
def test_column_and_row_shape_is_the_whitened_svd(seed, rank, size):
    weight, metric = normal(seed, *size), gram_of(tokens(seed + 1, size[0]))
    fit = activation_kron(weight, metric, KronShape(size[0], 1, 1, size[1]), terms=rank)
    assert fit.loss == pytest.approx(low_rank(weight, rank=rank, input_metric=metric).loss, rel=1e-7)


def test_a_singular_metric_gives_finite_factors():
    x = normal(0, 300, 12)
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True) * (normal(1, 12).abs() + 0.2)
    cov = centred(gram_of(x), x.mean(dim=0))
    dead = cov.clone()
    dead[[2, 3, 4]], dead[:, [2, 3, 4]] = 0, 0
    for metric in (cov, dead, torch.zeros(12, 12)):
        for shape in (SHAPE, KronShape(12, 3, 1, 4), KronShape(2, 3, 6, 4)):
            fit = activation_kron(normal(2, 12, 12), metric, shape, terms=2)
            assert torch.isfinite(fit.left).all()
            assert torch.isfinite(fit.right).all()
            assert never_rises(fit.convergence.history)
            direct = metric_loss(normal(2, 12, 12) - fit.dense(), input_metric=metric)
            assert fit.loss == pytest.approx(direct, rel=1e-7, abs=1e-12)


def test_full_terms_are_exact_and_more_terms_never_worse():
    weight, metric, warm = normal(0, 12, 12), gram_of(tokens(1, 12)), None
    losses = []
    for terms in range(1, SHAPE.max_terms + 1):
        fit = activation_kron(weight, metric, SHAPE, terms=terms, warm=warm)
        losses.append(fit.loss)
        warm = (
            torch.cat([fit.left, torch.zeros(1, 4, 6).double()]),
            torch.cat([fit.right, normal(terms, 1, 3, 2)]),
        )
    assert never_rises(tuple(losses[:-1]))
    assert losses[-1] <= 1e-18 * fit.energy
    assert_close(fit.dense(), weight, rtol=1e-6, atol=1e-6)


def test_bias_correction_makes_the_measured_error_the_centred_loss():
    x, weight, bias = tokens(0, 12), normal(3, 12, 12), normal(4, 12)
    gram, mean = gram_of(x), x.mean(dim=0)
    fit = activation_kron(weight, centred(gram, mean), SHAPE, terms=1)
    new = corrected_bias(bias, mean=mean, difference=weight - fit.dense())
    error = float((x @ fit.dense() + new - x @ weight - bias).square().sum()) / len(x)
    assert error == pytest.approx(fit.loss, rel=1e-8)
    plain = activation_kron(weight, gram, SHAPE, terms=1)
    assert error < float((x @ (plain.dense() - weight)).square().sum()) / len(x)


def test_an_output_metric_is_absorbed_exactly():
    weight, metric, first, second = normal(0, 12, 12), gram_of(tokens(1, 12)), spd(2, 6), spd(3, 2)
    out = torch.kron(first, second)
    solver = Solver(max_iter=200, rtol=1e-9)
    fit = activation_kron(weight, metric, SHAPE, terms=2, output_metric=(first, second), solver=solver)
    direct = metric_loss(weight - fit.dense(), input_metric=metric, output_metric=out)
    assert fit.loss == pytest.approx(direct, rel=1e-8)
    plain = activation_kron(weight, metric, SHAPE, terms=2, solver=solver)
    assert direct < metric_loss(weight - plain.dense(), input_metric=metric, output_metric=out)
    assert plain.loss < metric_loss(weight - fit.dense(), input_metric=metric)
    again = activation_kron(
        weight,
        metric,
        SHAPE,
        terms=2,
        output_metric=(first, second),
        starts=(),
        warm=(fit.left, fit.right),
        solver=Solver(max_iter=0),
    )
    assert again.loss == pytest.approx(fit.loss, rel=1e-8)


@small
@given(
    seeds,
    st.integers(1, 2),
    st.sampled_from(
        [KronShape(12, 6, 1, 2), KronShape(1, 6, 12, 2), KronShape(4, 1, 3, 12), KronShape(4, 12, 3, 1)]
    ),
)
def test_any_output_metric_is_solved_where_a_side_is_one(seed, terms, shape):
    weight, metric, out = normal(seed, 12, 12), gram_of(tokens(seed + 1, 12)), spd(seed + 2, 12)
    solver = Solver(max_iter=400, rtol=1e-12)
    fit = activation_kron(weight, metric, shape, terms=terms, output_metric=out, solver=solver)
    assert never_rises(fit.convergence.history)
    direct = metric_loss(weight - fit.dense(), input_metric=metric, output_metric=out)
    assert fit.loss == pytest.approx(direct, rel=1e-6, abs=1e-10 * fit.energy)
    for other in (
        activation_kron(weight, metric, shape, terms=terms).dense(),
        nearest_kron(weight, shape, terms=terms).dense(),
    ):
        assert metric_loss(weight - other, input_metric=metric, output_metric=out) >= direct * (1 - 1e-6)
    left, right = fit.left.clone().requires_grad_(), fit.right.clone().requires_grad_()
    rest = weight - kron_sum(left, right)
    (rest * (metric @ rest @ out)).sum().backward()
    scale = fit.energy / float(fit.left.norm())
    assert float(left.grad.abs().max()) < 1e-4 * scale
    assert float(right.grad.abs().max()) < 1e-4 * scale


def test_an_output_metric_that_cannot_be_absorbed_is_refused():
    with pytest.raises(ModelError, match="needs a factor with a side of 1"):
        activation_kron(normal(0, 12, 12), torch.eye(12), SHAPE, terms=1, output_metric=torch.eye(12))


def test_the_nearest_kronecker_metric_is_a_metric():
    metric = gram_of(tokens(0, 12))
    first, second = nearest_kron_psd(metric, 4, 3)
    assert float(torch.linalg.eigvalsh(first)[0]) > 0
    assert float(torch.linalg.eigvalsh(second)[0]) > 0
    exact = nearest_kron(metric, KronShape(4, 4, 3, 3), terms=1)
    assert float((metric - torch.kron(first, second)).square().sum()) == pytest.approx(exact.error, rel=1e-8)


@small
@given(seeds, st.integers(1, 6), st.integers(1, 6))
def test_the_proximal_step_never_raises_the_unpenalised_loss(seed, size, rank):
    half, old = normal(seed, size, rank), normal(seed + 1, size, 2)
    system, rhs = half @ half.T, half @ normal(seed + 2, rank, 2)  # singular when rank < size

    def loss(z: torch.Tensor) -> float:
        return float((z * (system @ z - 2 * rhs)).sum())

    for ridge in (1e-8, 1e-2, 1.0):
        new = proximal_solve(system, rhs, old, ridge_rel=ridge)
        assert loss(new) <= loss(old) + 1e-9 * abs(loss(old))
    stationary = torch.linalg.pinv(system, hermitian=True) @ rhs
    assert_close(proximal_solve(system, rhs, stationary, ridge_rel=1e-2), stationary, rtol=1e-5, atol=1e-6)


def test_bad_metrics_are_refused():
    weight = normal(0, 12, 12)
    with pytest.raises(ModelError, match="need a finite 12x12 matrix"):
        activation_kron(weight, torch.eye(11), SHAPE, terms=1)
    with pytest.raises(ModelError, match="need a finite 12x12 matrix"):
        activation_kron(weight, torch.full((12, 12), torch.nan), SHAPE, terms=1)
    with pytest.raises(ModelError, match="at least one start"):
        activation_kron(weight, torch.eye(12), SHAPE, terms=1, starts=())
    x = tokens(1, 12)
    stranger = centred(gram_of(x), 3 * x.mean(dim=0))  # the mean of other tokens
    for shape in (SHAPE, KronShape(12, 6, 1, 2)):
        with pytest.raises(ModelError, match="not positive semi-definite; is the mean from the same tokens"):
            activation_kron(weight, stranger, shape, terms=1, starts=("vl",))
