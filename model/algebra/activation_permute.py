"""A free order of the hidden units, chosen for what the MLP computes: order and weighted fit together.

One order of the hidden units, the same for both matrices, folds away: no gather, no parameter. Which units
share a factor is then a choice, and it should be judged by the output error, not by the weights. Under fixed
factors the best order is a linear assignment where no metric couples the units, and a quadratic one where one
does; that is majorised around the current order by a diagonal S = tau diag(C) >= C, which is linear again.
tau starts at 1 and grows until the true loss falls; at tau = n that is certain. Factors are refitted after
every accepted order, so the history never rises, and the stored order is among the starts: never worse than
`activation_kron` on both.

With m2 = 1 the family holds the selection of n1 hidden units with a least-squares refit (`nystrom`) as the
special case B = (1, 0, ..., 0). The start `selected` begins there, so what structured pruning reaches is a
lower bound.
"""

# up (m, n) ~ K_u at [:, hidden], metric C_x (m, m) · down (n, m) ~ K_d at [hidden], metric C_h (n, n)
# a place of a hidden unit is (group, level), one of n1 groups and n2 levels

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from model.algebra.activation import activation_kron
from model.algebra.alternate import DEFAULT_SOLVER, Convergence, Pair, Solver, Stopped, WeightedFit
from model.algebra.kron import check_weight, kron_apply, kron_sum, shape_of
from model.algebra.nystrom import greedy_keep, refit
from model.algebra.permute import norm_split
from model.algebra.psd import metric_loss, psd_roots
from model.algebra.regroup import align_levels, minimal_order
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

OrderStart = Literal["norm_split", "aligned", "selected"]
"""Levels by metric norm; groups that point the same way beyond that; or levels by a greedy selection of
units.
"""


@dataclass(frozen=True)
class PermutedActivationPair:
    """Activation-weighted Kronecker sums of an up/down pair under one order of the hidden units."""

    up: WeightedFit
    """Fit of up[:, hidden] in the input metric."""
    down: WeightedFit
    """Fit of down[hidden] in the hidden metric in that order; transposed shape."""
    hidden: Tensor
    """The original unit at each place, (n,), int64."""
    loss: float
    """Weighted sum of both losses."""
    convergence: Convergence
    """Which start, how many accepted orders, why it stopped."""

    def dense(self) -> tuple[Tensor, Tensor]:
        """Both replacements in the original order of the units."""
        up, down = self.up.dense(), self.down.dense()
        original_up, original_down = torch.empty_like(up), torch.empty_like(down)
        original_up[:, self.hidden], original_down[self.hidden] = up, down
        return original_up, original_down


def permuted_activation_kron_pair(
    up: Tensor,
    down: Tensor,
    input_metric: Tensor,
    hidden_metric: Tensor,
    shape: KronShape,
    *,
    terms: int,
    unit_metric: Tensor | None = None,
    weights: tuple[float, float] | None = None,
    starts: Sequence[OrderStart] = ("norm_split", "aligned", "selected"),
    max_sweeps: int = 10,
    refit_iter: int = 3,
    solver: Solver = DEFAULT_SOLVER,
    gauge: Gauge = "rms",
) -> PermutedActivationPair:
    """Kronecker sums of `up` (m, n) and `down` (n, m) with low output error, in the best hidden order found.

    `weights` say what the two losses are worth; by default each counts relative to its energy. `unit_metric`
    (n, n) is an output metric of `up`: what an error of the pre-activations costs; it needs m2 = 1 or m1 = 1.
    The stored order is always tried as well. A sweep is one new order and `refit_iter` iterations of both
    fits. The starts take theirs in turn; one is given up when all the sweeps that are left, as good as its
    last, would leave it behind the best. Raises ModelError for matrices or metrics that do not fit the shape.
    """
    check_terms(shape, terms)
    if max_sweeps < 0 or refit_iter < 1:
        raise ModelError(f"max_sweeps={max_sweeps} must not be negative, refit_iter={refit_iter} at least 1")
    sides = (
        _Side.of(up, shape, input_metric, unit_metric),
        _Side.of(down, shape.transposed(), None, hidden_metric),
    )
    if weights is not None:
        sides = replace(sides[0], share=weights[0]), replace(sides[1], share=weights[1])
    problem = _Problem(*sides, terms, solver, replace(solver, max_iter=refit_iter), gauge)
    searches = [_Search(problem, name, start) for name, start in problem.starts(starts).items()]
    running = searches if min(shape.n1, shape.n2) > 1 else []
    for left in reversed(range(max_sweeps)):
        for search in running:
            search.sweep()
        best = min(searches, key=lambda search: search.loss)
        running = [search for search in running if not search.stopped and search.may_catch(best, left=left)]
    best = min(searches, key=lambda search: search.loss)
    by_start = tuple((search.name, search.loss) for search in searches)
    how = Convergence(best.name, tuple(best.history), best.stopped or "max_iter", by_start)
    return PermutedActivationPair(best.up, best.down, best.hidden, best.loss, how)


def first_order_unit_metric(down: Tensor, gate_gram: Tensor) -> Tensor:
    """(K_d K_d^T) * E[g^T g], (n, n): what small errors of the pre-activations cost in the output.

    `down` (n, m) is the matrix that follows, in its replaced form; g (n,) the derivative of the nonlinearity
    at the pre-activations. An error e of x K_u changes the output by (e * g) K_d, and this is the mean of its
    square when e does not depend on g. Positive semi-definite, as an elementwise product of such matrices.
    """
    down = down.detach().double()
    return (down @ down.T) * gate_gram.double()


class _Start(NamedTuple):
    """An order, and factors to go on from in it beside the usual ones."""

    hidden: Tensor
    up: Pair | None = None
    down: Pair | None = None


@dataclass(frozen=True)
class _Side:
    """One of the two matrices: how it is fitted in an order, and what a change of order costs."""

    weight: Tensor
    shape: KronShape
    residual: Tensor | None  # metric of the residual side: C_x of the up-projection
    root: Tensor | None  # its root
    coupling: Tensor | None  # metric over the hidden units: C_h of the down-projection
    units: Tensor  # one row per hidden unit, (n, m), the root of the residual metric taken in
    share: float

    @classmethod
    def of(
        cls, weight: Tensor, shape: KronShape, residual: Tensor | None, coupling: Tensor | None
    ) -> "_Side":
        """A side whose loss counts relative to its energy; with a residual metric it is the up-projection."""
        check_weight(weight, shape)
        weight = weight.detach().double()
        width, count = weight.shape if residual is not None else weight.shape[::-1]
        residual, coupling = _checked(residual, width), _checked(coupling, count)
        root = None if residual is None else psd_roots(residual).root
        units = weight if root is None else (root @ weight).T
        energy = metric_loss(units, input_metric=coupling)
        return cls(weight, shape, residual, root, coupling, units, 1 / energy if energy > 0 else 1.0)

    def fit(
        self, hidden: Tensor, warm: Pair | None, problem: "_Problem", *, from_scratch: bool
    ) -> WeightedFit:
        """The activation-weighted fit in an order: the usual starts and `warm`, or a few steps from it."""
        coupling = None if self.coupling is None else self.coupling[hidden][:, hidden]
        if self.residual is not None:
            weight, metric, output = self.weight[:, hidden], self.residual, coupling
        else:
            assert coupling is not None
            weight, metric, output = self.weight[hidden], coupling, None
        return activation_kron(
            weight,
            metric,
            self.shape,
            terms=problem.terms,
            output_metric=output,
            starts=("vl", "kron_gram") if from_scratch else (),
            warm=warm,
            solver=problem.solver if from_scratch else problem.refit,
            gauge=problem.gauge,
        )

    def view(self, fit: WeightedFit) -> Pair:
        """The fit as one row per place, like `units`, in factors; of one that are dense where it has none."""
        if self.root is None:
            return fit.left, fit.right
        if self.shape.m2 == 1:
            return (self.root @ fit.left).mT, fit.right.mT
        return (self.root @ fit.dense()).T[None], self.root.new_ones(1, 1, 1)

    def affinity(self) -> Tensor:
        """Inner products of the scaled units, (n, n)."""
        scaled = self.scaled()
        return scaled @ scaled.T

    def scaled(self) -> Tensor:
        """The units with the share and the diagonal of the coupling taken in, (n, m)."""
        size = torch.full_like(self.units[:, 0], self.share)
        if self.coupling is not None:
            size = size * self.coupling.diagonal().clamp_min(0)
        return size.sqrt()[:, None] * self.units


def _checked(metric: Tensor | None, size: int) -> Tensor | None:
    if metric is None:
        return None
    if tuple(metric.shape) != (size, size) or not bool(torch.isfinite(metric).all()):
        raise ModelError(f"metric {tuple(metric.shape)}: need a finite {size}x{size} matrix")
    metric = metric.detach().double()
    return (metric + metric.T) / 2


@dataclass(frozen=True)
class _Move:
    """What new places cost one side while its factors stay: exact to evaluate, majorised to minimise."""

    units: Tensor
    fitted: Tensor
    coupling: Tensor | None
    share: float
    before: float
    fixed: Tensor  # cost[i, j] of giving the unit at place j the row i of the fit, (n, n)
    curve: Tensor | None  # what tau multiplies

    @classmethod
    def of(cls, side: _Side, hidden: Tensor, fit: WeightedFit) -> "_Move":
        """Linearise the loss of a side around an order."""
        units, (left, right) = side.units[hidden], side.view(fit)
        fitted = kron_sum(left, right)
        coupling = None if side.coupling is None else side.coupling[hidden][:, hidden]
        rest = units - fitted
        pull = rest if coupling is None else coupling @ rest
        fixed = _products(pull, left.mT, right.mT).T.mul(-2 * side.share)
        likeness = _products(fitted, left.mT, right.mT)
        curve = likeness.mul_(-2).add_(fitted.square().sum(dim=1)[:, None]).mul_(side.share)
        before = side.share * float((rest * pull).sum())
        if coupling is None:  # nothing couples the units: the expansion is exact as it stands
            return cls(units, fitted, None, side.share, before, fixed + curve, None)
        curve = curve * coupling.diagonal().clamp_min(0)
        return cls(units, fitted, coupling, side.share, before, fixed, curve)

    def after(self, order: Tensor) -> float:
        """The loss of this side when place i holds the unit that is now at place order[i]."""
        rest = torch.empty_like(self.units)
        rest[order] = self.units[order] - self.fitted
        return self.share * metric_loss(rest, input_metric=self.coupling)


@dataclass(frozen=True)
class _Problem:
    """Both sides and how they are solved."""

    up: _Side
    down: _Side
    terms: int
    solver: Solver
    refit: Solver
    gauge: Gauge

    def starts(self, names: Sequence[OrderStart]) -> dict[str, _Start]:
        """The stored order and the named ones, where the order matters at all."""
        groups, levels = self.up.shape.n1, self.up.shape.n2
        starts = {"identity": _Start(torch.arange(groups * levels, device=self.up.weight.device))}
        if groups == 1 or levels == 1 or not names:
            return starts
        affinity = self.up.affinity() + self.down.affinity()
        split = norm_split(affinity.diagonal(), outer=groups, inner=levels).reshape(groups, levels)
        for name in names:
            if name == "norm_split":
                starts[name] = _Start(split.reshape(-1))
            elif name == "aligned":
                starts[name] = _Start(_align(affinity, split))
            else:
                starts[name] = self.selected(affinity)
        return starts

    def selected(self, affinity: Tensor) -> _Start:
        """Levels from a greedy selection; for m2 = 1 also the factors of that selection with its refit.

        As many units as the terms hold: with more terms than levels that is all of them.
        """
        shape, metric = self.up.shape, self.down.coupling
        assert metric is not None
        keep = greedy_keep(metric, self.down.weight, min(self.terms, shape.n2) * shape.n1)
        others = torch.ones(shape.cols, dtype=torch.bool, device=keep.device)
        others[keep] = False
        rest = torch.nonzero(others).flatten()
        rest = rest[torch.argsort(affinity.diagonal()[rest], descending=True, stable=True)]
        hidden = _align(affinity, torch.cat([keep, rest]).reshape(shape.n2, shape.n1).T)
        if shape.m2 > 1:
            return _Start(hidden)
        keep = hidden.reshape(shape.n1, shape.n2)[:, : self.terms].T.reshape(-1)  # (terms * n1,)
        pick = torch.eye(shape.n2, dtype=torch.float64, device=keep.device)[: self.terms]
        new = refit(metric, keep, self.down.weight).reshape(self.terms, shape.n1, shape.m1)
        kept = self.up.weight[:, keep].reshape(shape.m1, self.terms, shape.n1).permute(1, 0, 2)
        return _Start(hidden, (kept, pick[:, None, :]), (new, pick[:, :, None]))

    def total(self, up: WeightedFit, down: WeightedFit) -> float:
        """The weighted sum of both losses."""
        return self.up.share * up.loss + self.down.share * down.loss

    def regrouped(self, hidden: Tensor, up: WeightedFit, down: WeightedFit) -> Tensor:
        """A proposal: regroup level by level, the couplings as their diagonals; its worth shows later."""
        sides = (self.up.scaled(), _unit_terms(up.right)), (self.down.scaled(), _unit_terms(down.right.mT))
        return align_levels(hidden, sides, groups=self.up.shape.n1)

    def better_order(
        self, hidden: Tensor, up: WeightedFit, down: WeightedFit, *, tau: float
    ) -> tuple[Tensor, float] | None:
        """An order that lowers the loss at fixed factors, and its tau; None if none is proposed."""
        moves = _Move.of(self.up, hidden, up), _Move.of(self.down, hidden, down)
        fixed = moves[0].fixed + moves[1].fixed
        curve = torch.stack([move.curve for move in moves if move.curve is not None]).sum(dim=0)
        before = sum(move.before for move in moves)
        places = torch.arange(len(hidden), device=hidden.device)
        while True:
            order = minimal_order(fixed + tau * curve)
            if torch.equal(order, places):
                return None
            if sum(move.after(order) for move in moves) < before:
                return hidden[order], tau
            if tau > len(hidden):  # descent is certain here; what is left is rounding
                return None
            tau *= 4


class _Search:
    """What became of one start."""

    def __init__(self, problem: _Problem, name: str, start: _Start) -> None:
        self.problem, self.name, self.hidden = problem, name, start.hidden
        self.up = problem.up.fit(start.hidden, start.up, problem, from_scratch=True)
        self.down = problem.down.fit(start.hidden, start.down, problem, from_scratch=True)
        self.history = [problem.total(self.up, self.down)]
        self.stopped: Stopped | None = None
        self._tau = 1.0

    @property
    def loss(self) -> float:
        """Where it stands."""
        return self.history[-1]

    def may_catch(self, best: "_Search", *, left: int) -> bool:
        """Whether as many sweeps as are left, each as good as its last, would bring it to the best one."""
        return self is best or self.loss - left * (self.history[-2] - self.loss) < best.loss

    def sweep(self) -> None:
        """A new order and a refit from the factors of the old one; it ends where that gains nothing more."""
        problem, up, down = self.problem, self.up, self.down
        found = problem.better_order(self.hidden, up, down, tau=self._tau)
        if found is not None:
            hidden, self._tau = found
        else:
            hidden = problem.regrouped(self.hidden, up, down)
        up = problem.up.fit(hidden, (up.left, up.right), problem, from_scratch=False)
        down = problem.down.fit(hidden, (down.left, down.right), problem, from_scratch=False)
        now, before = problem.total(up, down), self.loss
        if not now < before:
            self.stopped = "no_descent"
            return
        self.hidden, self.up, self.down = hidden, up, down
        self.history.append(now)
        if before - now < problem.solver.rtol * before:
            self.stopped = "converged"


def _products(rows: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Rows (k, m) times sum_k A_k (x) B_k, through the factors where that is less work: (k, n)."""
    shape = shape_of(left, right)
    if len(left) * min(shape.macs()) < shape.rows * shape.cols:
        return kron_apply(rows, left, right, order=shape.cheaper_order)
    return rows @ kron_sum(left, right)


def _align(affinity: Tensor, split: Tensor) -> Tensor:
    """Keep the levels of `split` (groups, levels); give every group the units most like those it has."""
    chosen = split[:, :1]
    for level in split.T[1:]:
        likeness = torch.stack([affinity[members][:, level] for members in chosen.T]).sum(dim=0)
        chosen = torch.cat([chosen, level[minimal_order(-likeness)][:, None]], dim=1)
    return chosen.reshape(-1)


def _unit_terms(right: Tensor) -> Tensor:
    """An orthonormal basis of the span of the second factors, (r, a, b)."""
    basis: Tensor = torch.linalg.qr(right.flatten(1).T).Q
    return basis.T.reshape(right.shape)
