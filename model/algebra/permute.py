"""Orders that help a factorisation: permute an up/down pair so that a Kronecker sum fits it better.

The order of the hidden units of an MLP is free, if it is one and the same for both matrices: it folds into
the weights. Orders on the residual side cost a gather. Fit and orders are improved in turn, each step the
exact minimum of its block (Van Loan, linear assignment), so the error never rises. From the stored order this
often stops at once; the start decides, and splitting units by norm is the best one known (as TQCompressor's
idea, arXiv 2401.16367). So several starts race, and one that falls hopelessly behind is given up.

What a sum of products costs against every unit is computed through its factors, and the assignment of all
units at once, the dearest step, is kept for when the cheaper ones have stalled.
"""

# up (m, n) ~ K_u at [inputs][:, hidden], down (n, m) ~ K_d at [hidden_down][:, outputs]; K_d has the
# transposed shape · inside, both are held with a row per hidden unit, (n, m)

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from model.algebra.alternate import Convergence, Stopped
from model.algebra.kron import KronFit, check_weight, kron_apply, kron_sum, nearest_kron, shape_of
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

STALLED = 10.0
"""A cheap sweep that gains less than this many times `rtol` calls for the assignment of all units."""


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


def minimal_order(cost: Tensor) -> Tensor:
    """The order p (k,) with the least sum_i cost[i, p[i]], for a cost (k, k)."""
    columns = linear_sum_assignment(cost.detach().cpu().numpy())[1]
    return torch.from_numpy(np.asarray(columns, dtype=np.int64)).to(cost.device)


def norm_split(norms: Tensor, *, outer: int, inner: int) -> Tensor:
    """Order in which places that share the inner index hold similar norms, (outer*inner,).

    Rank i2*outer + i1 (largest norm first, ties to the lower index) goes to place i1*inner + i2.
    """
    ranked = torch.argsort(norms, descending=True, stable=True)
    return ranked.reshape(inner, outer).T.reshape(-1)


def align_levels(hidden: Tensor, sides: Sequence[tuple[Tensor, Tensor]], *, groups: int) -> Tensor:
    """Regroup hidden units, level by level, with the second factors fixed and the first ones free to follow.

    A place is (group, level). `sides` are the matrices with units as rows, (n, m1*m2), and their second
    factors (r, m2, n2), orthonormal. With A free the energy that a fit holds is sum_g ||sum_c z_c(unit at (g,
    c))||^2, z_c a linear image of the unit, so the units of one level are an exact assignment. Fixing A
    instead ties every unit to the group that it helped to shape.
    """
    places = hidden.reshape(groups, -1).clone()  # (groups, n2)
    levels = places.shape[1]
    laid = [units[places].reshape(groups, levels, -1, right.shape[1]) for units, right in sides]
    images = [  # z_c of the unit at (g, c), (n2, groups, m1, r) per side
        torch.einsum("kac,gcia->cgik", right, rows) for rows, (_, right) in zip(laid, sides, strict=True)
    ]
    sums = [image.sum(dim=0) for image in images]
    for level in range(levels if levels > 2 else 1):  # of two levels, one is enough: only pairs matter
        rests = [total - image[level] for total, image in zip(sums, images, strict=True)]
        likeness = torch.zeros(groups, groups, dtype=torch.float64, device=hidden.device)
        for rest, image, rows, (_, right) in zip(rests, images, laid, sides, strict=True):
            if len(right) <= right.shape[1]:
                likeness += rest.flatten(1) @ image[level].flatten(1).T
            else:  # fewer entries in a unit than in its image
                likeness += (rest @ right[:, :, level]).flatten(1) @ rows[:, level].flatten(1).T
        order = minimal_order(-likeness)
        places[:, level] = places[order, level]
        sums = [rest + image[level][order] for rest, image in zip(rests, images, strict=True)]
    return places.reshape(-1)


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
    take their sweeps in turn; a start is given up when one more sweep as good as its last would leave it
    behind the best. An order that cannot matter, because a factor has a single row or column there, stays as
    stored and needs no gather. Deterministic in the seed. `separate` lets the hidden orders of the two
    differ, which costs one more gather.
    """
    check_weight(up, shape)
    check_weight(down, shape.transposed())
    check_terms(shape, terms)
    if min(random_starts, max_sweeps) < 0:
        raise ModelError(f"random_starts={random_starts} and max_sweeps={max_sweeps} must not be negative")
    by_unit = up.detach().double().T.contiguous()  # a row per hidden unit, where it is read from most
    pair = _Pair(by_unit.T, down.detach().double(), shape, terms, gauge, hidden == "shared", outer)
    searches = [_Search(pair, name, orders) for name, orders in pair.starts(random_starts, seed).items()]
    running = searches
    for _ in range(max_sweeps):
        for search in running:
            search.sweep(rtol=rtol)
        best = min(searches, key=lambda search: search.loss)
        running = [search for search in running if not search.stopped and search.may_catch(best)]
    best = min(searches, key=lambda search: search.loss)
    how = Convergence(
        best.name,
        tuple(best.history),
        best.stopped or "max_iter",
        tuple((search.name, search.loss) for search in searches),
    )
    turned = replace(best.fits.up, left=best.fits.up.left.mT, right=best.fits.up.right.mT)
    return PermutedPair(turned, best.fits.down, best.orders, best.loss, how)


@dataclass(frozen=True)
class _Pair:
    """The problem: two matrices, one shape, and which orders matter."""

    up: Tensor
    """(m, n)"""
    down: Tensor
    """(n, m)"""
    shape: KronShape
    terms: int
    gauge: Gauge
    is_shared: bool
    is_outer: bool

    @property
    def outer_matters(self) -> bool:
        """Whether the orders on the residual side change the fit."""
        return self.is_outer and self.shape.m1 > 1 and self.shape.m2 > 1

    @property
    def hidden_matters(self) -> bool:
        """Whether the hidden order changes the fit."""
        return self.shape.n1 > 1 and self.shape.n2 > 1

    def starts(self, random_starts: int, seed: int) -> dict[str, Orders]:
        """Norm split, the stored order, random orders; those that cannot matter as stored."""
        s, rows, cols = self.shape, self.up.square(), self.down.square()
        stored_m, stored_n = torch.arange(s.rows), torch.arange(s.cols)
        hidden_norms = rows.sum(dim=0), cols.sum(dim=1)
        if self.is_shared:
            hidden_norms = (hidden_norms[0] + hidden_norms[1],) * 2
        generator = np.random.default_rng(seed)

        def outer(order: Tensor) -> Tensor:
            return order if self.outer_matters else stored_m

        def inner(order: Tensor) -> Tensor:
            return order if self.hidden_matters else stored_n

        def split(norms: Tensor, size: int, groups: int) -> Tensor:
            return norm_split(norms, outer=size, inner=groups)

        named = {
            "norm_split": Orders(
                inputs=outer(split(rows.sum(dim=1), s.m1, s.m2)),
                hidden=inner(split(hidden_norms[0], s.n1, s.n2)),
                hidden_down=inner(split(hidden_norms[1], s.n1, s.n2)),
                outputs=outer(split(cols.sum(dim=0), s.m1, s.m2)),
            ),
            "identity": Orders(stored_m, stored_n, stored_n, stored_m),
        }
        for k in range(random_starts if self.outer_matters or self.hidden_matters else 0):
            m, n, n2, m2 = (
                torch.from_numpy(generator.permutation(size)) for size in (s.rows, s.cols, s.cols, s.rows)
            )
            named[f"random_{k}"] = Orders(outer(m), inner(n), inner(n if self.is_shared else n2), outer(m2))
        return named

    def fit(self, orders: Orders) -> "_Fits":
        """Van Loan on both matrices in these orders."""
        up, down = self.up.T[orders.hidden], self.down[orders.hidden_down]
        if self.outer_matters:
            up, down = up[:, orders.inputs], down[:, orders.outputs]
        fits = (
            nearest_kron(rows, self.shape.transposed(), terms=self.terms, gauge=self.gauge)
            for rows in (up, down)
        )
        return _Fits(*fits)

    def reorder_outer(self, orders: Orders, fits: "_Fits") -> Orders:
        """The best orders on the residual side for fixed factors."""
        if not self.outer_matters:
            return orders
        inputs = _best_rows(_products(self.up.T[orders.hidden].T, fits.up.left, fits.up.right))
        outputs = _best_rows(_products(self.down[orders.hidden_down].T, fits.down.left, fits.down.right))
        return replace(orders, inputs=inputs, outputs=outputs)

    def reorder_hidden(self, orders: Orders, fits: "_Fits") -> Orders:
        """The best hidden orders for fixed factors, over all permutations at once."""
        if not self.hidden_matters:
            return orders
        up = _products(self.up.T[:, orders.inputs], fits.up.left.mT, fits.up.right.mT)
        down = _products(self.down[:, orders.outputs], fits.down.left.mT, fits.down.right.mT)
        if self.is_shared:
            hidden = _best_rows(up.add_(down))
            return replace(orders, hidden=hidden, hidden_down=hidden)
        return replace(orders, hidden=_best_rows(up), hidden_down=_best_rows(down))

    def regroup(self, orders: Orders, fits: "_Fits") -> Orders:
        """Better hidden orders within their levels, for fixed second factors, the first ones free."""
        if not self.hidden_matters:
            return orders
        up = self.up.T[:, orders.inputs], _orthonormal(fits.up.right.mT)
        down = self.down[:, orders.outputs], _orthonormal(fits.down.right.mT)
        if self.is_shared:
            hidden = align_levels(orders.hidden, (up, down), groups=self.shape.n1)
            return replace(orders, hidden=hidden, hidden_down=hidden)
        return replace(
            orders,
            hidden=align_levels(orders.hidden, (up,), groups=self.shape.n1),
            hidden_down=align_levels(orders.hidden_down, (down,), groups=self.shape.n1),
        )


class _Fits(NamedTuple):
    """Fits of both matrices in their orders, a row per hidden unit (n, m)."""

    up: KronFit
    down: KronFit

    @property
    def loss(self) -> float:
        """Sum of both squared errors."""
        return self.up.error + self.down.error


class _Search:
    """What became of one start."""

    def __init__(self, pair: _Pair, name: str, orders: Orders) -> None:
        self.pair, self.name, self.orders = pair, name, orders
        self.fits = pair.fit(orders)
        self.history, self.gain = [self.loss], 0.0
        self.stopped: Stopped | None = None
        self._is_stalled = False

    @property
    def loss(self) -> float:
        """Where it stands."""
        return self.fits.loss

    def may_catch(self, best: "_Search") -> bool:
        """Whether one more sweep as good as its last would bring it to the best one."""
        return self is best or self.loss - self.gain < best.loss

    def sweep(self, *, rtol: float) -> None:
        """Residual orders and levels; or, where that has stalled, all hidden units at once.

        An order that does not lower the error is dropped. The search ends where the assignment of all units
        lowers it by less than `rtol`.
        """
        before, pair = self.loss, self.pair
        if self._is_stalled:
            new = pair.reorder_hidden(self.orders, self.fits)
        else:
            new = pair.regroup(pair.reorder_outer(self.orders, self.fits), self.fits)
        if not new.same_as(self.orders):
            fits = pair.fit(new)
            if fits.loss < before:
                self.orders, self.fits = new, fits
                self.history.append(fits.loss)
        self.gain = before - self.loss
        if self._is_stalled and self.gain < rtol * before:
            self.stopped = "converged" if self.gain > 0 else "no_descent"
        self._is_stalled = not self._is_stalled and self.gain < STALLED * rtol * before


def _products(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows (k, m) times sum_k A_k (x) B_k, through the factors where that is less work: (k, n)."""
    shape = shape_of(left, right)
    if len(left) * min(shape.macs()) < shape.rows * shape.cols:
        return kron_apply(rows, left, right, order=shape.cheaper_order)
    return rows @ kron_sum(left, right)


def _best_rows(products: Tensor) -> Tensor:
    """The order p (k,) of the largest sum_i products[p[i], i]: which row to put at each place."""
    return minimal_order(-products).argsort()


def _orthonormal(right: Tensor) -> Tensor:
    """Second factors of a Van Loan fit, which are orthogonal, brought to norm one; zero ones stay."""
    sizes = right.flatten(1).norm(dim=1)[:, None, None]
    return right / torch.where(sizes > 0, sizes, 1.0)
