"""Kronecker sums on random problems: the error is the tail, full terms are exact, all products agree."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.algebra.gauge import apply_gauge, best_scales, canonical_signs, kron_norm, match_norm
from model.algebra.kron import (
    dominant_pair,
    kron_apply,
    kron_sum,
    leading_pairs,
    nearest_kron,
    rearrange,
    unrearrange,
)
from model.algebra.shapes import KronShape
from model.config import ModelError

small = settings(max_examples=40, deadline=None, derandomize=True)

sides = st.integers(1, 6)
shapes = st.builds(KronShape, sides, sides, sides, sides)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def weight_of(seed: int, shape: KronShape) -> torch.Tensor:
    return normal(seed, shape.rows, shape.cols)


def factors(seed: int, shape: KronShape, terms: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(seed, terms, shape.m1, shape.n1), normal(seed + 1, terms, shape.m2, shape.n2)


def reference_sum(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.kron(a, b) for a, b in zip(left, right, strict=True)]).sum(dim=0)


@small
@given(shapes, seeds)
def test_rearrangement_only_moves_entries(shape, seed):
    weight = weight_of(seed, shape)
    assert torch.equal(unrearrange(rearrange(weight, shape), shape), weight)
    a, b = factors(seed, shape, 1)
    assert_close(rearrange(torch.kron(a[0], b[0]), shape), torch.outer(a.flatten(), b.flatten()))


@small
@given(shapes, seeds, st.integers(1, 4))
def test_never_forming_w_equals_the_dense_product(shape, seed, terms):
    left, right = factors(seed, shape, terms)
    dense = reference_sum(left, right)
    x = normal(seed + 2, 2, 3, shape.rows)
    assert_close(kron_sum(left, right), dense)
    for order in ("b_first", "a_first"):
        assert_close(kron_apply(x, left, right, order=order), x @ dense)


def test_products_keep_the_dtype_and_can_be_differentiated():
    shape = KronShape(3, 4, 2, 2)
    left, right = (factor.float().requires_grad_() for factor in factors(0, shape, 2))
    for order in ("b_first", "a_first"):
        y = kron_apply(torch.ones(5, shape.rows), left, right, order=order)
        assert y.dtype == torch.float32
        y.square().sum().backward()
    assert left.grad is not None
    assert right.grad is not None
    assert float(right.grad.abs().min()) > 0


@small
@given(shapes, seeds, st.data())
def test_the_error_is_the_tail_of_the_singular_values(shape, seed, data):
    weight = weight_of(seed, shape)
    terms = data.draw(st.integers(1, shape.max_terms))
    fit = nearest_kron(weight, shape, terms=terms)
    sigma = torch.linalg.svdvals(rearrange(weight, shape))
    tail = float(sigma[terms:].square().sum())
    measured = float((weight - fit.dense()).square().sum())
    assert fit.error == pytest.approx(tail, rel=1e-8, abs=1e-24 * fit.energy)
    assert measured == pytest.approx(tail, rel=1e-8, abs=1e-20 * fit.energy)
    assert fit.energy_kept == pytest.approx(1 - tail / float(weight.square().sum()))
    assert_close(fit.sigma, sigma, rtol=1e-6, atol=1e-7)


@small
@given(shapes, seeds)
def test_full_terms_are_exact(shape, seed):
    weight = weight_of(seed, shape)
    fit = nearest_kron(weight, shape, terms=shape.max_terms)
    assert_close(fit.dense(), weight, rtol=1e-10, atol=1e-10)
    assert fit.error == 0


@small
@given(shapes, seeds)
def test_more_terms_are_never_worse_and_no_sum_is_better(shape, seed):
    weight = weight_of(seed, shape)
    errors = [nearest_kron(weight, shape, terms=k).error for k in range(1, shape.max_terms + 1)]
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(errors))
    best = nearest_kron(weight, shape, terms=1)
    nudge = factors(seed + 3, shape, 1)
    for size in (1e-3, 0.1, 1.0):
        other = kron_sum(best.left + size * nudge[0], best.right + size * nudge[1])
        assert float((weight - other).square().sum()) >= best.error * (1 - 1e-12)


@small
@given(shapes, seeds)
def test_the_transposed_weight_has_the_transposed_fit(shape, seed):
    weight = weight_of(seed, shape)
    fit = nearest_kron(weight, shape, terms=1)
    turned = nearest_kron(weight.T, shape.transposed(), terms=1)
    assert turned.error == pytest.approx(fit.error, rel=1e-9, abs=1e-20 * fit.energy)
    if fit.sigma.numel() < 2 or fit.sigma[0] > 1.01 * fit.sigma[1]:  # else the optimum is not unique
        assert_close(turned.dense(), fit.dense().T, rtol=1e-6, atol=1e-6)


@small
@given(shapes, seeds, st.integers(1, 3))
def test_rank_of_a_sum(shape, seed, terms):
    dense = kron_sum(*factors(seed, shape, terms))
    rank = int(torch.linalg.matrix_rank(dense))
    assert rank <= shape.rank_bound(terms)
    if terms == 1:
        assert rank == shape.rank_bound()


@small
@given(shapes, seeds, st.integers(1, 3))
def test_gauges_keep_the_product_and_keep_their_promise(shape, seed, terms):
    left, right = factors(seed, shape, terms)
    for gauge, size in (
        ("sqrt", lambda f: f.flatten(1).norm(dim=1)),
        ("rms", lambda f: f.square().mean((1, 2))),
    ):
        a, b = apply_gauge(left, right, gauge=gauge)
        assert_close(kron_sum(a, b), kron_sum(left, right))
        assert_close(size(a), size(b))


@small
@given(shapes, seeds)
def test_equal_steps_per_entry_move_the_product_equally_in_the_rms_gauge(shape, seed):
    a, b = apply_gauge(*factors(seed, shape, 1), gauge="rms")
    through_a = torch.kron(torch.ones_like(a[0]), b[0]).norm()
    through_b = torch.kron(a[0], torch.ones_like(b[0])).norm()
    assert_close(through_a, through_b)


@small
@given(shapes, seeds, st.integers(1, 3))
def test_signs_are_canonical(shape, seed, terms):
    left, right = factors(seed, shape, terms)
    a, b = canonical_signs(left, right)
    flat = b.flatten(1)
    assert (flat.gather(1, flat.abs().argmax(dim=1, keepdim=True)) > 0).all()
    assert torch.equal(reference_sum(a, b), reference_sum(left, right))
    for again in (canonical_signs(-left, -right), canonical_signs(a, b)):
        assert torch.equal(again[0], a)
        assert torch.equal(again[1], b)


def test_the_first_of_equal_entries_decides_the_sign():
    left, right = canonical_signs(torch.ones(1, 1, 1), torch.tensor([[[-1.0, 1.0 + 1e-15, 0.5]]]))
    assert right.tolist()[0][0][0] == 1.0
    assert left.item() == -1.0


@small
@given(shapes, seeds, st.integers(1, 3))
def test_least_squares_scales_never_raise_the_error(shape, seed, terms):
    weight, (left, right) = weight_of(seed + 5, shape), factors(seed, shape, terms)
    scales = best_scales(weight, left, right)
    before = float((weight - kron_sum(left, right)).square().sum())
    after = float((weight - kron_sum(scales[:, None, None] * left, right)).square().sum())
    assert after <= before * (1 + 1e-12)
    columns = torch.stack([torch.kron(a, b).flatten() for a, b in zip(left, right, strict=True)], dim=1)
    if int(torch.linalg.matrix_rank(columns, rtol=1e-3)) == terms:
        assert_close(
            scales, torch.linalg.lstsq(columns, weight.reshape(-1, 1)).solution[:, 0], rtol=1e-6, atol=1e-7
        )


def test_repeated_and_zero_terms_do_not_break_the_scales():
    shape = KronShape(3, 2, 2, 2)
    left, right = factors(1, shape, 1)
    left, right = left.repeat(3, 1, 1), right.repeat(3, 1, 1)
    left[2] = 0
    scales = best_scales(2 * kron_sum(left[:1], right[:1]), left, right)
    assert_close(scales, torch.ones(3, dtype=torch.float64))


@small
@given(shapes, seeds)
def test_matching_the_norm_restores_it_and_costs_what_is_said(shape, seed):
    weight = weight_of(seed, shape)
    plain = nearest_kron(weight, shape, terms=1)
    matched = nearest_kron(weight, shape, terms=1, norm="frobenius")
    assert kron_norm(matched.left, matched.right) == pytest.approx(float(weight.norm()))
    measured = float((weight - matched.dense()).square().sum())
    assert matched.error == pytest.approx(measured, rel=1e-8, abs=1e-12 * plain.energy)
    ratio = kron_norm(plain.left, plain.right) / float(weight.norm())
    assert measured / plain.energy == pytest.approx(2 - 2 * ratio, abs=1e-9)
    assert matched.error >= plain.error * (1 - 1e-12)


def test_matching_the_norm_of_nothing_is_nothing():
    left, right = match_norm(torch.zeros(1, 2, 2), torch.ones(1, 3, 3), norm=5.0)
    assert float(left.abs().max()) == 0
    assert torch.isfinite(right).all()


def test_a_nearly_exact_fit_reports_its_true_error():
    shape = KronShape(12, 9, 6, 8)
    for noise in (1e-3, 1e-6, 1e-9):
        weight = kron_sum(*factors(0, shape, 2)) + noise * weight_of(7, shape)
        fit = nearest_kron(weight, shape, terms=2)
        tail = float(torch.linalg.svdvals(rearrange(weight, shape))[2:].square().sum())
        assert fit.error == pytest.approx(tail, rel=1e-5)
        assert float((weight - fit.dense()).square().sum()) == pytest.approx(tail, rel=1e-5)
        if noise >= 1e-6:
            assert fit.error == pytest.approx(tail, rel=1e-8)


def test_a_zero_weight_and_a_singular_one_are_fine():
    shape = KronShape(3, 4, 2, 2)
    fit = nearest_kron(torch.zeros(6, 8), shape, terms=2)
    assert fit.error == 0
    assert fit.energy_kept == 1
    assert torch.isfinite(fit.left).all()
    assert torch.isfinite(fit.right).all()
    single = kron_sum(*factors(3, shape, 1))
    assert nearest_kron(single, shape, terms=3).error <= 1e-24 * float(single.square().sum())


def test_float32_weights_are_solved_in_float64_and_left_alone():
    weight = torch.randn(12, 12, generator=torch.Generator().manual_seed(0), requires_grad=True)
    before = weight.detach().clone()
    fit = nearest_kron(weight, KronShape(3, 4, 4, 3), terms=2)
    assert fit.left.dtype == fit.right.dtype == fit.sigma.dtype == torch.float64
    assert not fit.left.requires_grad
    assert torch.equal(weight, before)
    again = nearest_kron(weight, KronShape(3, 4, 4, 3), terms=2)
    assert torch.equal(fit.left, again.left)
    assert torch.equal(fit.right, again.right)


def test_wrong_weights_get_one_clear_line():
    shape = KronShape(3, 4, 2, 2)
    with pytest.raises(ModelError, match=r"for a 6x8 weight, got \(8, 6\)"):
        nearest_kron(torch.zeros(8, 6), shape, terms=1)
    with pytest.raises(ModelError, match="5 terms"):
        nearest_kron(torch.zeros(6, 8), shape, terms=5)
    with pytest.raises(ModelError, match="NaN"):
        nearest_kron(torch.full((6, 8), float("nan")), shape, terms=1)


@small
@given(st.integers(1, 8), st.integers(1, 8), seeds, st.data())
def test_leading_pairs_are_the_truncated_svd(rows, cols, seed, data):
    matrix = normal(seed, rows, cols)
    rank = data.draw(st.integers(1, min(rows, cols)))
    a, b, sigma = leading_pairs(matrix, rank)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    assert_close(sigma, s, rtol=1e-6, atol=1e-7)
    best = float((matrix - (u[:, :rank] * s[:rank]) @ vh[:rank]).square().sum())
    assert float((matrix - a @ b.T).square().sum()) == pytest.approx(best, rel=1e-8, abs=1e-13)


@small
@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_the_dominant_pair_of_a_non_negative_matrix_is_non_negative(rows, cols, seed):
    matrix = normal(seed, rows, cols).square()
    left, right = dominant_pair(matrix, torch.ones(cols))
    assert (left >= 0).all()
    assert (right >= 0).all()
    sigma = torch.linalg.svdvals(matrix)
    assert float((matrix - torch.outer(left, right)).square().sum()) == pytest.approx(
        float(sigma[1:].square().sum()), rel=1e-6, abs=1e-8
    )
    assert float(left.norm()) == pytest.approx(float(right.norm()))


def test_a_few_pairs_of_a_large_matrix_are_those_of_its_svd():
    matrix = torch.randn(900, 600, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scaled = matrix * torch.arange(1, 601) ** -0.35  # a spectrum like that of weights
    _, expected, right = torch.linalg.svd(scaled, full_matrices=False)
    a, b, sigma = leading_pairs(scaled, 3)
    torch.testing.assert_close(sigma, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.abs(), right[:3].T.abs(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(a @ b.T, scaled @ right[:3].T @ right[:3], rtol=1e-8, atol=1e-8)
    assert all(torch.equal(x, y) for x, y in zip(leading_pairs(scaled, 3), (a, b, sigma), strict=True))


def test_a_large_zero_matrix_is_no_trouble():
    a, b, sigma = leading_pairs(torch.zeros(600, 520, dtype=torch.float64), 2)
    assert not a.any()
    assert not sigma.any()
    torch.testing.assert_close(b.T @ b, torch.eye(2, dtype=torch.float64))


def test_equal_singular_values_are_no_trouble():
    rotation, _ = torch.linalg.qr(
        torch.randn(520, 520, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    )
    a, b, sigma = leading_pairs(rotation, 2)
    torch.testing.assert_close(sigma, torch.ones(520, dtype=torch.float64))
    torch.testing.assert_close((a @ b.T).square().sum(), torch.tensor(2.0, dtype=torch.float64))
