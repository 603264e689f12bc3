"""Kronecker sums under elementwise weights: min sum_ij F_ij (W - K)_ij^2, F a Fisher information.

On the rearrangement R(W) this is weighted low rank with weights R(F). Where F is itself a Kronecker product P
(x) Q there is a closed form; otherwise rows and columns are solved in turn, each exactly, or the missing
information is filled in (EM). The problem is not convex: starts matter, and the lowest loss is kept.
"""

# r terms; R(W), R(F) are (p, q) = (m1*n1, m2*n2); a (p, r), b (q, r) hold vec(A_k), vec(B_k) as columns

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from model.algebra.alternate import (
    DEFAULT_SOLVER,
    Convergence,
    Pair,
    Solver,
    WeightedFit,
    alternate,
    proximal_solve,
)
from model.algebra.gauge import apply_gauge, canonical_signs
from model.algebra.kron import (
    check_weight,
    dominant_pair,
    leading_pairs,
    nearest_kron,
    rearrange,
)
from model.algebra.low_rank import low_rank
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

WeightedStart = Literal["vl", "separable"]
"""Where a weighted fit starts: the unweighted optimum, or the closed form under the nearest separable
weights.
"""

FLOOR = 1e-6
"""Separable surrogate weights are lifted to this share of the largest."""


def elementwise_loss(difference: Tensor, weights: Tensor) -> float:
    """sum_ij F_ij D_ij^2 for D = W - K and F, both (m, n)."""
    return float((weights.double() * difference.detach().double().square()).sum())


def nearest_separable(weights: Tensor, shape: KronShape) -> tuple[Tensor, Tensor]:
    """P (m1, n1), Q (m2, n2), not negative, with P (x) Q nearest to the weights; lifted to a floor of 1e-6.

    The leading pair of a non-negative matrix is non-negative (Perron), so the two are weights themselves.
    """
    matrix = rearrange(weights.detach().double(), shape)
    left, right = dominant_pair(matrix, torch.ones_like(matrix[0]))
    left, right = (side.clamp_min(FLOOR * float(side.max())) for side in (left, right))
    return left.reshape(shape.m1, shape.n1), right.reshape(shape.m2, shape.n2)


def separable_kron(weight: Tensor, p: Tensor, q: Tensor, *, terms: int, gauge: Gauge = "rms") -> WeightedFit:
    """The exact optimum for F = P (x) Q, P (m1, n1) and Q (m2, n2) not negative; the loss is the tail.

    Where a weight is zero the factor on the small side of R(W) is set to zero.
    """
    shape = KronShape(p.shape[0], p.shape[1], q.shape[0], q.shape[1])
    check_weight(weight, shape)
    check_terms(shape, terms)
    for weights in (p, q):
        _check_weights(weights, weights)
    fit = low_rank(
        rearrange(weight.detach().double(), shape),
        rank=terms,
        input_metric=p.reshape(-1).double(),
        output_metric=q.reshape(-1).double(),
    )
    how = Convergence("closed_form", (fit.loss,), "closed_form", (("closed_form", fit.loss),))
    return _fit((fit.first, fit.second.T), shape, gauge=gauge, loss=fit.loss, energy=fit.energy, how=how)


def weighted_kron(
    weight: Tensor,
    weights: Tensor,
    shape: KronShape,
    *,
    terms: int,
    method: Literal["als", "em", "separable"] = "als",
    starts: Sequence[WeightedStart] = ("vl", "separable"),
    warm: Pair | None = None,
    solver: Solver = DEFAULT_SOLVER,
    gauge: Gauge = "rms",
) -> WeightedFit:
    """A Kronecker sum of low error under weights F >= 0 (m, n), the best over all starts and `warm`.

    `als` solves rows and columns of R(W) in turn; `em` truncates F R(W) + (1-F) K, slower; `separable` takes
    the closed form under the nearest separable weights as it is, which may be better or worse than `vl`. The
    scale of F changes nothing. Raises ModelError for weights that are negative, not finite or of another
    shape.
    """
    check_weight(weight, shape)
    check_terms(shape, terms)
    _check_weights(weights, weight)
    largest = float(weights.max())
    target = rearrange(weight.detach().double(), shape)
    scaled = rearrange(weights.detach().double(), shape) / (largest if largest > 0 else 1.0)
    names: Sequence[WeightedStart] = ("separable",) if method == "separable" else starts
    pairs = {str(name): _start(name, weight, weights, shape, terms) for name in names}
    if warm is not None:
        pairs["warm"] = warm[0].double().flatten(1).T, warm[1].double().flatten(1).T
    weighted = scaled * target

    def loss(pair: Pair) -> float:
        return float((scaled * (target - pair[0] @ pair[1].T).square()).sum())

    def als(pair: Pair) -> tuple[Pair, float]:
        a, b = pair
        a = _half_step(scaled, weighted, fixed=b, old=a, ridge_rel=solver.ridge_rel)
        b = _half_step(scaled.T, weighted.T, fixed=a, old=b, ridge_rel=solver.ridge_rel)
        return (a, b), loss((a, b))

    def em(pair: Pair) -> tuple[Pair, float]:
        filled = weighted + (1 - scaled) * (pair[0] @ pair[1].T)
        a, b, _ = leading_pairs(filled, terms)
        return (a, b), loss((a, b))

    if method == "separable":
        solver = Solver(max_iter=0)
    pair, how = alternate(em if method == "em" else als, loss, pairs, solver=solver)
    how = how.scaled(largest)
    if method == "separable":
        how = Convergence(how.start, how.history, "closed_form", how.by_start)
    energy = elementwise_loss(weight, weights)
    return _fit(pair, shape, gauge=gauge, loss=how.history[-1], energy=energy, how=how)


def _half_step(weights: Tensor, weighted: Tensor, *, fixed: Tensor, old: Tensor, ridge_rel: float) -> Tensor:
    """Row i: argmin_z sum_j F_ij (R_ij - z . fixed_j)^2 + rho ||z - old_i||^2; `weighted` is F R."""
    terms = fixed.shape[1]
    system = torch.stack([weights @ (fixed * fixed[:, k : k + 1]) for k in range(terms)], dim=1)  # (p, r, r)
    rhs = weighted @ fixed  # (p, r)
    return proximal_solve(system, rhs[..., None], old[..., None], ridge_rel=ridge_rel)[..., 0]


def _start(name: WeightedStart, weight: Tensor, weights: Tensor, shape: KronShape, terms: int) -> Pair:
    if name == "vl":
        fit = nearest_kron(weight, shape, terms=terms)
        return fit.left.flatten(1).T, fit.right.flatten(1).T
    surrogate = separable_kron(weight, *nearest_separable(weights, shape), terms=terms)
    return surrogate.left.flatten(1).T, surrogate.right.flatten(1).T


def _check_weights(weights: Tensor, like: Tensor) -> None:
    if weights.shape != like.shape:
        raise ModelError(
            f"weights {tuple(weights.shape)} must have the shape of the matrix {tuple(like.shape)}"
        )
    if not bool((torch.isfinite(weights) & (weights >= 0)).all()):
        raise ModelError("weights must be finite and not negative; recollect the Fisher information")


def _fit(
    pair: Pair, shape: KronShape, *, gauge: Gauge, loss: float, energy: float, how: Convergence
) -> WeightedFit:
    terms = pair[0].shape[1]
    left = pair[0].T.reshape(terms, shape.m1, shape.n1)
    right = pair[1].T.reshape(terms, shape.m2, shape.n2)
    left, right = canonical_signs(*apply_gauge(left, right, gauge=gauge))
    return WeightedFit(left=left, right=right, loss=loss, energy=energy, convergence=how)
