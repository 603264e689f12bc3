"""Low rank in a metric: the loss is the tail and what tokens measure, for singular metrics too."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from model.algebra.bias import corrected_bias
from model.algebra.kron import nearest_kron
from model.algebra.low_rank import asvd_metric, check_rank, largest_rank, low_rank, metric_values
from model.algebra.psd import (
    centred,
    homogeneous,
    metric_loss,
    psd_pinv,
    psd_roots,
    regression_weight,
    shrink,
    times,
)
from model.algebra.shapes import KronShape
from model.config import ModelError

small = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
sides = st.integers(1, 9)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def tokens(seed: int, count: int, width: int) -> torch.Tensor:
    """Correlated inputs with a mean, of very different sizes per direction."""
    spread = normal(seed, width, width) * torch.linspace(2, 0.05, width)
    return normal(seed + 1, count, width) @ spread + normal(seed + 2, width)


def layer_norm_tokens(seed: int, count: int, width: int) -> torch.Tensor:
    """LayerNorm outputs with a gain and a shift: their covariance has the null vector 1/gain."""
    x = normal(seed, count, width)
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    return x * (normal(seed + 1, width).abs() + 0.2) + normal(seed + 2, width)


def tail(sigma: torch.Tensor, rank: int) -> float:
    return float(sigma[rank:].square().sum())


@small
@given(sides, sides, seeds, st.data())
def test_without_metrics_it_is_the_truncated_svd(rows, cols, seed, data):
    weight = normal(seed, rows, cols)
    rank = data.draw(st.integers(1, min(rows, cols)))
    fit = low_rank(weight, rank=rank)
    sigma = torch.linalg.svdvals(weight)
    measured = float((weight - fit.dense()).square().sum())
    assert fit.loss == pytest.approx(tail(sigma, rank), rel=1e-8, abs=1e-20)
    assert measured == pytest.approx(tail(sigma, rank), rel=1e-8, abs=1e-20)
    assert fit.energy == pytest.approx(float(weight.square().sum()))
    assert_close(fit.sigma, sigma, rtol=1e-6, atol=1e-7)
    if rank == min(rows, cols):
        assert_close(fit.dense(), weight, rtol=1e-10, atol=1e-10)


@small
@given(sides, sides, seeds, st.data())
def test_it_is_the_kronecker_shape_of_a_column_and_a_row(rows, cols, seed, data):
    weight = normal(seed, rows, cols)
    rank = data.draw(st.integers(1, min(rows, cols)))
    kron = nearest_kron(weight, KronShape(rows, 1, 1, cols), terms=rank)
    fit = low_rank(weight, rank=rank)
    assert fit.loss == pytest.approx(kron.error, rel=1e-8, abs=1e-20)
    sigma = torch.linalg.svdvals(weight)
    if rank == len(sigma) or sigma[rank - 1] > 1.01 * sigma[rank]:
        assert_close(fit.dense(), kron.dense(), rtol=1e-6, atol=1e-6)


@small
@given(sides, sides, seeds, st.data())
def test_the_loss_is_the_tail_and_the_measured_output_error(rows, cols, seed, data):
    x, weight = tokens(seed, 50, rows), normal(seed + 9, rows, cols)
    gram = x.T @ x / len(x)
    rank = data.draw(st.integers(1, min(rows, cols)))
    fit = low_rank(weight, rank=rank, input_metric=gram)
    measured = float((x @ (weight - fit.dense())).square().sum()) / len(x)
    root = torch.linalg.cholesky(gram).T
    expected = tail(
        torch.linalg.svdvals(root @ weight), rank
    )  # any root of the metric has these singular values
    assert fit.loss == pytest.approx(measured, rel=1e-7, abs=1e-14 * fit.energy)
    assert fit.loss == pytest.approx(expected, rel=1e-7, abs=1e-14 * fit.energy)
    assert float(fit.dense().norm()) <= float(weight.norm()) * (1 + 1e-9)
    for other in (low_rank(weight, rank=rank), low_rank(weight, rank=rank, input_metric=gram.diagonal())):
        assert metric_loss(weight - other.dense(), input_metric=gram) >= fit.loss * (1 - 1e-9) - 1e-12


@small
@given(st.integers(1, 7), st.integers(1, 7), seeds, st.data())
def test_two_metrics(rows, cols, seed, data):
    weight, x, delta = normal(seed, rows, cols), tokens(seed + 1, 40, rows), tokens(seed + 2, 40, cols)
    gram, out = shrink(x.T @ x / 40, 0.1), shrink(delta.T @ delta / 40, 0.3)
    rank = data.draw(st.integers(1, min(rows, cols)))
    fit = low_rank(weight, rank=rank, input_metric=gram, output_metric=out)
    rest = weight - fit.dense()
    direct = float(torch.trace(out @ rest.T @ gram @ rest))
    sigma = torch.linalg.svdvals(psd_roots(gram).root @ weight @ psd_roots(out).root)
    assert fit.loss == pytest.approx(direct, rel=1e-6, abs=1e-13 * fit.energy)
    assert fit.loss == pytest.approx(tail(sigma, rank), rel=1e-6, abs=1e-13 * fit.energy)
    for scaled in (
        low_rank(weight, rank=rank, input_metric=1e6 * gram, output_metric=out),
        low_rank(weight, rank=rank, input_metric=gram, output_metric=1e-6 * out),
    ):
        assert_close(scaled.dense(), fit.dense(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_the_null_direction_of_a_layer_norm_does_no_harm(shape: tuple[int, int]):
    rows, cols = shape
    x, weight = layer_norm_tokens(0, 400, rows), normal(5, rows, cols)
    cov = centred(x.T @ x / 400, x.mean(dim=0))
    assert int(psd_roots(cov).rank) == rows - 1
    out = normal(6, cols, 3) @ normal(7, 3, cols)  # a singular output metric as well
    for metric in (None, out @ out.T):
        for rank in (1, 4, 12):
            fit = low_rank(weight, rank=rank, input_metric=cov, output_metric=metric)
            direct = metric_loss(weight - fit.dense(), input_metric=cov, output_metric=metric)
            assert torch.isfinite(fit.first).all()
            assert torch.isfinite(fit.second).all()
            assert fit.loss == pytest.approx(direct, rel=1e-7, abs=1e-12 * fit.energy)
    assert float(low_rank(weight, rank=4, input_metric=cov).dense().norm()) <= float(weight.norm())


def test_fwsvd_is_the_row_weighted_optimum():
    weight, fisher = normal(0, 14, 10), normal(1, 14).square() + 0.01
    fit = low_rank(weight, rank=3, input_metric=fisher)
    weighted = float((fisher[:, None] * (weight - fit.dense()).square()).sum())
    sigma = torch.linalg.svdvals(fisher.sqrt()[:, None] * weight)
    assert weighted == pytest.approx(tail(sigma, 3), rel=1e-9)
    assert fit.loss == pytest.approx(weighted, rel=1e-9)
    plain = low_rank(weight, rank=3)
    assert weighted <= float((fisher[:, None] * (weight - plain.dense()).square()).sum())
    assert float((weight - fit.dense()).square().sum()) >= plain.loss
    assert_close(low_rank(weight, rank=3, input_metric=1e-7 * fisher).dense(), fit.dense())
    assert_close(low_rank(weight, rank=3, input_metric=torch.full((14,), 2.5)).dense(), plain.dense())
    assert_close(low_rank(weight, rank=10, input_metric=fisher).dense(), weight)


def test_rows_without_fisher_information_stay_finite():
    weight, fisher = normal(0, 14, 10), normal(1, 14).square()
    fisher[[0, 5]] = 0
    fit = low_rank(weight, rank=4, input_metric=fisher)
    assert torch.isfinite(fit.dense()).all()
    assert fit.loss == pytest.approx(float((fisher[:, None] * (weight - fit.dense()).square()).sum()))


def test_row_and_column_weights():
    weight, rows, cols = normal(0, 9, 12), normal(1, 9).square() + 0.1, normal(2, 12).square() + 0.1
    fit = low_rank(weight, rank=3, input_metric=rows, output_metric=cols)
    direct = float((rows[:, None] * cols * (weight - fit.dense()).square()).sum())
    sigma = torch.linalg.svdvals(rows.sqrt()[:, None] * weight * cols.sqrt())
    assert fit.loss == pytest.approx(direct)
    assert fit.loss == pytest.approx(tail(sigma, 3))


def test_asvd_is_a_diagonal_metric():
    mean = torch.tensor([0.5, 2.0, 3.0])
    assert_close(asvd_metric(mean), mean.double())
    assert_close(asvd_metric(mean, alpha=1.0), mean.double().square())


@small
@given(sides, sides, seeds, st.data())
def test_storage_is_balanced_and_deterministic(rows, cols, seed, data):
    weight = normal(seed, rows, cols).float()
    rank = data.draw(st.integers(1, min(rows, cols)))
    fit = low_rank(weight, rank=rank)
    assert fit.first.dtype == fit.second.dtype == torch.float64
    assert_close(fit.first.square().mean(dim=0), fit.second.square().mean(dim=1), rtol=1e-6, atol=1e-12)
    again = low_rank(weight, rank=rank)
    assert torch.equal(fit.first, again.first)
    assert torch.equal(fit.second, again.second)


def test_ranks_that_save_nothing_are_refused():
    assert [largest_rank(768, cols) for cols in (2304, 768, 3072)] == [575, 383, 614]
    check_rank(768, 3072, 614)
    for rank in (0, 615):
        with pytest.raises(ModelError, match="choose 1 to 614"):
            check_rank(768, 3072, rank)
    with pytest.raises(ModelError, match=r"rank 5 of a \(4, 6\) weight: choose 1 to 4"):
        low_rank(torch.zeros(4, 6), rank=5)


def test_bad_numbers_are_refused():
    with pytest.raises(ModelError, match="NaN"):
        low_rank(torch.full((3, 3), torch.nan), rank=1)
    with pytest.raises(ModelError, match="NaN"):
        psd_roots(torch.full((3, 3), torch.inf))
    with pytest.raises(ModelError, match="not positive semi-definite"):
        psd_roots(torch.diag(torch.tensor([1.0, -0.5])))
    with pytest.raises(ModelError, match="outside"):
        shrink(torch.eye(2), 1.5)


@pytest.mark.parametrize("side", ["input_metric", "output_metric"])
@pytest.mark.parametrize("size", [(12, 8), (8, 12)], ids=["tall", "wide"])
def test_what_is_no_metric_is_refused_whichever_side_is_larger(size: tuple[int, int], side: str):
    weight, own = normal(0, *size), size[side == "output_metric"]
    for spoiled in (torch.nan, torch.inf):
        diagonal = torch.ones(own)
        diagonal[1] = spoiled
        for metric in (diagonal, torch.diag(diagonal), torch.eye(own + 1)):
            for solve in (partial(low_rank, rank=2), metric_values):
                with pytest.raises(ModelError, match=f"need a finite {own}x{own} matrix"):
                    solve(weight, **{side: metric})
    diagonal = torch.ones(own)
    diagonal[1] = -1e-3
    for metric in (diagonal, torch.diag(diagonal)):
        with pytest.raises(ModelError, match="not positive semi-definite; is the mean from the same tokens"):
            low_rank(weight, rank=2, **{side: metric})
    diagonal[1] = -1e-12  # rounding of a covariance
    assert low_rank(weight, rank=2, **{side: diagonal}).loss > 0


@small
@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_roots_and_inverses(size, rank, seed):
    half = normal(seed, size, rank)
    metric = torch.stack([half @ half.T, torch.eye(size, dtype=torch.float64)])
    roots = psd_roots(metric)
    assert_close(roots.root @ roots.root, metric, rtol=1e-7, atol=1e-7)
    assert_close(
        roots.inverse, torch.linalg.pinv(roots.root, hermitian=True, rtol=1e-6), rtol=1e-4, atol=1e-4
    )
    assert roots.rank.tolist() == [min(size, rank), size]
    assert_close(psd_pinv(metric), roots.inverse @ roots.inverse, rtol=1e-6, atol=1e-6)
    values = normal(seed + 1, size).square()
    assert_close(torch.diag(psd_roots(values).root), psd_roots(torch.diag(values)).root, rtol=1e-6, atol=1e-9)


def test_the_cut_off_is_relative():
    for scale in (1e-30, 1.0, 1e30):
        assert int(psd_roots(scale * torch.diag(torch.tensor([1.0, 1e-8, 1e-12]).double())).rank) == 2


@small
@given(st.integers(1, 8), seeds)
def test_moments(width, seed):
    x = tokens(seed, 30, width)
    gram, mean = x.T @ x / 30, x.mean(dim=0)
    assert_close(
        centred(gram, mean), torch.cov(x.T, correction=0).reshape(width, width), rtol=1e-7, atol=1e-9
    )
    extended = torch.cat([x, torch.ones(30, 1, dtype=x.dtype)], dim=1)
    assert_close(homogeneous(gram, mean), extended.T @ extended / 30)
    shrunk = shrink(gram, 0.3)
    assert float(torch.trace(shrunk)) == pytest.approx(float(torch.trace(gram)))
    assert torch.linalg.eigvalsh(shrunk)[0] >= 0.3 * torch.trace(gram) / width * (1 - 1e-9)
    diagonal = gram.diagonal()
    assert_close(torch.diag(shrink(diagonal, 0.3)), shrink(torch.diag(diagonal), 0.3))
    assert_close(times(None, gram), gram)


@small
@given(st.integers(2, 8), st.integers(1, 8), seeds)
def test_bias_correction_is_the_best_bias_and_leaves_the_centred_loss(rows, cols, seed):
    x, weight, bias = tokens(seed, 60, rows), normal(seed + 4, rows, cols), normal(seed + 5, cols)
    gram, mean = x.T @ x / 60, x.mean(dim=0)
    cov = centred(gram, mean)
    target = x @ weight + bias
    for fit in (low_rank(weight, rank=1, input_metric=cov), low_rank(weight, rank=1, input_metric=gram)):
        rest = weight - fit.dense()
        new = corrected_bias(bias, mean=mean, difference=rest)
        after = float((x @ fit.dense() + new - target).square().sum()) / 60
        before = float((x @ fit.dense() + bias - target).square().sum()) / 60
        assert after == pytest.approx(metric_loss(rest, input_metric=cov), rel=1e-6, abs=1e-10)
        assert after <= before + 1e-10
    out = normal(seed + 6, cols, cols)
    out = out @ out.T
    error = x @ fit.dense() + new - target  # no other bias is better, under an output metric either
    nudged = error + 0.01 * normal(seed + 7, cols)
    assert float((nudged @ out * nudged).sum()) >= float((error @ out * error).sum())


@small
@given(st.integers(1, 8), st.integers(1, 6), seeds)
def test_a_fit_of_the_regression_weight_is_a_structured_regression(rows, cols, seed):
    x = tokens(seed, 40, rows)
    x[:, 0] = 0  # a dead input
    y = torch.tanh(normal(seed + 3, 40, cols) + x @ normal(seed + 4, rows, cols))
    gram, target = x.T @ x / 40, regression_weight(x.T @ x / 40, x.T @ y / 40)
    least = float((y - x @ target).square().sum()) / 40
    assert least == pytest.approx(float((y - x @ torch.linalg.pinv(x) @ y).square().sum()) / 40, rel=1e-6)
    for other in (normal(seed + 5, rows, cols), low_rank(target, rank=1, input_metric=gram).dense()):
        error = float((y - x @ other).square().sum()) / 40
        assert error == pytest.approx(least + metric_loss(target - other, input_metric=gram), rel=1e-6)
