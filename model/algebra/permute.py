"""Orders that help a factorisation: permute an up/down pair so that a Kronecker sum fits it better.

The order of the hidden units of an MLP is free, if it is one and the same for both matrices: it folds into
the weights. Orders on the residual side cost a gather. Fit and orders are improved in turn, each step the
exact minimum of its block (Van Loan, linear assignment), so the error never rises. From the stored order this
often stops at once; the start decides, and splitting units by norm is the best one known (as TQCompressor's
idea, arXiv 2401.16367).
"""

# up (m, n) ~ K_u at [inputs][:, hidden], down (n, m) ~ K_d at [hidden_down][:, outputs]; K_d has the
# transposed shape

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from model.algebra.alternate import Convergence, Stopped
from model.algebra.kron import KronFit, check_weight, nearest_kron
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError


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


def best_order(fitted: Tensor, rows: Tensor) -> Tensor:
    """The order p (k,) of least sum_i ||fitted_i - rows_p[i]||^2, both (k, c): a linear assignment, exact."""
    return minimal_order(-(fitted.double() @ rows.double().T))


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
    images = []  # z_c of the unit at (g, c), (n2, groups, r*m1) per side
    for units, right in sides:
        rows = units[places].reshape(*places.shape, -1, right.shape[1])  # (groups, n2, m1, m2)
        images.append(torch.einsum("kac,gcia->cgki", right, rows).flatten(2))
    sums = [image.sum(dim=0) for image in images]
    for level in range(places.shape[1]):
        rests = [total - image[level] for total, image in zip(sums, images, strict=True)]
        likeness = [rest @ image[level].T for rest, image in zip(rests, images, strict=True)]
        order = minimal_order(-torch.stack(likeness).sum(dim=0))
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

    Starts: norm split, the stored order (so never worse than `nearest_kron` on both), and random ones. An
    order that cannot matter, because a factor has a single row or column there, stays as stored and needs no
    gather. Deterministic in the seed. `separate` lets the hidden orders of the two differ, which costs one
    more gather.
    """
    check_weight(up, shape)
    check_weight(down, shape.transposed())
    check_terms(shape, terms)
    if min(random_starts, max_sweeps) < 0:
        raise ModelError(f"random_starts={random_starts} and max_sweeps={max_sweeps} must not be negative")
    pair = _Pair(up.detach().double(), down.detach().double(), shape, terms, gauge, hidden == "shared", outer)
    best: PermutedPair | None = None
    by_start: list[tuple[str, float]] = []
    for name, orders in pair.starts(random_starts, seed).items():
        found = pair.improve(name, orders, max_sweeps=max_sweeps, rtol=rtol)
        by_start.append((name, found.loss))
        if best is None or found.loss < best.loss:
            best = found
    assert best is not None
    how = best.convergence
    how = Convergence(how.start, how.history, how.stopped, tuple(by_start))
    return PermutedPair(best.up, best.down, best.orders, best.loss, how)


@dataclass(frozen=True)
class _Pair:
    """The problem: two matrices, one shape, and which orders matter."""

    up: Tensor
    down: Tensor
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

    def fit(self, orders: Orders) -> tuple[KronFit, KronFit]:
        """Van Loan on both matrices in these orders."""
        up, down = orders.pick(self.up, self.down)
        return (
            nearest_kron(up, self.shape, terms=self.terms, gauge=self.gauge),
            nearest_kron(down, self.shape.transposed(), terms=self.terms, gauge=self.gauge),
        )

    def reorder(self, orders: Orders, up: Tensor, down: Tensor) -> Orders:
        """Best orders for fixed replacements up (m, n) and down (n, m), block by block."""
        inputs, hidden, hidden_down = orders.inputs, orders.hidden, orders.hidden_down
        outputs = orders.outputs
        if self.outer_matters:
            inputs = best_order(up, self.up[:, hidden])
        if self.hidden_matters:
            cost_up, cost_down = -(up.T @ self.up[inputs]), -(down @ self.down[:, outputs].T)
            if self.is_shared:
                hidden = hidden_down = minimal_order(cost_up + cost_down)
            else:
                hidden, hidden_down = minimal_order(cost_up), minimal_order(cost_down)
        if self.outer_matters:
            outputs = best_order(down.T, self.down[hidden_down].T)
        return Orders(inputs, hidden, hidden_down, outputs)

    def regroup(self, orders: Orders, up: KronFit, down: KronFit) -> Orders:
        """Better hidden orders for fixed second factors, the first ones free."""
        if not self.hidden_matters:
            return orders
        side_up = self.up[orders.inputs].T, _orthonormal(up.right)
        side_down = self.down[:, orders.outputs], _orthonormal(down.right.mT)
        if self.is_shared:
            hidden = align_levels(orders.hidden, (side_up, side_down), groups=self.shape.n1)
            return replace(orders, hidden=hidden, hidden_down=hidden)
        return replace(
            orders,
            hidden=align_levels(orders.hidden, (side_up,), groups=self.shape.n1),
            hidden_down=align_levels(orders.hidden_down, (side_down,), groups=self.shape.n1),
        )

    def improve(self, name: str, orders: Orders, *, max_sweeps: int, rtol: float) -> PermutedPair:
        """Alternate from one start; an iterate that does not lower the error is dropped."""
        up, down = self.fit(orders)
        history = [up.error + down.error]
        stopped: Stopped = "max_iter"
        for _ in range(max_sweeps):
            new = self.reorder(orders, up.dense(), down.dense())
            new = self.regroup(new, *self.fit(new))
            if new.same_as(orders):
                stopped = "converged"
                break
            new_up, new_down = self.fit(new)
            now = new_up.error + new_down.error
            if not now < history[-1]:
                stopped = "no_descent"
                break
            orders, up, down = new, new_up, new_down
            history.append(now)
            if history[-2] - now < rtol * history[-2]:
                stopped = "converged"
                break
        how = Convergence(name, tuple(history), stopped, ())
        return PermutedPair(up, down, orders, history[-1], how)


def _orthonormal(right: Tensor) -> Tensor:
    """Second factors of a Van Loan fit, which are orthogonal, brought to norm one; zero ones stay."""
    sizes = right.flatten(1).norm(dim=1)[:, None, None]
    return right / torch.where(sizes > 0, sizes, 1.0)
