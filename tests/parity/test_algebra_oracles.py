"""Our algebra against slow NumPy references, where they are at hand: same products, same losses.

Factors are unique only up to gauge, sign and rotation, so products and losses are compared, never factors.
The references are looked for in KRONY_SHARED, or in `shared` beside the project, and are no part of it.
"""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle_lab import close, few, seeds, tensor

from model.algebra import (
    activation,
    bias,
    gauge,
    kron,
    low_rank,
    permute,
    psd,
    strided,
    weighted,
)
from model.algebra.alternate import Solver
from model.algebra.shapes import KronShape, legal_shapes

SHAPE = KronShape(6, 9, 4, 4)

small_shapes = st.builds(KronShape, *[st.integers(1, 5)] * 4)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_counts_of_every_shape(oracle):
    for shape in legal_shapes(768, 3072):
        theirs = oracle.KronShape(shape.m1, shape.n1, shape.m2, shape.n2)
        for terms in (1, 3):
            assert shape.params(terms, scales=True) == oracle.kron_params(theirs, terms, True)
            assert shape.rank_bound(terms) == oracle.kron_rank_bound(theirs, terms)
            assert shape.macs(terms) == oracle.kron_macs(theirs, terms)
        assert shape.max_terms == theirs.max_terms
        assert tuple(theirs.transposed()) == (shape.n1, shape.m1, shape.n2, shape.m2)


def test_products_gauge_signs_and_scales(oracle, rng):
    left, right = rng.normal(size=(3, 6, 9)), rng.normal(size=(3, 4, 4))
    weight, x = rng.normal(size=(24, 36)), rng.normal(size=(5, 24))
    a, b = tensor(left), tensor(right)
    close(kron.kron_sum(a, b), oracle.kron_sum(left, right))
    close(kron.rearrange(tensor(weight), SHAPE), oracle.rearrange(weight, oracle.KronShape(6, 9, 4, 4)))
    for order in ("b_first", "a_first"):
        close(kron.kron_apply(tensor(x), a, b, order=order), oracle.kron_apply(x, left, right, order))
    for name in ("rms", "sqrt"):
        for ours, theirs in zip(
            gauge.apply_gauge(a, b, gauge=name), oracle.apply_gauge(left, right, name), strict=True
        ):
            close(ours, theirs)
    for ours, theirs in zip(gauge.canonical_signs(a, b), oracle.canonical_signs(left, right), strict=True):
        close(ours, theirs)
    close(gauge.best_scales(tensor(weight), a, b), oracle.ls_scales(weight, left, right))


@few
@given(small_shapes, seeds, st.data())
def test_sums_of_any_shape_and_number_of_terms(oracle, shape, seed, data):
    """Nearest sum, tail, rank bound, scales and gauges, for whatever sides and terms there are."""
    terms = data.draw(st.integers(1, shape.max_terms))
    weight, theirs = (
        np.random.default_rng(seed).normal(size=(shape.rows, shape.cols)),
        oracle.KronShape(*astuple(shape)),
    )
    for name in ("rms", "sqrt"):
        left, right, sigma = oracle.van_loan(weight, theirs, terms, name)
        fit = kron.nearest_kron(tensor(weight), shape, terms=terms, gauge=name)
        tail = (sigma[terms:] ** 2).sum()
        assert float((tensor(weight) - fit.dense()).square().sum()) == pytest.approx(
            tail, rel=1e-8, abs=1e-18
        )
        if terms == len(sigma) or sigma[terms - 1] > 1.01 * sigma[terms]:  # else there are several optima
            close(fit.dense(), oracle.kron_sum(left, right), rtol=1e-6)
    rank = int(torch.linalg.matrix_rank(fit.dense()))
    assert rank <= oracle.kron_rank_bound(theirs, terms) == shape.rank_bound(terms)
    noise = np.random.default_rng(seed + 1)
    a, b = noise.normal(size=(terms, *theirs[:2])), noise.normal(size=(terms, *theirs[2:]))
    ours, scales = gauge.best_scales(tensor(weight), tensor(a), tensor(b)), oracle.ls_scales(weight, a, b)
    scaled = kron.kron_sum(ours[:, None, None] * tensor(a), tensor(b))
    close(scaled, oracle.kron_sum(scales[:, None, None] * a, b), rtol=1e-5)


@few
@given(small_shapes, seeds, st.data())
def test_the_pruning_start_of_any_shape_and_offset(oracle, shape, seed, data):
    offset = data.draw(st.integers(0, shape.m2 - 1)), data.draw(st.integers(0, shape.n2 - 1))
    weight = np.random.default_rng(seed).normal(size=(shape.rows, shape.cols))
    left, right = strided.strided_kron(tensor(weight), shape, offset=offset)
    theirs = oracle.kron_sum(*oracle.prune_init(weight, oracle.KronShape(*astuple(shape)), *offset))
    assert np.array_equal(kron.kron_sum(left, right).numpy(), theirs)
    dropped = ((weight - theirs) ** 2).sum()
    kept = float(strided.strided_energy(tensor(weight), shape)[offset])
    assert (weight**2).sum() - kept == pytest.approx(dropped, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("terms", [1, 3, 16])
def test_van_loan(oracle, rng, terms):
    weight = rng.normal(size=(24, 36))
    for name in ("rms", "sqrt"):
        left, right, sigma = oracle.van_loan(weight, oracle.KronShape(6, 9, 4, 4), terms, name)
        fit = kron.nearest_kron(tensor(weight), SHAPE, terms=terms, gauge=name)
        close(fit.dense(), oracle.kron_sum(left, right))
        close(fit.error, (sigma[terms:] ** 2).sum())
        close(fit.left.flatten(1).norm(dim=1), np.linalg.norm(left.reshape(terms, -1), axis=1))


def test_strided(oracle, rng):
    weight = rng.normal(size=(24, 36))
    left, right = oracle.prune_init(weight, oracle.KronShape(6, 9, 4, 4), 1, 2)
    ours = strided.strided_kron(tensor(weight), SHAPE, offset=(1, 2))
    close(ours[0], left)
    close(ours[1], right)


def test_permuted_pair(oracle, rng):
    shape, theirs = KronShape(3, 4, 2, 3), oracle.KronShape(3, 4, 2, 3)
    for _ in range(3):
        up, down = rng.normal(size=(6, 12)), 2 * rng.normal(size=(12, 6))
        _, history = oracle.permuted_kron_pair(up, down, theirs, 1, 5)
        found = permute.permuted_kron_pair(tensor(up), tensor(down), shape, terms=1)
        assert found.loss <= history[0] * (1 + 1e-12)  # entry 0 is plain Van Loan
        plain = kron.nearest_kron(tensor(up), shape, terms=1).error
        plain += kron.nearest_kron(tensor(down), shape.transposed(), terms=1).error
        close(plain, history[0])
        cost = rng.normal(size=(7, 7))
        assert permute.minimal_order(tensor(cost)).tolist() == oracle.assignment(cost).tolist()
        norms = rng.normal(size=12)
        split = permute.norm_split(tensor(norms), outer=4, inner=3)
        assert split.tolist() == oracle.norm_split_order(norms, 4, 3).tolist()


def test_weighted(oracle, rng):
    weight, weights = rng.normal(size=(24, 36)), rng.uniform(size=(24, 36)) ** 4
    weights[3] = 0
    p, q = rng.uniform(0.1, 3, (6, 9)), rng.uniform(0.1, 3, (4, 4))
    left, right, sigma = oracle.separable_kron(weight, p, q, oracle.KronShape(6, 9, 4, 4), 2)
    fit = weighted.separable_kron(tensor(weight), tensor(p), tensor(q), terms=2)
    close(fit.dense(), oracle.kron_sum(left, right))
    close(fit.loss, (sigma[2:] ** 2).sum())
    start = oracle.van_loan(weight, oracle.KronShape(6, 9, 4, 4), 2)[:2]
    left, right, history = oracle.weighted_kron_als(weight, weights, *start, sweeps=12)
    als = weighted.weighted_kron(
        tensor(weight), tensor(weights), SHAPE, terms=2, starts=("vl",), solver=Solver(max_iter=12, rtol=0)
    )
    close(np.array(als.convergence.history), history, rtol=1e-6)
    close(als.dense(), oracle.kron_sum(left, right), rtol=1e-5)
    _, em = oracle.weighted_kron_em(weight, weights, oracle.KronShape(6, 9, 4, 4), 2, 80)
    ours = weighted.weighted_kron(
        tensor(weight), tensor(weights), SHAPE, terms=2, method="em", solver=Solver(max_iter=400, rtol=0)
    )
    assert ours.loss <= em[-1] * 1.01
    p, q = oracle.nearest_kron_nonneg(weights, oracle.KronShape(6, 9, 4, 4))
    close(torch.kron(*weighted.nearest_separable(tensor(weights), SHAPE)), np.kron(p, q), rtol=1e-4)


def test_activation(oracle, rng):
    shape, theirs = KronShape(4, 6, 3, 2), oracle.KronShape(4, 6, 3, 2)
    weight, x = rng.normal(size=(12, 12)), rng.normal(size=(200, 12)) @ rng.normal(size=(12, 12))
    gram = x.T @ x / 200
    start = oracle.van_loan(weight, theirs, 2)[:2]
    problem = activation.ActivationProblem.of(tensor(weight), tensor(gram), shape)
    a, b = (tensor(side) for side in start)
    close(problem.best_left(a, b, ridge_rel=1e-8), oracle.awk_a_step(weight, gram, *start), rtol=1e-6)
    close(problem.best_right(a, b, ridge_rel=1e-8), oracle.awk_b_step(weight, gram, *start), rtol=1e-6)
    left, right, history = oracle.awk_als(weight, gram, *start, sweeps=12)
    fit = activation.activation_kron(
        tensor(weight), tensor(gram), shape, terms=2, starts=("vl",), solver=Solver(max_iter=12, rtol=0)
    )
    close(np.array(fit.convergence.history), history, rtol=1e-6)
    close(fit.dense(), oracle.kron_sum(left, right), rtol=1e-5)
    first, second = oracle.nearest_kron_psd(gram, 4, 3)
    for ours, reference in zip(activation.nearest_kron_psd(tensor(gram), 4, 3), (first, second), strict=True):
        close(ours / ours.norm(), reference / np.linalg.norm(reference), rtol=1e-6)
    left, right, sigma = oracle.awk_closed_form(weight, first, second, theirs, 2)
    closed = activation.separable_metric_kron(tensor(weight), tensor(first), tensor(second), shape, terms=2)
    close(closed.dense(), oracle.kron_sum(left, right), rtol=1e-6)
    close(closed.loss, (sigma[2:] ** 2).sum())


def test_activation_with_an_output_metric(oracle, rng):
    shape = KronShape(4, 6, 3, 2)
    weight, x = rng.normal(size=(12, 12)), rng.normal(size=(200, 12))
    g1, g2 = (half @ half.T for half in (rng.normal(size=(6, 6)), rng.normal(size=(2, 2))))
    gram = x.T @ x / 200
    start = tuple(rng.normal(size=size) for size in ((1, 4, 6), (1, 3, 2)))
    left, right, history = oracle.awk_als_output_metric(weight, gram, g1, g2, *start, sweeps=8)
    fit = activation.activation_kron(
        tensor(weight),
        tensor(gram),
        shape,
        terms=1,
        output_metric=(tensor(g1), tensor(g2)),
        starts=(),
        warm=(tensor(start[0]), tensor(start[1])),
        solver=Solver(max_iter=8, rtol=0),
    )
    close(np.array(fit.convergence.history), history, rtol=1e-6)
    close(fit.dense(), oracle.kron_sum(left, right), rtol=1e-4)


def test_metrics_and_low_rank(oracle, rng):
    weight, x, delta = rng.normal(size=(14, 10)), rng.normal(size=(80, 14)), rng.normal(size=(80, 10))
    gram, out = x.T @ x / 80, delta.T @ delta / 80
    mean = x.mean(0)
    for rank in (1, 4, 10):
        first, second, sigma = oracle.metric_svd(weight, rank, gram, out)
        fit = low_rank.low_rank(
            tensor(weight), rank=rank, input_metric=tensor(gram), output_metric=tensor(out)
        )
        close(fit.dense(), first @ second, rtol=1e-6)
        close(fit.sigma, sigma, rtol=1e-6)
        for metric in (gram, oracle.asvd_metric(np.abs(x).mean(0))):
            first, second = oracle.projection_svd(weight, rank, metric)
            close(
                low_rank.low_rank(tensor(weight), rank=rank, input_metric=tensor(metric)).dense(),
                first @ second,
                rtol=1e-6,
            )
        first, second, _ = oracle.fwsvd(weight, np.arange(1, 15), rank)
        ours = low_rank.low_rank(tensor(weight), rank=rank, input_metric=torch.arange(1, 15).double())
        close(ours.dense(), first @ second, rtol=1e-6)
    close(psd.psd_roots(tensor(gram)).root, oracle.psd_sqrt(gram))
    close(psd.psd_roots(tensor(gram)).inverse, oracle.psd_pinv_sqrt(gram), rtol=1e-6)
    close(psd.shrink(tensor(gram), 0.3), oracle.shrink(gram, 0.3))
    close(psd.centred(tensor(gram), tensor(mean)), oracle.centred(gram, mean))
    close(psd.homogeneous(tensor(gram), tensor(mean)), oracle.homogeneous(gram, mean))
    other, old = rng.normal(size=(14, 10)), rng.normal(size=10)
    close(
        bias.corrected_bias(tensor(old), mean=tensor(mean), difference=tensor(weight - other)),
        oracle.corrected_bias(weight, other, old, mean),
    )
    close(
        psd.metric_loss(tensor(weight - other), input_metric=tensor(gram), output_metric=tensor(out)),
        oracle.two_sided_loss(weight, other, gram, out),
    )
    second = rng.normal(size=(10, 6))
    for ours, theirs in zip(
        low_rank.balance(tensor(weight), tensor(second)), oracle.balance_rank_one(weight, second), strict=True
    ):
        close(ours.abs(), np.abs(theirs))


@few
@given(st.integers(2, 9), st.integers(1, 9), seeds, st.data())
def test_the_optimum_in_a_metric_of_any_size_and_rank(oracle, rows, cols, seed, data):
    """By eigenvalue root, by Cholesky root and by projection it is one matrix; its loss is the tail."""
    generator = np.random.default_rng(seed)
    weight, x = generator.normal(size=(rows, cols)), generator.normal(size=(40, rows))
    gram = x.T @ x / 40
    rank = data.draw(st.integers(1, min(rows, cols)))
    first, second, sigma = oracle.metric_svd(weight, rank, gram)
    fit = low_rank.low_rank(tensor(weight), rank=rank, input_metric=tensor(gram))
    tail = (sigma[rank:] ** 2).sum()
    assert fit.loss == pytest.approx(tail, rel=1e-7, abs=1e-14 * fit.energy)
    assert oracle.two_sided_loss(weight, fit.dense().numpy(), gram, np.eye(cols)) == pytest.approx(
        tail, rel=1e-6, abs=1e-12 * fit.energy
    )
    if rank == len(sigma) or sigma[rank - 1] > 1.01 * sigma[rank]:
        for left, right in (
            (first, second),
            oracle.cholesky_svd(weight, rank, gram),
            oracle.projection_svd(weight, rank, gram),
        ):
            close(fit.dense(), left @ right, rtol=1e-5)


@few
@given(st.integers(3, 9), st.integers(1, 9), seeds, st.data())
def test_the_null_direction_of_a_layer_norm_and_a_singular_output_metric(oracle, rows, cols, seed, data):
    generator = np.random.default_rng(seed)
    x = generator.normal(size=(60, rows))
    x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) * generator.uniform(0.3, 2, rows)
    cov = oracle.centred(x.T @ x / 60, x.mean(0))
    half = generator.normal(size=(cols, max(1, cols - 1)))
    weight, rank = generator.normal(size=(rows, cols)), data.draw(st.integers(1, min(rows, cols)))
    for out in (None, half @ half.T):
        fit = low_rank.low_rank(
            tensor(weight),
            rank=rank,
            input_metric=tensor(cov),
            output_metric=None if out is None else tensor(out),
        )
        sigma = oracle.metric_svd(weight, rank, cov, out)[2]
        assert bool(torch.isfinite(fit.first).all() & torch.isfinite(fit.second).all())
        assert fit.loss == pytest.approx((sigma[rank:] ** 2).sum(), rel=1e-6, abs=1e-10 * fit.energy)
        theirs = oracle.two_sided_loss(weight, fit.dense().numpy(), cov, np.eye(cols) if out is None else out)
        assert theirs == pytest.approx(fit.loss, rel=1e-6, abs=1e-9 * fit.energy)
        if out is None:
            assert float(fit.dense().norm()) <= np.linalg.norm(weight) * (1 + 1e-9)
            left, right = oracle.projection_svd(weight, rank, cov)
            values = oracle.psd_sqrt(cov) @ (fit.dense().numpy() - left @ right)
            if sigma[rank - 1] > 1.01 * np.append(sigma, 0)[rank]:  # what the tokens can see of them is one
                np.testing.assert_allclose(values, 0, atol=1e-6 * max(1.0, float(sigma[0])))
