"""Fewer hidden units: which to keep, and what the layer behind them should do instead (MoDeGPT's type I).

In front of a nonlinearity columns can only be selected. Given the selection S, the best following matrix is
plain least squares of the old output on the kept activations, (S^T C S)^+ S^T C W, and its error is the trace
of a Schur complement. Selection is by ridge leverage (MoDeGPT, arXiv 2408.09632) or greedy with the output in
view.
"""

# h hidden units, k kept · C second moment or covariance of the hidden activations (h, h) · W (h, d) follows
# them

import torch
from torch import Tensor

from model.algebra.psd import centred, check_metric, psd_eig, psd_pinv
from model.config import ModelError

PIVOT = 1e-12
"""A unit whose remaining variance is below this share of the trace is explained already and gains nothing."""


def ridge_leverage(gram: Tensor, *, ridge_rel: float = 1.0) -> Tensor:
    """diag(C (C + lam I)^-1), (h,), in [0, 1]; lam = ridge_rel tr(C) / h. Scale-free, no cancellation.

    As the ridge goes to 0 all scores of a regular C go to 1 and say nothing.
    """
    if ridge_rel <= 0:
        raise ModelError(f"ridge_rel={ridge_rel} must be positive: without a ridge all leverages are 1")
    values, vectors = psd_eig(gram, rcond=0.0)
    values = values.clamp_min(0)
    ridge = ridge_rel * float(values.sum()) / len(values)
    if ridge == 0:
        return torch.zeros_like(values)
    return vectors.square() @ (values / (values + ridge))


def keep_top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; ties go to the lower index."""
    if not 1 <= count <= len(scores):
        raise ModelError(f"cannot keep {count} of {len(scores)}: choose 1 to {len(scores)}")
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def greedy_keep(gram: Tensor, weight: Tensor, count: int) -> Tensor:
    """Indices of `count` units, ascending, each the best single addition for the refitted output error.

    Output-aware pivoted Cholesky: with R the residual of C and M = R W, the gain of unit j is ||M_j||^2 /
    R_jj. R is never updated as a whole; its column is rebuilt from the picks so far, O(h k (k + d)) in all.
    """
    size = len(gram)
    check_metric(gram, size)
    gram, image = gram.double(), gram.double() @ weight.double()  # (h, h), (h, d)
    if not 1 <= count <= size:
        raise ModelError(f"cannot keep {count} of {size}: choose 1 to {size}")
    pivots = gram.diagonal().clone()
    floor = PIVOT * float(pivots.sum())
    basis = torch.zeros(count, size, dtype=gram.dtype, device=gram.device)  # row t: Cholesky column t
    free = torch.ones(size, dtype=torch.bool, device=gram.device)
    for step in range(count):
        useful = free & (pivots > floor)
        gain = torch.where(useful, image.square().sum(dim=1) / pivots.clamp_min(floor), -1.0)
        gain = torch.where(free, gain, -2.0)
        pick = int(gain.argmax())
        free[pick] = False
        if float(gain[pick]) <= 0:
            continue
        column = gram[pick] - basis[:step, pick] @ basis[:step]
        column = column / pivots[pick].sqrt()
        basis[step] = column
        image.addr_(column, image[pick] / pivots[pick].sqrt(), alpha=-1)
        pivots = (pivots - column.square()).clamp_min(0)
    return torch.nonzero(~free).flatten()


def refit(gram: Tensor, keep: Tensor, weight: Tensor) -> Tensor:
    """W' = (S^T C S)^+ S^T C W, (k, d): least squares of the old output on the kept units."""
    gram = gram.double()
    return psd_pinv(gram[keep][:, keep]) @ (gram[keep] @ weight.double())


def refit_with_bias(
    gram: Tensor, mean: Tensor, keep: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Joint optimum of W' (k, d) and b' (d,): refit in the covariance, b' = b + mu W - mu_S W'."""
    new = refit(centred(gram, mean), keep, weight)
    mean = mean.double()
    return new, bias.double() + mean @ weight.double() - mean[keep] @ new


def selection_loss(gram: Tensor, keep: Tensor, weight: Tensor, new: Tensor) -> float:
    """Mean squared output error E||h W - h_S W'||^2 of any W' (k, d) on the kept units, in the metric C.

    With W' = `refit` this is tr(W^T (C - C_S (S^T C S)^+ C_S^T) W); with W' = W[S] the error of plain
    pruning.
    """
    rest = weight.detach().double().clone()
    rest[keep] -= new.double()
    return float((rest * (gram.double() @ rest)).sum())
