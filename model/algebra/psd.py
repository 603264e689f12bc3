"""Metrics: positive semi-definite matrices of inputs and outputs, their roots, and errors measured in them.

Data Grams are singular by construction (a LayerNorm output has an exact null direction), so nothing here is a
Cholesky factorisation. Roots come from symmetric eigenvalues with one relative cut-off, and an inverse is
always the pseudo-inverse under the same cut-off. A metric may be a matrix (..., m, m) or, when diagonal, a
vector (m,).
"""

# C input metric (m, m) or (m,) · G output metric (n, n) or (n,) · W weight (m, n), y = x W

from dataclasses import dataclass

import torch
from torch import Tensor

from model.config import ModelError

RCOND = 1e-10
"""Eigenvalues at or below this share of the largest count as zero."""

NEGATIVE = 1e-6
"""An eigenvalue below minus this share of the largest is no rounding error: the metric is refused."""


@dataclass(frozen=True)
class Roots:
    """Symmetric square root of a metric and the pseudo-inverse of that root, in the shape of the metric."""

    root: Tensor
    """C^(1/2), with the eigenvalues under the cut-off set to zero."""
    inverse: Tensor
    """C^(-1/2) on the same eigenvectors, zero elsewhere."""
    rank: Tensor
    """Eigenvalues kept, one integer per matrix."""


def check_metric(metric: Tensor, size: int, *, or_diagonal: bool = False) -> None:
    """Raise ModelError unless a metric is finite, (size, size), or (size,) where allowed, and may be PSD.

    Only the diagonal is looked at for negative values: what needs a root sees all eigenvalues.
    """
    shapes = ((size, size), (size,)) if or_diagonal else ((size, size),)
    if tuple(metric.shape) not in shapes or not bool(torch.isfinite(metric).all()):
        raise ModelError(f"metric {tuple(metric.shape)}: need a finite {size}x{size} matrix")
    diagonal = metric if metric.ndim == 1 else metric.diagonal()
    lowest, largest = float(diagonal.min()), float(diagonal.abs().max())
    if lowest < -NEGATIVE * largest:
        raise ModelError(
            f"metric has {lowest:.3g} on its diagonal: not positive semi-definite; is the mean from the same "
            "tokens as the second moment?"
        )


def psd_eig(metric: Tensor, *, rcond: float = RCOND) -> tuple[Tensor, Tensor]:
    """Eigenvalues (..., m), ascending, zero under the relative cut-off, and eigenvectors (..., m, m).

    Raises ModelError for a metric with NaN, infinity or a clearly negative eigenvalue.
    """
    metric = metric.detach().double()
    if not bool(torch.isfinite(metric).all()):
        raise ModelError(f"metric {tuple(metric.shape)} holds NaN or infinity; recollect its statistics")
    values, vectors = torch.linalg.eigh((metric + metric.mT) / 2)
    return _cut(values, rcond), vectors


def psd_roots(metric: Tensor, *, rcond: float = RCOND) -> Roots:
    """Root and inverse root of a metric (..., m, m), or of a diagonal one given as a vector (m,)."""
    if metric.ndim == 1:
        values = _cut(metric.detach().double(), rcond)
        return Roots(root=values.sqrt(), inverse=_inverse_root(values), rank=(values > 0).sum())
    values, vectors = psd_eig(metric, rcond=rcond)
    root = (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT
    inverse = (vectors * _inverse_root(values).unsqueeze(-2)) @ vectors.mT
    return Roots(root=root, inverse=inverse, rank=(values > 0).sum(dim=-1))


def psd_pinv(metric: Tensor, *, rcond: float = RCOND) -> Tensor:
    """Pseudo-inverse of a metric (..., m, m) under the relative cut-off."""
    values, vectors = psd_eig(metric, rcond=rcond)
    return (vectors * _inverse_root(values).square().unsqueeze(-2)) @ vectors.mT


def times(metric: Tensor | None, matrix: Tensor) -> Tensor:
    """metric @ matrix, for a full (m, m), diagonal (m,) or absent (identity) metric; float64."""
    matrix = matrix.double()
    if metric is None:
        return matrix
    return metric.double()[:, None] * matrix if metric.ndim == 1 else metric.double() @ matrix


def metric_loss(
    difference: Tensor, *, input_metric: Tensor | None = None, output_metric: Tensor | None = None
) -> float:
    """tr(G D^T C D) for D = W - K (m, n); with G = I the mean squared output error over the tokens of C."""
    difference = difference.detach().double()
    weighted = times(input_metric, difference)
    if output_metric is not None:
        weighted = times(output_metric, weighted.mT).mT
    return float((difference * weighted).sum())


def centred(gram: Tensor, mean: Tensor) -> Tensor:
    """Covariance from the second moment E[x^T x] (..., m, m) and the mean (..., m)."""
    mean = mean.double()
    return gram.double() - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def homogeneous(gram: Tensor, mean: Tensor) -> Tensor:
    """Second moment of [x, 1], (m+1, m+1), from that of x (m, m) and the mean (m,)."""
    column = mean.double()[:, None]
    top = torch.cat([gram.double(), column], dim=1)
    return torch.cat([top, torch.cat([column, torch.ones_like(column[:1])]).mT])


def shrink(metric: Tensor, amount: float) -> Tensor:
    """(1-s) C + s (tr C / m) I: keeps the trace, lifts the small eigenvalues; 0 <= s <= 1."""
    if not 0 <= amount <= 1:
        raise ModelError(f"shrinkage {amount} is outside [0, 1]")
    metric = metric.double()
    if metric.ndim == 1:
        return (1 - amount) * metric + amount * metric.mean()
    shrunk = (1 - amount) * metric
    shrunk.diagonal().add_(amount * metric.diagonal().mean())
    return shrunk


def regression_weight(gram: Tensor, cross: Tensor, *, rcond: float = RCOND) -> Tensor:
    """W* = C^+ E[x^T y], (m, n), from E[x^T x] (m, m) and E[x^T y] (m, n): least squares of y on x.

    For every K the mean of ||y - x K||^2 is a constant plus tr((W* - K)^T C (W* - K)), so any fit of W* in
    the metric C is a structured regression: how a layer is solved for the inputs that it gets after those
    before it were compressed, with y the outputs it should give.
    """
    return psd_pinv(gram, rcond=rcond) @ cross.double()


def _cut(values: Tensor, rcond: float) -> Tensor:
    largest = values.amax(dim=-1, keepdim=True)
    if bool((values.amin(dim=-1, keepdim=True) < -NEGATIVE * largest.abs()).any()):
        raise ModelError(
            f"metric has eigenvalue {float(values.min()):.3g} beside {float(values.max()):.3g}: "
            "not positive semi-definite; is the mean from the same tokens as the second moment?"
        )
    return torch.where(values > rcond * largest, values, 0.0)


def _inverse_root(values: Tensor) -> Tensor:
    kept = values > 0
    return torch.where(kept, torch.where(kept, values, 1.0).rsqrt(), 0.0)
