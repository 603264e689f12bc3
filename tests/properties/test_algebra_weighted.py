"""Kronecker sums under elementwise weights: closed forms are tails, alternating never rises."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.algebra.alternate import Solver
from model.algebra.kron import kron_sum, nearest_kron
from model.algebra.shapes import KronShape
from model.algebra.weighted import elementwise_loss, nearest_separable, separable_kron, weighted_kron
from model.config import ModelError

small = settings(max_examples=15, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
SHAPE = KronShape(6, 9, 4, 4)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def peaked(seed: int) -> torch.Tensor:
    """Very uneven weights with a row and a column of zeros."""
    weights = torch.from_numpy(np.random.default_rng(seed).uniform(size=(24, 36))) ** 4
    weights[3], weights[:, 7] = 0, 0
    return weights


def never_rises(history: tuple[float, ...]) -> bool:
    return all(later <= earlier for earlier, later in pairwise(history))


@small
@given(seeds, st.integers(1, 3), st.sampled_from([SHAPE, KronShape(2, 3, 12, 12), KronShape(24, 9, 1, 4)]))
def test_separable_weights_have_a_closed_form(seed, terms, shape):
    weight = normal(seed, 24, 36)
    p, q = (
        normal(seed + 1, shape.m1, shape.n1).square() + 0.1,
        normal(seed + 2, shape.m2, shape.n2).square() + 0.1,
    )
    weights = torch.kron(p, q)
    fit = separable_kron(weight, p, q, terms=terms)
    direct = elementwise_loss(weight - fit.dense(), weights)
    assert fit.loss == pytest.approx(direct, rel=1e-8)
    assert fit.energy == pytest.approx(elementwise_loss(weight, weights))
    plain = nearest_kron(weight, shape, terms=terms)
    assert direct <= elementwise_loss(weight - plain.dense(), weights) * (1 + 1e-12)
    als = weighted_kron(weight, weights, shape, terms=terms, solver=Solver(max_iter=5, rtol=0))
    assert als.loss >= direct * (1 - 1e-9)  # nothing beats it


def test_alternating_reaches_the_closed_form():
    weight, p, q = normal(0, 24, 36), normal(1, 6, 9).square() + 0.1, normal(2, 4, 4).square() + 0.1
    exact = separable_kron(weight, p, q, terms=2)
    als = weighted_kron(
        weight, torch.kron(p, q), SHAPE, terms=2, starts=("vl",), solver=Solver(max_iter=600, rtol=1e-14)
    )
    assert als.loss == pytest.approx(exact.loss, rel=1e-6)


@small
@given(seeds, st.integers(1, 3), st.sampled_from(["als", "em"]))
def test_history_never_rises_and_is_the_weighted_loss(seed, terms, method):
    weight, weights = normal(seed, 24, 36), peaked(seed + 1)
    fit = weighted_kron(weight, weights, SHAPE, terms=terms, method=method, solver=Solver(max_iter=15))
    how = fit.convergence
    assert never_rises(how.history)
    assert fit.loss == how.history[-1]
    assert fit.loss == pytest.approx(elementwise_loss(weight - fit.dense(), weights), rel=1e-9)
    assert torch.isfinite(fit.left).all()
    assert torch.isfinite(fit.right).all()
    assert {name for name, _ in how.by_start} == {"vl", "separable"}
    assert fit.loss == min(loss for _, loss in how.by_start)
    assert how.stopped in ("converged", "max_iter")
    assert fit.loss <= elementwise_loss(weight - nearest_kron(weight, SHAPE, terms=terms).dense(), weights)


@pytest.mark.parametrize("method", ["als", "em", "separable"])
def test_constant_weights_give_van_loan(method: str):
    weight = normal(3, 24, 36)
    exact = nearest_kron(weight, SHAPE, terms=2)
    fit = weighted_kron(weight, torch.full((24, 36), 7.0), SHAPE, terms=2, method=method)
    assert fit.loss == pytest.approx(7 * exact.error, rel=1e-9)
    assert_close(fit.dense(), exact.dense(), rtol=1e-6, atol=1e-6)


def test_constant_weights_reach_van_loan_from_a_random_start():
    weight = normal(4, 24, 36)
    warm = normal(5, 2, 6, 9), normal(6, 2, 4, 4)
    fit = weighted_kron(
        weight,
        torch.ones(24, 36),
        SHAPE,
        terms=2,
        starts=(),
        warm=warm,
        solver=Solver(max_iter=2000, rtol=1e-13),
    )
    assert fit.convergence.start == "warm"
    assert fit.loss == pytest.approx(nearest_kron(weight, SHAPE, terms=2).error, rel=1e-7)


def test_the_end_is_stationary():
    weight, weights = normal(7, 24, 36), peaked(8)
    fit = weighted_kron(weight, weights, SHAPE, terms=2, solver=Solver(max_iter=3000, rtol=1e-15))
    left, right = (factor.clone().requires_grad_() for factor in (fit.left, fit.right))
    (weights * (weight - kron_sum(left, right)).square()).sum().backward()
    scale = fit.energy / float(fit.left.norm())
    assert float(left.grad.abs().max()) < 1e-5 * scale
    assert float(right.grad.abs().max()) < 1e-5 * scale


def test_the_scale_of_the_weights_changes_nothing():
    weight, weights = normal(9, 24, 36), peaked(10)
    one = weighted_kron(weight, weights, SHAPE, terms=2)
    other = weighted_kron(weight, 1e-9 * weights, SHAPE, terms=2)
    assert_close(other.dense(), one.dense(), rtol=1e-6, atol=1e-8)
    assert other.loss == pytest.approx(1e-9 * one.loss)
    assert other.convergence.iterations == one.convergence.iterations


def test_rows_without_weight_keep_their_old_value():
    weight, weights = normal(11, 24, 36), torch.ones(24, 36)
    weights[:4] = 0  # the first row of every A
    warm = normal(12, 1, 6, 9), normal(13, 1, 4, 4)
    fit = weighted_kron(
        weight, weights, SHAPE, terms=1, starts=(), warm=warm, solver=Solver(max_iter=1), gauge="sqrt"
    )
    direction = fit.left[0, 0] / warm[0][0, 0]
    assert_close(direction, direction[:1].expand(9), rtol=1e-6, atol=1e-9)


def test_alternating_warm_started_from_fewer_terms_is_never_worse():
    weight, weights, warm = normal(14, 24, 36), peaked(15), None
    losses = []
    for terms in (1, 2, 3):
        fit = weighted_kron(weight, weights, SHAPE, terms=terms, warm=warm)
        losses.append(fit.loss)
        warm = (
            torch.cat([fit.left, torch.zeros(1, 6, 9).double()]),
            torch.cat([fit.right, normal(terms, 1, 4, 4)]),
        )
    assert never_rises(tuple(losses))


def test_full_terms_are_exact_under_weights():
    weight, weights = normal(16, 24, 36), peaked(17) + 0.01
    fit = weighted_kron(weight, weights, SHAPE, terms=16)
    assert fit.loss <= 1e-20 * fit.energy
    assert_close(fit.dense(), weight, rtol=1e-8, atol=1e-8)


def test_column_and_row_shape_is_weighted_low_rank():
    weight, weights = normal(18, 8, 6), peaked(19)[:8, 8:14] + 0.05
    fit = weighted_kron(
        weight, weights, KronShape(8, 1, 1, 6), terms=2, solver=Solver(max_iter=500, rtol=1e-12)
    )
    first, second = fit.left[:, :, 0].T, fit.right[:, 0, :]
    for i in range(8):  # every row is a weighted regression on the other factor
        system = second @ (weights[i][:, None] * second.T)
        assert_close(
            first[i], torch.linalg.solve(system, second @ (weights[i] * weight[i])), rtol=1e-3, atol=1e-4
        )


@small
@given(seeds)
def test_the_nearest_separable_weights_are_weights(seed):
    weights = peaked(seed)
    p, q = nearest_separable(weights, SHAPE)
    assert float(p.min()) > 0
    assert float(q.min()) > 0
    exact = nearest_kron(weights, SHAPE, terms=1)
    assert float((weights - torch.kron(p, q)).square().sum()) == pytest.approx(exact.error, rel=1e-4)


def test_the_surrogate_is_reported_as_it_is_and_never_beats_alternating():
    for seed in range(8):
        weight, weights = normal(seed, 24, 36), peaked(seed + 100)
        plain = elementwise_loss(weight - nearest_kron(weight, SHAPE, terms=2).dense(), weights)
        surrogate = weighted_kron(weight, weights, SHAPE, terms=2, method="separable")
        assert surrogate.convergence.stopped == "closed_form"
        assert surrogate.loss == pytest.approx(elementwise_loss(weight - surrogate.dense(), weights))
        assert weighted_kron(weight, weights, SHAPE, terms=2).loss < min(plain, surrogate.loss)


def test_bad_weights_are_refused():
    weight = normal(0, 24, 36)
    with pytest.raises(ModelError, match="not negative"):
        weighted_kron(weight, -torch.ones(24, 36), SHAPE, terms=1)
    with pytest.raises(ModelError, match="must have the shape"):
        weighted_kron(weight, torch.ones(36, 24), SHAPE, terms=1)
    with pytest.raises(ModelError, match="at least one start"):
        weighted_kron(weight, torch.ones(24, 36), SHAPE, terms=1, starts=())
    with pytest.raises(ModelError, match="must not be negative"):
        Solver(max_iter=-1)
    single = torch.zeros(24, 36)
    single[0, 0] = 1
    with pytest.raises(
        ModelError, match="half-step of size 3 is singular with ridge_rel=0; use 1e-8 or more"
    ):
        weighted_kron(weight, single, SHAPE, terms=3, solver=Solver(ridge_rel=0))
    assert weighted_kron(weight, single, SHAPE, terms=3).loss < 1e-12
    nothing = weighted_kron(weight, torch.zeros(24, 36), SHAPE, terms=1)
    assert nothing.loss == 0
    assert torch.isfinite(nothing.dense()).all()
