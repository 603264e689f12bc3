"""Orders that help a factorisation: permute an up/down pair so that a Kronecker sum fits it better.

The order of the hidden units of an MLP is free, if it is one and the same for both matrices: it folds into
the weights. Orders on the residual side cost a gather. Fit and orders are improved in turn, each step the
exact minimum of its block (Van Loan, linear assignment), so the error never rises. From the stored order this
often stops at once; the start decides, and splitting units by norm is the best one known (as TQCompressor's
idea, arXiv 2401.16367). So several starts race, and one that falls hopelessly behind is given up.

A sweep moves units, and entries of the residual side, within their levels (`regroup`); the assignment of all
of them at once for fixed factors, the dearest step, is kept for when that has stalled. The search runs in the
precision of the weights, the factors are fitted in double.
"""

# up (m, n) ~ K_u at [inputs][:, hidden], down (n, m) ~ K_d at [hidden_down][:, outputs]; K_d has the
# transposed shape · inside, both are held with a row per hidden unit, (n, m)

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from model.algebra.alternate import Convergence, Stopped
from model.algebra.kron import KronFit, check_weight, nearest_kron
from model.algebra.regroup import Grid, minimal_order, regroup_hidden
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

STALLED = 10.0
"""A cheap sweep that gains less than this many times `rtol` calls for the assignment of all units."""

FEW = 4
"""Up to so many levels of the residual side, its order is better improved level by level than all at once."""

HALVING = 0.5
"""What share of its first gain a start is trusted to gain in its second sweep."""

STORED = "identity"
"""The start that leaves everything where it is."""


@dataclass(frozen=True)
class Orders:
    """Which original row or column stands at each place; int64."""

    inputs: Tensor
    """Rows of the up-projection, (m,)."""
    hidden: Tensor
    """Its columns, (n,)."""
    hidden_down: Tensor
    """Rows of the down-projection, (n,): the same as `hidden` unless they were allowed to differ."""
    outputs: Tensor
    """Columns of the down-projection, (m,)."""

    def pick(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Both matrices in these orders."""
        return up[self.inputs][:, self.hidden], down[self.hidden_down][:, self.outputs]

    def same_as(self, other: "Orders") -> bool:
        """Whether both say the same."""
        mine = (self.inputs, self.hidden, self.hidden_down, self.outputs)
        theirs = (other.inputs, other.hidden, other.hidden_down, other.outputs)
        return all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

    def put_back(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse of `pick`: matrices in these orders, back in the original ones."""
        original_up, original_down = torch.empty_like(up), torch.empty_like(down)
        original_up[self.inputs[:, None], self.hidden] = up
        original_down[self.hidden_down[:, None], self.outputs] = down
        return original_up, original_down


@dataclass(frozen=True)
class PermutedPair:
    """Kronecker sums for an up/down pair in better orders."""

    up: KronFit
    """Fit of the up-projection in the orders."""
    down: KronFit
    """Fit of the down-projection in the orders, of the transposed shape."""
    orders: Orders
    """Where each row and column comes from."""
    loss: float
    """Sum of both squared errors."""
    convergence: Convergence
    """Which start, how many sweeps, why it stopped."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """Both replacements in the original orders."""
        return self.orders.put_back(self.up.dense(), self.down.dense())


def norm_split(norms: Tensor, *, outer: int, inner: int) -> Tensor:
    """Order in which places that share the inner index hold similar norms, (outer*inner,).

    Rank i2*outer + i1 (largest norm first, ties to the lower index) goes to place i1*inner + i2.
    """
    ranked = torch.argsort(norms, descending=True, stable=True)
    return ranked.reshape(inner, outer).T.reshape(-1)


def permuted_kron_pair(
    up: Tensor,
    down: Tensor,
    shape: KronShape,
    *,
    terms: int,
    hidden: Literal["shared", "separate"] = "shared",
    outer: bool = True,
    random_starts: int = 3,
    seed: int = 0,
    max_sweeps: int = 20,
    rtol: float = 1e-5,
    gauge: Gauge = "rms",
) -> PermutedPair:
    """Kronecker sums of `up` (m, n) and `down` (n, m) in the best orders found, shapes for `up`.

    Starts: norm split, the stored order (so never worse than `nearest_kron` on both), and random ones. They
    take their sweeps in turn; a start is given up when gains that shrink on as they did would leave it behind
    the best. An order that cannot matter, because a factor has a single row or column there, stays as
    stored and needs no gather. Deterministic in the seed. `separate` lets the hidden orders of the two
    differ, which costs one more gather.
    """
    check_weight(up, shape)
    check_weight(down, shape.transposed())
    check_terms(shape, terms)
    if min(random_starts, max_sweeps) < 0:
        raise ModelError(f"random_starts={random_starts} and max_sweeps={max_sweeps} must not be negative")
    pair = _Pair.of(up, down, shape, terms, is_shared=hidden == "shared", is_outer=outer)
    searches = [_Search(pair, name, orders) for name, orders in pair.starts(random_starts, seed).items()]
    running = searches
    for _ in range(max_sweeps):
        for search in running:
            search.sweep(rtol=rtol)
        best = min(searches, key=lambda search: search.loss)
        running = [search for search in running if not search.stopped and search.may_catch(best)]
    best = min(searches, key=lambda search: search.loss)
    stored = next(search for search in searches if search.name == STORED)
    found = pair.fit(best.orders, gauge=gauge)
    name, history, stopped = best.name, best.history[:-1], best.stopped or "max_iter"
    if best.loss > stored.history[0] - 2 * pair.resolution:  # decided by rounding
        plain = pair.fit(pair.stored, gauge=gauge)
        if plain.loss < found.loss:
            found, name, history, stopped = plain, STORED, [], "no_descent"
    by_start = tuple(
        (search.name, found.loss if search.name == name else max(search.loss, found.loss))
        for search in searches
    )
    return replace(found, convergence=Convergence(name, (*history, found.loss), stopped, by_start))


@dataclass(frozen=True)
class _Pair:
    """The problem: two matrices, one shape, and which orders matter."""

    up: Tensor
    """A row per hidden unit, (n, m)."""
    down: Tensor
    """(n, m)"""
    shape: KronShape
    terms: int
    is_shared: bool
    is_outer: bool
    resolution: float
    """What an error can change by rounding alone."""

    @classmethod
    def of(
        cls, up: Tensor, down: Tensor, shape: KronShape, terms: int, *, is_shared: bool, is_outer: bool
    ) -> "_Pair":
        """The problem for `up` (m, n) and `down` (n, m), in single precision if they are no finer."""
        dtype = torch.promote_types(torch.promote_types(up.dtype, down.dtype), torch.float32)
        units = up.detach().T.to(dtype).contiguous(), down.detach().to(dtype).contiguous()
        energy = sum(float(each.square().sum(dtype=torch.float64)) for each in units)
        resolution = 16 * torch.finfo(dtype).eps * energy
        return cls(*units, shape, terms, is_shared, is_outer, resolution)

    @property
    def outer_matters(self) -> bool:
        """Whether the orders on the residual side change the fit."""
        return self.is_outer and self.shape.m1 > 1 and self.shape.m2 > 1

    @property
    def hidden_matters(self) -> bool:
        """Whether the hidden order changes the fit."""
        return self.shape.n1 > 1 and self.shape.n2 > 1

    @property
    def stored(self) -> Orders:
        """Everything where it is."""
        m, n = (torch.arange(size, device=self.up.device) for size in (self.shape.rows, self.shape.cols))
        return Orders(m, n, n, m)

    def starts(self, random_starts: int, seed: int) -> dict[str, Orders]:
        """Norm split, the stored order, random orders; those that cannot matter as stored."""
        s, up, down = self.shape, self.up.double().square(), self.down.double().square()
        stored, hidden_norms = self.stored, (up.sum(dim=1), down.sum(dim=1))
        if self.is_shared:
            hidden_norms = (hidden_norms[0] + hidden_norms[1],) * 2
        generator = np.random.default_rng(seed)

        def outer(order: Tensor) -> Tensor:
            return order if self.outer_matters else stored.inputs

        def inner(order: Tensor) -> Tensor:
            return order if self.hidden_matters else stored.hidden

        def split(norms: Tensor, size: int, groups: int) -> Tensor:
            return norm_split(norms, outer=size, inner=groups)

        named = {
            "norm_split": Orders(
                inputs=outer(split(up.sum(dim=0), s.m1, s.m2)),
                hidden=inner(split(hidden_norms[0], s.n1, s.n2)),
                hidden_down=inner(split(hidden_norms[1], s.n1, s.n2)),
                outputs=outer(split(down.sum(dim=0), s.m1, s.m2)),
            ),
            STORED: stored,
        }
        for k in range(random_starts if self.outer_matters or self.hidden_matters else 0):
            m, n, n2, m2 = (
                torch.from_numpy(generator.permutation(size)).to(up.device)
                for size in (s.rows, s.cols, s.cols, s.rows)
            )
            named[f"random_{k}"] = Orders(outer(m), inner(n), inner(n if self.is_shared else n2), outer(m2))
        return named

    def grids(self, orders: Orders) -> tuple[Grid, Grid]:
        """Both matrices laid in these orders, and fitted."""
        shape = self.shape.transposed()
        return (
            Grid(self.up, shape, hidden=orders.hidden, outer=orders.inputs),
            Grid(self.down, shape, hidden=orders.hidden_down, outer=orders.outputs),
        )

    def fit(self, orders: Orders, *, gauge: Gauge) -> PermutedPair:
        """Van Loan in double on both matrices in these orders."""
        up, down = orders.pick(self.up.T, self.down)
        fits = (
            nearest_kron(up, self.shape, terms=self.terms, gauge=gauge),
            nearest_kron(down, self.shape.transposed(), terms=self.terms, gauge=gauge),
        )
        loss = fits[0].error + fits[1].error
        return PermutedPair(*fits, orders, loss, Convergence(STORED, (loss,), "max_iter", ()))

    def regroup(self, grids: tuple[Grid, Grid]) -> None:
        """Better orders within levels, for fixed second factors, the first ones free.

        A residual side of many levels, hence small groups, is assigned all at once for fixed factors.
        """
        if self.shape.m2 > FEW:
            self.reorder_outer(grids)
        elif self.outer_matters:
            for grid in grids:
                grid.regroup_outer()
                if self.hidden_matters and grid.is_quick:
                    grid.fit(self.terms)
        if self.hidden_matters:
            for together in [grids] if self.is_shared else [grids[:1], grids[1:]]:
                regroup_hidden(together)

    def reorder_outer(self, grids: tuple[Grid, Grid]) -> None:
        """The best orders on the residual side for fixed factors, over all permutations."""
        for grid in grids if self.outer_matters else ():
            order = minimal_order(-grid.column_products())
            grid.lay(grid.hidden, grid.outer[order])

    def reorder_hidden(self, grids: tuple[Grid, Grid]) -> None:
        """The best hidden orders for fixed factors, over all permutations."""
        if not self.hidden_matters:
            return
        products = [grid.row_products() for grid in grids]
        if self.is_shared:
            products = [products[0].add_(products[1])]
        orders = [minimal_order(each.neg_()) for each in products]
        for grid, order in zip(grids, (orders[0], orders[-1]), strict=True):
            if not torch.equal(order, torch.arange(len(order), device=order.device)):
                grid.lay(grid.hidden[order], grid.outer)


class _Search:
    """What became of one start."""

    def __init__(self, pair: _Pair, name: str, orders: Orders) -> None:
        self.pair, self.name, self.orders = pair, name, orders
        self.grids = pair.grids(orders)
        self.loss = self._fit()
        self.history = [self.loss]
        self.stopped: Stopped | None = None
        self._gain, self._shrink, self._is_stalled = 0.0, HALVING, False

    def may_catch(self, best: "_Search") -> bool:
        """Whether it would reach the best one if its gains went on to shrink as they did last."""
        ahead = self._gain * self._shrink / (1 - self._shrink) if self._shrink < 1 else self.loss
        return self is best or self.loss - ahead < best.loss

    def sweep(self, *, rtol: float) -> None:
        """Both sides within their levels; or, where that has stalled, all rows and columns at once.

        Orders that do not lower the error beyond rounding are dropped. The search ends where the assignment
        of all lowers it by less than `rtol`.
        """
        before, pair, grids = self.loss, self.pair, self.grids
        if self._is_stalled:
            pair.reorder_outer(grids)
            self._fit()
            pair.reorder_hidden(grids)
        else:
            pair.regroup(grids)
        new = Orders(grids[0].outer, grids[0].hidden, grids[1].hidden, grids[1].outer)
        if not new.same_as(self.orders):
            loss = self._fit()
            if loss < before - pair.resolution:
                self.orders, self.loss = new, loss
                self.history.append(loss)
            else:
                self.grids = pair.grids(self.orders)
                self._fit()
        gain = before - self.loss
        if self._gain > 0:
            self._shrink = gain / self._gain
        self._gain = gain
        if self._is_stalled and gain < rtol * before:
            self.stopped = "converged" if gain > 0 else "no_descent"
        self._is_stalled = not self._is_stalled and gain < STALLED * rtol * before

    def _fit(self) -> float:
        """The second factors anew in the present orders; returns the error."""
        return sum(grid.fit(self.pair.terms) for grid in self.grids)
