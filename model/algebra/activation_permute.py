"""A free order of the hidden units, chosen for what the MLP computes: order and weighted fit together.

One order of the hidden units, the same for both matrices, folds away: no gather, no parameter. Which units
share a factor is then a choice, and it should be judged by the output error, not by the weights. For the
up-projection, whose metric acts on the inputs, the best order under fixed factors is a linear assignment. For
the down-projection the metric couples the units, which is a quadratic assignment: it is majorised around the
current order by S - C >= 0, S diagonal, which is linear again. S starts at the variances, tau = 1, and grows
until the true loss falls; at tau = n that is certain. Factors are refitted after every accepted order, so the
history never rises, and the stored order is among the starts, so the pair is never worse than
`activation_kron` on each of them.
"""

# up (m, n) ~ K_u at [:, hidden], metric C_x (m, m) · down (n, m) ~ K_d at [hidden], metric C_h (n, n), shape
# transposed

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from model.algebra.activation import activation_kron
from model.algebra.alternate import DEFAULT_SOLVER, Convergence, Solver, Stopped, WeightedFit
from model.algebra.kron import check_weight
from model.algebra.permute import minimal_order, norm_split
from model.algebra.psd import metric_loss
from model.algebra.shapes import Gauge, KronShape, check_terms
from model.config import ModelError

OrderStart = Literal["norm_split", "aligned"]
"""Units that share an inner index have similar metric norms; or, beyond that, units of a group point the same
way.
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
    """weight_up * up.loss + weight_down * down.loss."""
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
    weights: tuple[float, float] | None = None,
    starts: Sequence[OrderStart] = ("norm_split", "aligned"),
    max_sweeps: int = 10,
    refit_iter: int = 3,
    solver: Solver = DEFAULT_SOLVER,
    gauge: Gauge = "rms",
) -> PermutedActivationPair:
    """Kronecker sums of `up` (m, n) and `down` (n, m) with low output error, in the best hidden order found.

    `weights` say what the two losses are worth; by default each counts relative to its energy. The stored
    order is always tried as well. A sweep is one new order and `refit_iter` iterations of both fits, which go
    on from where they are. Raises ModelError for matrices or metrics that do not fit the shape.
    """
    check_weight(up, shape)
    check_weight(down, shape.transposed())
    check_terms(shape, terms)
    if max_sweeps < 0 or refit_iter < 1:
        raise ModelError(f"max_sweeps={max_sweeps} must not be negative, refit_iter={refit_iter} at least 1")
    problem = _Problem(
        up=up.detach().double(),
        down=down.detach().double(),
        input_metric=_symmetric(input_metric, shape.rows),
        hidden_metric=_symmetric(hidden_metric, shape.cols),
        shape=shape,
        terms=terms,
        weights=(1.0, 1.0),
        solver=solver,
        refit=replace(solver, max_iter=refit_iter),
        gauge=gauge,
    )
    problem = replace(problem, weights=weights if weights is not None else problem.relative_weights())
    best: PermutedActivationPair | None = None
    by_start: list[tuple[str, float]] = []
    for name, hidden in problem.starts(starts).items():
        found = problem.improve(name, hidden, max_sweeps=max_sweeps)
        by_start.append((name, found.loss))
        if best is None or found.loss < best.loss:
            best = found
    assert best is not None
    return replace(best, convergence=replace(best.convergence, by_start=tuple(by_start)))


def _symmetric(metric: Tensor, size: int) -> Tensor:
    if tuple(metric.shape) != (size, size) or not bool(torch.isfinite(metric).all()):
        raise ModelError(f"metric {tuple(metric.shape)}: need a finite {size}x{size} matrix")
    metric = metric.detach().double()
    return (metric + metric.T) / 2


@dataclass(frozen=True)
class _Problem:
    """Two matrices, their metrics, and how they are fitted."""

    up: Tensor
    down: Tensor
    input_metric: Tensor
    hidden_metric: Tensor
    shape: KronShape
    terms: int
    weights: tuple[float, float]
    solver: Solver
    refit: Solver
    gauge: Gauge

    def relative_weights(self) -> tuple[float, float]:
        """Each loss counts as a share of its energy."""
        energies = (
            metric_loss(self.up, input_metric=self.input_metric),
            metric_loss(self.down, input_metric=self.hidden_metric),
        )
        up, down = (1.0 / energy if energy > 0 else 1.0 for energy in energies)
        return up, down

    def affinity(self) -> Tensor:
        """Inner products of the units in the metrics, (n, n), the hidden metric taken as its diagonal."""
        spread = self.hidden_metric.diagonal().clamp_min(0).sqrt()[:, None] * self.down
        up, down = self.weights
        return up * (self.up.T @ (self.input_metric @ self.up)) + down * (spread @ spread.T)

    def starts(self, names: Sequence[OrderStart]) -> dict[str, Tensor]:
        """The stored order and the named ones, where the order matters at all."""
        groups, size = self.shape.n1, self.shape.n2
        orders = {"identity": torch.arange(self.shape.cols, device=self.up.device)}
        if groups == 1 or size == 1 or not names:
            return orders
        affinity = self.affinity()
        split = norm_split(affinity.diagonal(), outer=groups, inner=size)
        for name in names:
            orders[name] = split if name == "norm_split" else _align(affinity, split.reshape(groups, size))
        return orders

    def fit(
        self, hidden: Tensor, warm: tuple[WeightedFit, WeightedFit] | None = None
    ) -> tuple[WeightedFit, WeightedFit]:
        """Both fits in an order; from scratch, or a few iterations on from `warm`."""
        up_warm, down_warm = (None, None) if warm is None else ((f.left, f.right) for f in warm)
        up = activation_kron(
            self.up[:, hidden],
            self.input_metric,
            self.shape,
            terms=self.terms,
            starts=("vl", "kron_gram") if warm is None else (),
            warm=up_warm,
            solver=self.solver if warm is None else self.refit,
            gauge=self.gauge,
        )
        down = activation_kron(
            self.down[hidden],
            self.hidden_metric[hidden][:, hidden],
            self.shape.transposed(),
            terms=self.terms,
            starts=("vl", "kron_gram") if warm is None else (),
            warm=down_warm,
            solver=self.solver if warm is None else self.refit,
            gauge=self.gauge,
        )
        return up, down

    def total(self, up: float, down: float) -> float:
        """The weighted sum of two losses."""
        return self.weights[0] * up + self.weights[1] * down

    def improve(self, name: str, hidden: Tensor, *, max_sweeps: int) -> PermutedActivationPair:
        """Alternate order and refit from one start."""
        up, down = self.fit(hidden)
        history, tau = [self.total(up.loss, down.loss)], 1.0
        stopped: Stopped = "max_iter"
        matters = self.shape.n1 > 1 and self.shape.n2 > 1
        for _ in range(max_sweeps if matters else 0):
            found = self.better_order(hidden, up, down, tau=tau)
            if found is None:
                stopped = "converged"
                break
            new_hidden, tau = found
            new_up, new_down = self.fit(new_hidden, warm=(up, down))
            now = self.total(new_up.loss, new_down.loss)
            if not now < history[-1]:
                stopped = "no_descent"
                break
            hidden, up, down = new_hidden, new_up, new_down
            history.append(now)
            if history[-2] - now < self.solver.rtol * history[-2]:
                stopped = "converged"
                break
        how = Convergence(name, tuple(history), stopped, ())
        return PermutedActivationPair(up, down, hidden, history[-1], how)

    def better_order(
        self, hidden: Tensor, up: WeightedFit, down: WeightedFit, *, tau: float
    ) -> tuple[Tensor, float] | None:
        """An order that lowers the loss at fixed factors, and its tau; None if none is proposed."""
        fitted_up, fitted = up.dense(), down.dense()
        linear = (
            -2 * fitted_up.T @ (self.input_metric @ self.up[:, hidden])
        )  # (n, n): place i, unit at place j
        metric = self.hidden_metric[hidden][:, hidden]
        rest = self.down[hidden] - fitted
        pull, spread = metric @ rest, metric.diagonal().clamp_min(0)
        inner, sizes = fitted @ fitted.T, fitted.square().sum(dim=1)
        base = self.weights[0] * linear - 2 * self.weights[1] * (fitted @ pull.T)
        curve = self.weights[1] * spread * (sizes[:, None] - 2 * inner)
        before_up = self.weights[0] * float(linear.diagonal().sum())
        before_down = self.weights[1] * float((rest * pull).sum())
        places = torch.arange(len(hidden), device=hidden.device)
        while True:
            order = minimal_order(base + tau * curve)
            if torch.equal(order, places):
                return None
            moved = rest.clone()
            moved[order] = self.down[hidden][order] - fitted
            after_down = self.weights[1] * metric_loss(moved, input_metric=metric)
            after_up = self.weights[0] * float(linear[places, order].sum())
            if after_up + after_down < before_up + before_down:
                return hidden[order], tau
            if tau > len(hidden):  # descent is certain here; what is left is rounding
                return None
            tau *= 4


def _align(affinity: Tensor, split: Tensor) -> Tensor:
    """Within each norm level of `split` (groups, size), give every group the unit most like those it has."""
    groups = [split[:, 0]]
    for level in split.T[1:]:
        likeness = torch.stack([affinity[members][:, level] for members in groups]).sum(dim=0)
        groups.append(level[minimal_order(-likeness)])
    return torch.stack(groups, dim=1).reshape(-1)
