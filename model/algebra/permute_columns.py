"""The order of the columns of a tall matrix in which neighbours are most alike, from inner products alone.

A token table as A (x) b with one row b spreads every column of A over as many neighbours as b has entries.
Which columns are neighbours is a free choice that costs one index buffer. Rows take no part in it: whatever
has the same inner products of columns has the same best order, so the search runs on a small square root.
"""

# W (m, n), m possibly 50,257 · K = A (x) B with m2 = 1

from dataclasses import dataclass

import torch
from torch import Tensor

from model.algebra.alternate import Convergence
from model.algebra.kron import KronFit, nearest_kron
from model.algebra.permute import permuted_kron_pair
from model.algebra.psd import psd_roots
from model.algebra.shapes import Gauge, KronShape
from model.config import ModelError


@dataclass(frozen=True)
class PermutedColumns:
    """A fit of a matrix with its columns in another order."""

    fit: KronFit
    """Fit of W[:, order]."""
    order: Tensor
    """The original column at each place, (n,), int64."""
    searches: tuple[Convergence, ...]
    """How each search went; the errors are those of its own, smaller problem."""


def column_order(
    weight: Tensor, groups: int, *, random_starts: int = 3, seed: int = 0, max_sweeps: int = 20, rtol: float
) -> tuple[Tensor, Convergence]:
    """The order p (n,) in which W[:, p] is nearest to a product (m x groups)(1 x n/groups), as far as found.

    Starts and steps are those of `permute.permuted_kron_pair`, the stored order among them.
    """
    cols = weight.shape[1]
    if groups < 1 or cols % groups:
        raise ModelError(f"{cols} columns cannot form {groups} groups of equal size")
    weight = weight.detach().double()
    root = psd_roots(weight.T @ weight).root  # (n, n), with the inner products of W's columns
    found = permuted_kron_pair(
        root,
        torch.zeros_like(root),
        KronShape(cols, groups, 1, cols // groups),
        terms=1,
        outer=False,
        random_starts=random_starts,
        seed=seed,
        max_sweeps=max_sweeps,
        rtol=rtol,
    )
    return found.orders.hidden, found.convergence


def halved_columns(
    weight: Tensor,
    *,
    times: int,
    groups: Tensor | None = None,
    random_starts: int = 3,
    seed: int = 0,
    max_sweeps: int = 20,
    rtol: float = 1e-5,
    gauge: Gauge = "rms",
) -> PermutedColumns:
    """W[:, order] as (m x n/2^times)(1 x 2^times), the order found by halving the inner table repeatedly.

    W[:, p] ~ E (x) (1 x 2), then E[:, p'] ~ E' (x) (1 x 2), and so on (TQCompressor's embedding). At the end
    the exact best product in the composed order is taken, which is never worse than the nested one. `groups`
    (n/w, w) are columns of a W that is such a product already: they stay together, the product is halved.
    """
    matrix = weight.detach().double()
    order = torch.arange(matrix.shape[1], device=weight.device)[:, None] if groups is None else groups
    rows, (inner, wide) = matrix.shape[0], order.shape
    if times < 1 or inner % 2**times:
        raise ModelError(f"{inner} columns cannot be halved {times} times")
    outer = KronShape(rows, inner, 1, wide)
    table = matrix if wide == 1 else nearest_kron(matrix[:, order.reshape(-1)], outer, terms=1).left[0]
    searches: list[Convergence] = []
    for _ in range(times):
        half = table.shape[1] // 2
        found, how = column_order(
            table, half, random_starts=random_starts, seed=seed, max_sweeps=max_sweeps, rtol=rtol
        )
        searches.append(how)
        # column j of the table stands for the columns order[j] of W; two of them become one
        order = order[found].reshape(half, -1)
        shape = KronShape(rows, half, 1, 2)
        table = nearest_kron(table[:, found], shape, terms=1).left[0]
    places = order.reshape(-1)
    shape = KronShape(rows, order.shape[0], 1, order.shape[1])
    fit = nearest_kron(matrix[:, places], shape, terms=1, gauge=gauge)
    return PermutedColumns(fit, places, tuple(searches))
