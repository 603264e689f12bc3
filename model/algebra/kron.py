"""Sums of Kronecker products: the nearest one to a weight, its exact error, and products without forming W.

The rearrangement R only moves entries and turns A (x) B into the outer product vec(A) vec(B)^T, so the
nearest sum of r Kronecker products is a rank-r truncation of R(W) (Van Loan & Pitsianis 1993), and its
squared error is the tail: the sum of the squared singular values that were cut off.
"""

# r terms; A is the stack `left` (r, m1, n1), B the stack `right` (r, m2, n2); weights are (in, out): y = x W

from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.sparse.linalg import ArpackError, eigsh
from torch import Tensor

from model.algebra.gauge import apply_gauge, canonical_signs, match_norm
from model.algebra.shapes import Gauge, KronShape, Order, check_terms
from model.config import ModelError

NEARLY_EXACT = 1e-6
"""Tail below this share of the energy: a Gram matrix cannot resolve it, the singular values are taken
instead.
"""

LANCZOS_FROM = 512
"""Rows of a Gram matrix from which a few leading vectors are found without all others ..."""

LANCZOS_SHARE = 50
"""... a few being at most one in so many."""


@dataclass(frozen=True)
class KronFit:
    """A Kronecker sum in place of a weight, and what it leaves out."""

    left: Tensor
    """A, (terms, m1, n1), float64."""
    right: Tensor
    """B, (terms, m2, n2), float64."""
    sigma: Tensor
    """All singular values of R(W), descending, (max_terms,)."""
    error: float
    """||W - K||^2, exact: the tail, or 2 tail / (1 + q) with the norm matched, q the ratio of the norms."""
    energy: float
    """||W||^2."""
    tail: float
    """Sum of the squared singular values beyond the terms."""

    @property
    def energy_kept(self) -> float:
        """Share of ||W||^2 that the terms hold, in [0, 1]; 1 for a zero weight."""
        return 1.0 - self.tail / self.energy if self.energy > 0 else 1.0

    def dense(self) -> Tensor:
        """K = sum_k A_k (x) B_k, (m, n)."""
        return kron_sum(self.left, self.right)


def check_weight(weight: Tensor, shape: KronShape) -> None:
    """Raise ModelError unless `weight` is a finite (rows, cols) matrix of this factor shape."""
    if tuple(weight.shape) != (shape.rows, shape.cols):
        raise ModelError(
            f"factor shape {shape} is for a {shape.rows}x{shape.cols} weight, got {tuple(weight.shape)}; "
            "the transposed weight takes the transposed shape"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ModelError(f"weight {tuple(weight.shape)} holds NaN or infinity; nothing can be fitted to it")


def rearrange(weight: Tensor, shape: KronShape) -> Tensor:
    """R(W), (m1*n1, m2*n2): row (i1, j1), column (i2, j2). Keeps the dtype."""
    blocks = weight.reshape(shape.m1, shape.m2, shape.n1, shape.n2)
    return blocks.permute(0, 2, 1, 3).reshape(shape.m1 * shape.n1, shape.m2 * shape.n2)


def unrearrange(matrix: Tensor, shape: KronShape) -> Tensor:
    """The inverse of `rearrange`: (m1*n1, m2*n2) -> (m, n). Keeps the dtype."""
    blocks = matrix.reshape(shape.m1, shape.n1, shape.m2, shape.n2)
    return blocks.permute(0, 2, 1, 3).reshape(shape.rows, shape.cols)


def shape_of(left: Tensor, right: Tensor) -> KronShape:
    """The factor shape of the stacks (r, m1, n1) and (r, m2, n2)."""
    return KronShape(left.shape[1], left.shape[2], right.shape[1], right.shape[2])


def kron_sum(left: Tensor, right: Tensor) -> Tensor:
    """sum_k A_k (x) B_k as a dense (m, n) matrix, one matrix product. Differentiable, keeps the dtype."""
    return unrearrange(left.flatten(1).T @ right.flatten(1), shape_of(left, right))


def kron_apply(x: Tensor, left: Tensor, right: Tensor, *, order: Order) -> Tensor:
    """x times sum_k A_k (x) B_k without forming it: (..., m) -> (..., n). Differentiable, keeps the dtype.

    `shape.macs()` says what each order costs; the wrong one can cost more than the dense product.
    """
    x = x.reshape(*x.shape[:-1], left.shape[1], right.shape[1])  # (..., m1, m2)
    if order == "b_first":
        x = torch.einsum("...pq,rqv->...rpv", x, right)  # (..., r, m1, n2)
        return torch.einsum("...rpv,rpu->...uv", x, left).flatten(-2)  # (..., n)
    x = torch.einsum("...pq,rpu->...ruq", x, left)  # (..., r, n1, m2)
    return torch.einsum("...ruq,rqv->...uv", x, right).flatten(-2)  # (..., n)


def nearest_kron(
    weight: Tensor,
    shape: KronShape,
    *,
    terms: int,
    gauge: Gauge = "rms",
    norm: Literal["none", "frobenius"] = "none",
) -> KronFit:
    """The nearest sum of `terms` Kronecker products in the Frobenius norm (Van Loan & Pitsianis 1993).

    Deterministic, exact at `max_terms`. Eigenvectors of the small side of R(W) give one factor, a product
    with R(W) the other, so nothing is divided by a singular value. Raises ModelError for a weight or a number
    of terms that does not fit.
    """
    check_weight(weight, shape)
    check_terms(shape, terms)
    matrix = rearrange(weight.detach().double(), shape)
    a, b, sigma = leading_pairs(matrix, terms)
    left, right = a.T.reshape(terms, shape.m1, shape.n1), b.T.reshape(terms, shape.m2, shape.n2)
    energy, tail = float(matrix.square().sum()), float(sigma[terms:].square().sum())
    error = tail
    if norm == "frobenius":
        left, right = match_norm(left, right, norm=energy**0.5)
        kept = max(0.0, energy - tail)
        error = 2 * tail / (1 + (kept / energy) ** 0.5) if energy > 0 else 0.0
    left, right = canonical_signs(*apply_gauge(left, right, gauge=gauge))
    return KronFit(left=left, right=right, sigma=sigma, error=error, energy=energy, tail=tail)


def leading_pairs(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Best rank-r form a b^T of a float64 matrix (p, q): a (p, r), b (q, r), all singular values.

    From the Gram matrix of the small side; from the SVD where the fit is so good that squaring would hide it.
    The factor on the small side has orthonormal columns.
    """
    if matrix.shape[0] < matrix.shape[1]:
        b, a, sigma = leading_pairs(matrix.T, rank)
        return a, b, sigma
    values, vectors = _leading_eigenpairs(matrix.T @ matrix, rank)
    if rank < len(values) and values[rank:].sum() < NEARLY_EXACT * values.sum():
        _, sigma, right = torch.linalg.svd(matrix, full_matrices=False)
        vectors = right.T
    else:
        sigma = values.sqrt()
    return matrix @ vectors[:, :rank], vectors[:, :rank], sigma


def _leading_eigenpairs(gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """All eigenvalues of a positive semi-definite matrix, largest first, and at least `rank` eigenvectors.

    Values alone cost a third of a full decomposition; a few leading vectors of a large matrix are found by
    Lanczos, to machine precision and always from the same start.
    """
    size = len(gram)
    if size >= LANCZOS_FROM and rank * LANCZOS_SHARE <= size:
        values = torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)
        with suppress(ArpackError):  # zeros, or many equal values: the full decomposition has no trouble
            start = np.random.default_rng(0).standard_normal(size)
            _, found = eigsh(gram.numpy(), k=rank, which="LA", v0=start, tol=0)
            return values, torch.from_numpy(found[:, ::-1].copy())
    values, vectors = torch.linalg.eigh(gram)
    return values.flip(0).clamp_min(0), vectors.flip(1)


def dominant_pair(
    matrix: Tensor, start: Tensor, *, rtol: float = 1e-12, max_iter: int = 500
) -> tuple[Tensor, Tensor]:
    """Best rank-one form u v^T of a matrix (p, q) by power iteration from a right vector `start` (q,).

    Every iterate is a product with the matrix, so what the matrix and the start share survives: entries that
    are not negative (Perron), or positive semi-definite blocks. Returns u (p,) and v (q,) of equal norm.
    """
    matrix, right = matrix.double(), start.double()
    left = matrix @ right
    for _ in range(max_iter):
        previous = right
        left = matrix @ right
        right = matrix.T @ left
        if float(right.norm()) == 0:
            return torch.zeros_like(left), torch.zeros_like(right)
        left, right = left / left.norm(), right / right.norm()
        if float((right - previous).norm()) <= rtol:
            break
    size = float(left @ (matrix @ right)) ** 0.5
    return size * left, size * right
