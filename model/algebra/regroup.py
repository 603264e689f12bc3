"""Two free orders of one matrix, improved level by level with the first factors of a Kronecker sum free.

A row per hidden unit is held as (groups, levels) and a row's entries as (depth, width), so that A is (groups
x width) and B (levels x depth). The energy that a sum with given B holds, its A free to follow, is the sum of
||P z||^2 over the vectors z (levels * depth) at every group and width, P the projector on the span of the B.
So which units of one level go to which group is an exact assignment, and so are the entries of one depth.
Fixing A instead ties every unit to the group that it helped to shape. What this cannot do, move a unit to
another level, an assignment for fixed factors does.
"""

# G groups · L levels · Q depth · M width; a matrix (n, m) has n = G*L rows and m = Q*M columns; r terms

from collections.abc import Sequence

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from model.algebra.kron import leading_pairs
from model.algebra.shapes import KronShape


def minimal_order(cost: Tensor) -> Tensor:
    """The order p (k,) with the least sum_i cost[i, p[i]], for a cost (k, k)."""
    columns = linear_sum_assignment(cost.detach().cpu().numpy())[1]
    return torch.from_numpy(np.asarray(columns, dtype=np.int64)).to(cost.device)


class Grid:
    """One matrix in its present orders, and the span of the second factors that fit it; it changes in place.

    Everything is computed in the precision of the matrix, Gram matrices are summed in double.
    """

    def __init__(
        self, units: Tensor, shape: KronShape, *, hidden: Tensor, outer: Tensor, basis: Tensor | None = None
    ) -> None:
        """`units` (n, m) of factor shape (G x M)(L x Q), rows in the order `hidden`, columns in `outer`.

        `basis` (r, L, Q) are orthonormal second factors; without them, `fit` comes first.
        """
        self.shape, self.units = shape, units
        self.basis = units.new_zeros(1, shape.m2, shape.n2) if basis is None else basis.to(units.dtype)
        self.lay(hidden, outer)

    def lay(self, hidden: Tensor, outer: Tensor) -> None:
        """Other orders, (n,) and (m,): the original row and column at every place of a product."""
        s = self.shape
        self._hidden = hidden.reshape(s.m1, s.m2).clone()  # (G, L)
        self._outer = outer.reshape(s.n1, s.n2).T.contiguous()  # (Q, M)
        rows = self.units.index_select(0, hidden)
        if not torch.equal(self._outer.reshape(-1), torch.arange(s.cols, device=outer.device)):
            rows = rows.index_select(1, self._outer.reshape(-1))
        self.rows = rows.reshape(s.m1, s.m2, s.n2, s.n1)  # (G, L, Q, M)
        self._take(self.basis)

    @property
    def hidden(self) -> Tensor:
        """The original row at each place, (n,)."""
        return self._hidden.reshape(-1).clone()

    @property
    def outer(self) -> Tensor:
        """The original column at each place, (m,)."""
        return self._outer.T.reshape(-1).clone()

    @property
    def is_quick(self) -> bool:
        """Whether a fit costs next to nothing: one Gram matrix per group is no larger than the matrix."""
        return self.shape.m2 * self.shape.n2 <= self.shape.n1

    def fit(self, terms: int) -> float:
        """Take the second factors of the nearest sum in these orders; returns what that leaves out."""
        s, flat = self.shape, self.rows.flatten(1, 2)  # (G, LQ, M)
        if s.m2 * s.n2 > s.m1 * s.n1:
            _, right, sigma = leading_pairs(flat.mT.reshape(s.m1 * s.n1, -1).double(), terms)
            sizes = right.norm(dim=0)
            vectors, squares = right / torch.where(sizes > 0, sizes, 1.0), sigma.square()
        else:
            if self.is_quick:
                gram = (flat @ flat.mT).sum(dim=0, dtype=torch.float64)
            else:
                lines = flat.transpose(0, 1).flatten(1).double()  # (LQ, GM)
                gram = lines @ lines.T
            values, vectors = torch.linalg.eigh(gram)
            vectors, squares = vectors.flip(1)[:, :terms], values.flip(0).clamp_min(0)
        self._take(vectors.T.reshape(terms, s.m2, s.n2).to(flat.dtype).contiguous())
        return float(squares[terms:].sum())

    def _take(self, basis: Tensor) -> None:
        self.basis = basis
        self._sums = basis.flatten(1) @ self.rows.flatten(1, 2)  # z on the basis, (G, r, M)

    def level(self, level: int) -> "Level":
        """What every unit of a level would be worth in every group."""
        units, basis = self.rows[:, level], self.basis[:, level]  # (G, Q, M), (r, Q)
        image = basis @ units
        rest = self._sums - image  # (G, r, M)
        if len(basis) <= self.shape.n2:
            return Level(rest, image, rest.flatten(1) @ image.flatten(1).T)
        # fewer entries in a unit than in its image
        return Level(rest, image, (basis.T @ rest).flatten(1) @ units.flatten(1).T)

    def regroup(self, level: int, order: Tensor, found: "Level") -> None:
        """Give group g the unit of this level that group order[g] had."""
        self.rows[:, level] = self.rows[order, level]
        self._hidden[:, level] = self._hidden[order, level]
        self._sums = found.rest + found.image[order]

    def regroup_outer(self) -> None:
        """The same for the entries of every depth, each among its own."""
        s = self.shape
        for depth in _in_turn(s.n2):
            columns, basis = self.rows[:, :, depth], self.basis[:, :, depth]  # (G, L, M), (r, L)
            image = basis @ columns
            rest = self._sums - image
            if len(basis) <= s.m2:
                worth = rest.flatten(0, 1).T @ image.flatten(0, 1)
            else:
                worth = (basis.T @ rest).flatten(0, 1).T @ columns.flatten(0, 1)
            order = minimal_order(-worth)
            self.rows[:, :, depth] = columns[:, :, order]
            self._outer[depth] = self._outer[depth, order]
            self._sums = rest + image[:, :, order]

    def row_products(self) -> Tensor:
        """Inner products of the row that the fit has at every place with every row as they lie, (n, n)."""
        s, rows = self.shape, self.rows.reshape(self.shape.rows, -1)
        if s.n2 == 1 and len(self.basis) < s.m2:  # all levels of a group are multiples of few rows
            near = self._sums.flatten(0, 1) @ rows.T  # (G*r, n)
            return (self.basis[:, :, 0].T @ near.reshape(s.m1, -1, s.rows)).flatten(0, 1)
        return self._fitted() @ rows.T

    def column_products(self) -> Tensor:
        """The same for columns, in the order of `outer`: (m, m)."""
        s = self.shape
        fitted, columns = (
            each.reshape(s.rows, s.n2, s.n1).mT.reshape(s.rows, -1) for each in (self._fitted(), self.rows)
        )
        return fitted.T @ columns

    def _fitted(self) -> Tensor:
        """The nearest sum on this basis, (n, m), laid like `rows`."""
        return (self.basis.flatten(1).T @ self._sums).reshape(self.shape.rows, -1)


class Level:
    """One level of a grid taken out: the sums without it, its images, and its worth (groups, units)."""

    def __init__(self, rest: Tensor, image: Tensor, worth: Tensor) -> None:
        self.rest, self.image, self.worth = rest, image, worth


def regroup_hidden(grids: Sequence[Grid]) -> None:
    """Better orders of the hidden units within their levels, one and the same for all these grids."""
    for level in _in_turn(grids[0].shape.m2):
        found = [grid.level(level) for grid in grids]
        order = minimal_order(-torch.stack([each.worth for each in found]).sum(dim=0))
        for grid, each in zip(grids, found, strict=True):
            grid.regroup(level, order, each)


def align_levels(hidden: Tensor, sides: Sequence[tuple[Tensor, Tensor]], *, groups: int) -> Tensor:
    """Regroup hidden units (n,), level by level, with the second factors fixed and the first ones free.

    `sides` are the matrices with units as rows, (n, m1*m2), and their second factors (r, m2, n2),
    orthonormal.
    """
    grids: list[Grid] = []
    for units, right in sides:
        _, depth, levels = right.shape
        shape = KronShape(groups, units.shape[1] // depth, levels, depth)
        stored = torch.arange(units.shape[1], device=units.device)
        grids.append(Grid(units, shape, hidden=hidden, outer=stored, basis=right.mT))
    regroup_hidden(grids)
    return grids[0].hidden


def _in_turn(count: int) -> range:
    """Of two levels one is enough: only which are paired matters."""
    return range(count if count > 2 else 1)
