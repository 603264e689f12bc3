"""Which of the equal ways to write a Kronecker sum is taken: size, sign and scale of each term.

(cA, B/c) is the same product for every c, but not the same training problem, and (-A, -B) is the same product
with another hash. So the size of a term is shared by a stated rule, and the sign is canonical.
"""

# r terms; A is the stack `left` (r, m1, n1), B the stack `right` (r, m2, n2)

import torch
from torch import Tensor

from model.algebra.shapes import Gauge

TIE = 1e-9
"""Entries whose magnitudes agree to this relative precision count as equally large when a sign is chosen."""


def apply_gauge(left: Tensor, right: Tensor, *, gauge: Gauge) -> tuple[Tensor, Tensor]:
    """Share each term's size: `rms` gives A_k and B_k equal root-mean-square entries, `sqrt` equal norms.

    In `rms`, equal steps per entry (Adam) move the product equally through A and through B. The product
    stays; a term with a zero factor is left as it is.
    """
    left, right = left.double(), right.double()
    size_left = left.flatten(1).norm(dim=1)  # (r,)
    size_right = right.flatten(1).norm(dim=1)
    if gauge == "rms":
        size_left = size_left / (left[0].numel() ** 0.5)
        size_right = size_right / (right[0].numel() ** 0.5)
    usable = (size_left > 0) & (size_right > 0)
    factor = torch.where(usable, size_right / torch.where(usable, size_left, 1.0), 1.0).sqrt()
    return left * factor[:, None, None], right / factor[:, None, None]


def canonical_signs(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Flip each pair so that the entry of B_k largest in magnitude is positive; the first one on ties."""
    left, right = left.double(), right.double()
    flat = right.flatten(1)  # (r, m2*n2)
    magnitude = flat.abs()
    is_largest = magnitude >= magnitude.amax(dim=1, keepdim=True) * (1 - TIE)
    chosen = flat.gather(1, is_largest.to(torch.uint8).argmax(dim=1, keepdim=True))  # argmax takes the first
    sign = torch.where(chosen < 0, -1.0, 1.0).double()[:, :, None]  # (r, 1, 1)
    return left * sign, right * sign


def term_gram(left: Tensor, right: Tensor) -> Tensor:
    """Inner products of the terms, <A_k (x) B_k, A_l (x) B_l> = <A_k, A_l> <B_k, B_l>, shape (r, r)."""
    a, b = left.double().flatten(1), right.double().flatten(1)
    return (a @ a.T) * (b @ b.T)


def kron_norm(left: Tensor, right: Tensor) -> float:
    """Frobenius norm of sum_k A_k (x) B_k, without forming it."""
    return float(term_gram(left, right).sum().clamp_min(0).sqrt())


def match_norm(left: Tensor, right: Tensor, *, norm: float) -> tuple[Tensor, Tensor]:
    """Scale the whole sum to a Frobenius norm: Krony-PT's "adaptive normalisation", shared by both sides.

    It restores the variance of the weight but raises the error of a Van Loan fit from sqrt(1-q^2) to
    sqrt(2-2q), q the ratio of the norms. A sum that is zero stays zero.
    """
    now = kron_norm(left, right)
    factor = (norm / now) ** 0.5 if now > 0 else 1.0
    return left.double() * factor, right.double() * factor


def best_scales(weight: Tensor, left: Tensor, right: Tensor, *, rcond: float = 1e-10) -> Tensor:
    """Scalars s (r,) that minimise ||W - sum_k s_k A_k (x) B_k||; never worse than all ones.

    Solved as a correction of all ones in the terms' Gram matrix, with relative cut-off `rcond`, so repeated
    or zero terms do no harm.
    """
    a, b = left.double(), right.double()
    _, m1, n1 = a.shape
    _, m2, n2 = b.shape
    tensor = weight.detach().double().reshape(m1, m2, n1, n2)
    rhs = torch.einsum("rpu,rqv,pquv->r", a, b, tensor)
    gram = term_gram(a, b)
    size = gram.diagonal().clamp_min(0).sqrt()
    unit = torch.where(size > 0, 1 / torch.where(size > 0, size, 1.0), 0.0)  # terms brought to norm 1
    gap = rhs - gram.sum(dim=1)
    inverse: Tensor = torch.linalg.pinv(gram * unit[:, None] * unit, rtol=rcond, hermitian=True)
    return torch.ones_like(gap) + unit * (inverse @ (unit * gap))
