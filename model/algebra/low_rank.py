"""Low rank in a metric: one solver for SVD, FWSVD, ASVD, SVD-LLM and KFAC-SVD, which differ in metric alone.

The rank-r minimum of tr(G (W-K)^T C (W-K)) is a projection, K = W G^1/2 V V^T G^-1/2, with V the top
eigenvectors of G^1/2 W^T C W G^1/2. The input metric is never inverted, so its null directions are harmless,
and with G = I nothing is inverted at all and ||K|| <= ||W||.
"""

# m, n rows and columns of W (in, out) · r rank · C input metric, G output metric: matrix, or vector if
# diagonal

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.algebra.gauge import apply_gauge, canonical_signs
from model.algebra.kron import NEARLY_EXACT
from model.algebra.psd import check_metric, metric_loss, psd_roots, times
from model.config import ModelError


@dataclass(frozen=True)
class LowRankFit:
    """K = first @ second in place of a weight, balanced, and its loss in the metric."""

    first: Tensor
    """(m, r), float64; column k has the root-mean-square entry of row k of `second`."""
    second: Tensor
    """(r, n), float64."""
    sigma: Tensor
    """All singular values of C^1/2 W G^1/2, descending, (min(m, n),)."""
    loss: float
    """tr(G (W-K)^T C (W-K)): the tail."""
    energy: float
    """The loss of K = 0."""

    @property
    def energy_kept(self) -> float:
        """Share of the energy that is kept, in [0, 1]; 1 for a zero weight or metric."""
        return 1.0 - self.loss / self.energy if self.energy > 0 else 1.0

    def dense(self) -> Tensor:
        """K, (m, n)."""
        return self.first @ self.second


def largest_rank(rows: int, cols: int) -> int:
    """Largest rank at which two factors hold fewer parameters than the weight: r (m + n) < m n."""
    return (rows * cols - 1) // (rows + cols)


def check_rank(rows: int, cols: int, rank: int) -> None:
    """Raise ModelError unless the factorisation saves parameters, 1 <= r and r (m + n) < m n."""
    largest = largest_rank(rows, cols)
    if not 1 <= rank <= largest:
        raise ModelError(
            f"rank {rank} of a {rows}x{cols} weight: choose 1 to {largest}; "
            f"from {largest + 1} on two factors are no smaller than the weight"
        )


def balance(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Same product, with equal root-mean-square entries per component and canonical signs."""
    stacks = apply_gauge(first.mT[:, :, None], second[:, None, :], gauge="rms")
    left, right = canonical_signs(*stacks)
    return left[:, :, 0].mT, right[:, 0, :]


def low_rank(
    weight: Tensor,
    *,
    rank: int,
    input_metric: Tensor | None = None,
    output_metric: Tensor | None = None,
) -> LowRankFit:
    """The rank-`rank` K that minimises tr(G (W-K)^T C (W-K)); metrics default to I, a vector is a diagonal.

    Exact for any positive semi-definite metrics. `check_rank` is the caller's choice: here every rank from 1
    to min(m, n) is solved. Raises ModelError for other ranks, for weights or metrics that are not finite, and
    for metrics of another size or with a negative diagonal.
    """
    weight = weight.detach().double()
    if not 1 <= rank <= min(weight.shape):
        raise ModelError(f"rank {rank} of a {tuple(weight.shape)} weight: choose 1 to {min(weight.shape)}")
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"weight {tuple(weight.shape)} holds NaN or infinity; nothing can be fitted to it")
    _check_metrics(weight, input_metric, output_metric)
    if _is_wide(weight, output_metric):  # the same problem from the other side
        turned = low_rank(weight.mT, rank=rank, input_metric=output_metric, output_metric=input_metric)
        first, second = balance(turned.second.mT, turned.first.mT)
        return replace(turned, first=first, second=second)
    energy = metric_loss(weight, input_metric=input_metric, output_metric=output_metric)
    output = None if output_metric is None else psd_roots(output_metric)
    target = weight if output is None else times(output.root, weight.mT).mT
    vectors, sigma = top_right_vectors(target, rank=rank, metric=input_metric)
    first = target @ vectors
    second = vectors.mT if output is None else times(output.inverse, vectors).mT
    loss = float(sigma[rank:].square().sum())
    if loss < NEARLY_EXACT * energy:  # below what squared singular values resolve
        rest = weight - first @ second
        loss = max(0.0, metric_loss(rest, input_metric=input_metric, output_metric=output_metric))
    first, second = balance(first, second)
    return LowRankFit(first=first, second=second, sigma=sigma, loss=loss, energy=energy)


def metric_values(
    weight: Tensor, *, input_metric: Tensor | None = None, output_metric: Tensor | None = None
) -> Tensor:
    """Singular values of C^1/2 W G^1/2, descending, (min(m, n),): squared, what each rank is worth."""
    _check_metrics(weight, input_metric, output_metric)
    if _is_wide(weight, output_metric):
        return metric_values(weight.mT, input_metric=output_metric, output_metric=input_metric)
    root = None if output_metric is None else psd_roots(output_metric).root
    target = weight.double() if root is None else times(root, weight.mT).mT
    return top_right_vectors(target, rank=1, metric=input_metric)[1]


def _check_metrics(weight: Tensor, input_metric: Tensor | None, output_metric: Tensor | None) -> None:
    for metric, size in zip((input_metric, output_metric), weight.shape, strict=True):
        if metric is not None:
            check_metric(metric, size, or_diagonal=True)


def _is_wide(weight: Tensor, output_metric: Tensor | None) -> bool:
    """Whether the root of a full output metric would be the dear one: the transpose needs only that of C."""
    return output_metric is not None and output_metric.ndim == 2 and weight.shape[0] < weight.shape[1]


def top_right_vectors(weight: Tensor, *, rank: int, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Top right singular vectors (n, r) of C^1/2 W, orthonormal, and all its singular values, descending.

    Eigenvectors of the smaller Gram matrix; if that is the left one, an orthonormal basis of their images,
    which divides by no singular value.
    """
    weight = weight.double()
    if weight.shape[0] >= weight.shape[1]:
        values, vectors = torch.linalg.eigh(weight.mT @ times(metric, weight))
        return vectors.flip(1)[:, :rank], values.flip(0).clamp_min(0).sqrt()
    scaled = weight if metric is None else times(psd_roots(metric).root, weight)
    values, vectors = torch.linalg.eigh(scaled @ scaled.mT)
    basis = torch.linalg.qr(scaled.mT @ vectors.flip(1)[:, :rank]).Q
    return basis, values.flip(0).clamp_min(0).sqrt()


def asvd_metric(abs_mean: Tensor, *, alpha: float = 0.5) -> Tensor:
    """Diagonal input metric of ASVD (arXiv 2312.05821), (m,): E|x_i|^(2 alpha)."""
    return abs_mean.double() ** (2 * alpha)
