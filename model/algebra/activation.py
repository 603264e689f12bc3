"""Kronecker sums under an input metric: min tr((W-K)^T C (W-K)), the output error of a layer.

Where C = C1 (x) C2, which is every C when m1 = 1 or m2 = 1, there is a closed form. Otherwise all A_k are
solved at once with B fixed, then all B_k with A fixed: each is a small exact system, because R(C) is
contracted with products of the fixed factors and nothing of the size of the weight squared is ever built.
"""

# r terms · A (r, m1, n1), B (r, m2, n2) · C (m, m), m = m1*m2 · R(C) (m1*m1, m2*m2) · G = G1 (x) G2 (n, n)

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    NEARLY_EXACT,
    check_weight,
    dominant_pair,
    kron_apply,
    kron_sum,
    nearest_kron,
    rearrange,
)
from model.algebra.psd import check_metric, metric_loss, psd_roots
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

ActivationStart = Literal["vl", "kron_gram"]
"""Where an activation-weighted fit starts: the unweighted optimum, or the closed form under the nearest C1
(x) C2.
"""


def nearest_kron_psd(metric: Tensor, m1: int, m2: int) -> tuple[Tensor, Tensor]:
    """Positive semi-definite C1 (m1, m1), C2 (m2, m2) with C1 (x) C2 nearest to the metric (m, m)."""
    matrix = rearrange(metric.detach().double(), KronShape(m1, m1, m2, m2))
    start = torch.eye(m2, dtype=torch.float64, device=matrix.device).reshape(-1)
    first, second = (
        side.reshape(size, size) for side, size in zip(dominant_pair(matrix, start), (m1, m2), strict=True)
    )
    return (first + first.T) / 2, (second + second.T) / 2


def separable_metric_kron(
    weight: Tensor, first: Tensor, second: Tensor, shape: KronShape, *, terms: int, gauge: Gauge = "rms"
) -> WeightedFit:
    """The exact optimum for C = C1 (x) C2, C1 (m1, m1) and C2 (m2, m2); the loss is the tail.

    Only the metric of the small side of R(W) needs a (pseudo-inverse) root; for m2 = 1 or m1 = 1 usually
    none.
    """
    check_weight(weight, shape)
    check_terms(shape, terms)
    blocks = weight.detach().double().reshape(shape.m1, shape.m2, shape.n1, shape.n2)
    if shape.m1 * shape.n1 >= shape.m2 * shape.n2:
        left, right, sigma = _separable_pair(blocks, first.double(), second.double(), terms)
    else:  # exchange the roles of the two factors
        right, left, sigma = _separable_pair(
            blocks.permute(1, 0, 3, 2), second.double(), first.double(), terms
        )
    energy, loss = float(sigma.square().sum()), float(sigma[terms:].square().sum())
    if loss < NEARLY_EXACT * energy:  # below what squared singular values resolve
        rest = blocks - kron_sum(left, right).reshape(blocks.shape)
        weighted = torch.einsum("ab,jbuv->jauv", second.double(), rest)
        loss = max(0.0, float((rest * torch.tensordot(first.double(), weighted, dims=1)).sum()))
    how = Convergence("closed_form", (loss,), "closed_form", (("closed_form", loss),))
    left, right = canonical_signs(*apply_gauge(left, right, gauge=gauge))
    return WeightedFit(left=left, right=right, loss=loss, energy=energy, convergence=how)


def separable_metric_values(weight: Tensor, first: Tensor, second: Tensor, shape: KronShape) -> Tensor:
    """Singular values of R((C1 (x) C2)^1/2 W), descending: squared, what each term is worth in C1 (x) C2."""
    check_weight(weight, shape)
    blocks = weight.detach().double().reshape(shape.m1, shape.m2, shape.n1, shape.n2)
    if shape.m1 * shape.n1 >= shape.m2 * shape.n2:
        return _separable_pair(blocks, first.double(), second.double(), 1)[2]
    return _separable_pair(blocks.permute(1, 0, 3, 2), second.double(), first.double(), 1)[2]


def _separable_pair(blocks: Tensor, big: Tensor, small: Tensor, terms: int) -> tuple[Tensor, Tensor, Tensor]:
    """Projection form on blocks (m1, m2, n1, n2) with the second factor on the small side of R(W)."""
    _, m2, _, n2 = blocks.shape
    roots = psd_roots(small)
    target = torch.einsum("ab,pbuv->puav", roots.root, blocks)  # (m1, n1, m2, n2) = R(C2^1/2 W)
    weighted = torch.tensordot(big, target, dims=1)
    matrix = target.reshape(-1, m2 * n2)
    values, vectors = torch.linalg.eigh(matrix.T @ weighted.reshape(matrix.shape))
    vectors = vectors.flip(1)[:, :terms].T  # (r, m2*n2)
    left = (matrix @ vectors.T).T.reshape(terms, target.shape[0], target.shape[1])
    right = roots.inverse @ vectors.reshape(terms, m2, n2)
    return left, right, values.flip(0).clamp_min(0).sqrt()


def activation_kron(
    weight: Tensor,
    metric: Tensor,
    shape: KronShape,
    *,
    terms: int,
    output_metric: tuple[Tensor, Tensor] | Tensor | None = None,
    starts: Sequence[ActivationStart] = ("vl", "kron_gram"),
    warm: Pair | None = None,
    solver: Solver = DEFAULT_SOLVER,
    gauge: Gauge = "rms",
) -> WeightedFit:
    """A Kronecker sum of low output error in the metric C (m, m), the best over all starts and `warm`.

    Take the covariance for C and correct the bias afterwards. For m1 = 1 or m2 = 1 the result is the global
    optimum. `output_metric` minimises tr(G D^T C D) instead: a pair (G1, G2) stands for G1 (x) G2, whose root
    is absorbed; any G (n, n) is solved if a side of the shape is 1, because the metric of that side is a
    Kronecker product as it is. Raises ModelError for a metric of another shape, with NaN, with a negative
    diagonal, or that cannot be absorbed.
    """
    check_weight(weight, shape)
    check_terms(shape, terms)
    check_metric(metric, shape.rows)
    if isinstance(output_metric, Tensor):
        check_metric(output_metric, shape.cols)
        if min(shape.n1, shape.n2) > 1:
            return _fit_transposed(
                weight,
                metric,
                shape,
                output_metric,
                terms=terms,
                starts=starts,
                warm=warm,
                solver=solver,
                gauge=gauge,
            )
        output_metric = _as_pair(output_metric, is_first=shape.n2 == 1)
    if output_metric is not None:
        first, second = (psd_roots(side) for side in output_metric)
        fit = activation_kron(
            kron_apply(weight.detach().double(), first.root[None], second.root[None], order="b_first"),
            metric,
            shape,
            terms=terms,
            starts=starts,
            warm=None if warm is None else (warm[0].double() @ first.root, warm[1].double() @ second.root),
            solver=solver,
        )
        left, right = fit.left @ first.inverse, fit.right @ second.inverse
        left, right = canonical_signs(*apply_gauge(left, right, gauge=gauge))
        return replace(fit, left=left, right=right)
    if min(shape.m1, shape.m2) == 1:
        sides = _as_pair(metric, is_first=shape.m2 == 1)
        return separable_metric_kron(weight, *sides, shape, terms=terms, gauge=gauge)
    problem = ActivationProblem.of(weight, metric, shape)
    pairs = {str(name): problem.start(name, terms) for name in starts}
    if warm is not None:
        pairs["warm"] = warm[0].double(), warm[1].double()
    (left, right), how = alternate(
        lambda pair: problem.step(pair, ridge_rel=solver.ridge_rel), problem.loss, pairs, solver=solver
    )
    left, right = canonical_signs(*apply_gauge(left, right, gauge=gauge))
    return WeightedFit(left=left, right=right, loss=how.history[-1], energy=problem.energy, convergence=how)


def _fit_transposed(
    weight: Tensor,
    metric: Tensor,
    shape: KronShape,
    output_metric: Tensor,
    *,
    terms: int,
    starts: Sequence[ActivationStart],
    warm: Pair | None,
    solver: Solver,
    gauge: Gauge,
) -> WeightedFit:
    """Any output metric, m1 = 1 or m2 = 1: turn the weight, and C is an output metric that is absorbed."""
    if min(shape.m1, shape.m2) > 1:
        raise ModelError(
            f"an output metric that is no Kronecker product needs a factor with a side of 1, not {shape}"
        )
    fit = activation_kron(
        weight.T,
        output_metric,
        shape.transposed(),
        terms=terms,
        output_metric=_as_pair(metric, is_first=shape.m2 == 1),
        starts=starts,
        warm=None if warm is None else (warm[0].mT, warm[1].mT),
        solver=solver,
    )
    left, right = canonical_signs(*apply_gauge(fit.left.mT, fit.right.mT, gauge=gauge))
    return replace(fit, left=left, right=right)


def _as_pair(metric: Tensor, *, is_first: bool) -> tuple[Tensor, Tensor]:
    one = torch.ones(1, 1, dtype=torch.float64, device=metric.device)
    return (metric, one) if is_first else (one, metric)


@dataclass(frozen=True)
class ActivationProblem:
    """One weight and one metric, arranged so that a half-step is two contractions and one solve."""

    weight: Tensor
    """W, (m, n), float64."""
    metric: Tensor
    """C, (m, m), float64."""
    shape: KronShape
    """Factor shape."""
    metric_rearranged: Tensor
    """R(C), (m1*m1, m2*m2)."""
    target: Tensor
    """R(C W), (m1*n1, m2*n2)."""
    energy: float
    """tr(W^T C W)."""

    @classmethod
    def of(cls, weight: Tensor, metric: Tensor, shape: KronShape) -> "ActivationProblem":
        """Arrange W (m, n) and C (m, m) for half-steps."""
        weight, metric = weight.detach().double(), metric.detach().double()
        metric = (metric + metric.T) / 2
        weighted = metric @ weight
        return cls(
            weight=weight,
            metric=metric,
            shape=shape,
            metric_rearranged=rearrange(metric, KronShape(shape.m1, shape.m1, shape.m2, shape.m2)),
            target=rearrange(weighted, shape),
            energy=float((weight * weighted).sum()),
        )

    def start(self, name: ActivationStart, terms: int) -> Pair:
        """The factors of a named start."""
        if name == "vl":
            near = nearest_kron(self.weight, self.shape, terms=terms)
            return near.left, near.right
        nearest = nearest_kron_psd(self.metric, self.shape.m1, self.shape.m2)
        closed = separable_metric_kron(self.weight, *nearest, self.shape, terms=terms)
        return closed.left, closed.right

    def loss(self, pair: Pair) -> float:
        """tr((W-K)^T C (W-K)), evaluated directly."""
        return metric_loss(self.weight - kron_sum(*pair), input_metric=self.metric)

    def step(self, pair: Pair, *, ridge_rel: float) -> tuple[Pair, float]:
        """The best A for this B, then the best B for that A, and the loss there."""
        left, right = pair
        left = self.best_left(left, right, ridge_rel=ridge_rel)
        system, rhs = self._right_system(left)
        flat = right.reshape(rhs.shape)
        flat = proximal_solve(system, rhs, flat, ridge_rel=ridge_rel)
        right = flat.reshape(right.shape)
        loss = self.energy - float((flat * (2 * rhs - system @ flat)).sum())
        if loss < NEARLY_EXACT * self.energy:  # a difference of nearly equal numbers
            loss = self.loss((left, right))
        return (left, right), loss

    def best_left(self, left: Tensor, right: Tensor, *, ridge_rel: float) -> Tensor:
        """All A_k that minimise the loss with B fixed, (r, m1, n1): one system of size r*m1."""
        r, m1, m2 = len(right), self.shape.m1, self.shape.m2
        products = torch.einsum("kac,lbc->abkl", right, right).reshape(m2 * m2, r * r)
        system = (self.metric_rearranged @ products).reshape(m1, m1, r, r).permute(2, 0, 3, 1)
        rhs = (right.flatten(1) @ self.target.T).reshape(r * m1, self.shape.n1)
        flat = proximal_solve(
            system.reshape(r * m1, r * m1), rhs, left.reshape(rhs.shape), ridge_rel=ridge_rel
        )
        return flat.reshape(left.shape)

    def best_right(self, left: Tensor, right: Tensor, *, ridge_rel: float) -> Tensor:
        """All B_k that minimise the loss with A fixed, (r, m2, n2): one system of size r*m2."""
        system, rhs = self._right_system(left)
        flat = proximal_solve(system, rhs, right.reshape(rhs.shape), ridge_rel=ridge_rel)
        return flat.reshape(right.shape)

    def _right_system(self, left: Tensor) -> tuple[Tensor, Tensor]:
        r, m1, m2 = len(left), self.shape.m1, self.shape.m2
        products = torch.einsum("kij,lhj->klih", left, left).reshape(r * r, m1 * m1)
        system = (products @ self.metric_rearranged).reshape(r, r, m2, m2).permute(0, 2, 1, 3)
        rhs = (left.flatten(1) @ self.target).reshape(r * m2, self.shape.n2)
        return system.reshape(r * m2, r * m2), rhs
