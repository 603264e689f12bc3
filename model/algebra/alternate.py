"""Alternating least squares that cannot rise: one loop, one half-step, and a report of how it ended.

A half-step solves (H + rho I) z = rhs + rho z_old. The ridge pulls towards the previous iterate, not towards
zero, so the loss without ridge never rises, singular H included, and a stationary point stays one. The
problems are not convex: every fit is run from several starts and the lowest loss is kept, with all of them on
record.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from model.algebra.kron import kron_sum
from model.config import ModelError

Stopped = Literal["closed_form", "converged", "max_iter", "no_descent"]
"""Why a fit ended: solved at once, relative decrease below rtol, out of iterations, or at rounding level."""

Pair = tuple[Tensor, Tensor]
"""The stacks A (r, m1, n1) and B (r, m2, n2)."""

Step = Callable[[Pair], tuple[Pair, float]]
"""One iteration: the next pair and its loss."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Solver:
    """When alternating stops, and how strongly a half-step is held back."""

    max_iter: int = 50
    """Iterations per start; 0 returns the best start itself."""
    rtol: float = 1e-5
    """Stop when an iteration lowers the loss by less than this share of it."""
    ridge_rel: float = 1e-8
    """Proximal ridge relative to the mean diagonal entry of the system."""

    def __post_init__(self) -> None:
        if self.max_iter < 0 or self.rtol < 0 or self.ridge_rel < 0:
            raise ModelError(f"{self}: max_iter, rtol and ridge_rel must not be negative")


DEFAULT_SOLVER = Solver()
"""50 iterations, 1e-5 relative decrease, ridge 1e-8."""


@dataclass(frozen=True)
class Convergence:
    """How a fit came about."""

    start: str
    """Name of the start whose result is kept."""
    history: tuple[float, ...]
    """Loss at that start and after each iteration; never rises."""
    stopped: Stopped
    """Why the kept run ended."""
    by_start: tuple[tuple[str, float], ...]
    """Final loss from every start, in the order they were tried."""

    @property
    def iterations(self) -> int:
        """Iterations of the kept run."""
        return len(self.history) - 1

    def scaled(self, factor: float) -> "Convergence":
        """The same course with every loss multiplied by `factor`."""
        history = tuple(factor * value for value in self.history)
        by_start = tuple((name, factor * value) for name, value in self.by_start)
        return Convergence(self.start, history, self.stopped, by_start)


@dataclass(frozen=True)
class WeightedFit:
    """A Kronecker sum that is near a weight in another sense than the Frobenius norm."""

    left: Tensor
    """A, (terms, m1, n1), float64."""
    right: Tensor
    """B, (terms, m2, n2), float64."""
    loss: float
    """The weighted objective of the sum."""
    energy: float
    """The objective of the zero matrix."""
    convergence: Convergence
    """Which start, how many iterations, why it stopped."""

    @property
    def energy_kept(self) -> float:
        """Share of the weighted energy that is kept; 1 for a zero problem."""
        return 1.0 - self.loss / self.energy if self.energy > 0 else 1.0

    def dense(self) -> Tensor:
        """K = sum_k A_k (x) B_k, (m, n)."""
        return kron_sum(self.left, self.right)


def proximal_solve(system: Tensor, rhs: Tensor, old: Tensor, *, ridge_rel: float) -> Tensor:
    """Minimise z^T H z - 2 z^T rhs + rho ||z - old||^2 for H (..., k, k), rhs and old (..., k, c).

    rho is relative to the mean diagonal entry, the largest over a batch, so a zero H keeps the old value.
    Solved for the change, which keeps the accuracy of a start that is already good. Raises ModelError for a
    singular H that no ridge holds.
    """
    size = system.shape[-1]
    level = system.diagonal(dim1=-2, dim2=-1).sum(dim=-1).max() / size
    rho = torch.clamp(ridge_rel * level, min=torch.finfo(torch.float64).tiny)
    ridged = system.clone()
    ridged.diagonal(dim1=-2, dim2=-1).add_(rho)
    gap = rhs - system @ old
    if size == 1:
        return old + gap / ridged
    try:
        change: Tensor = torch.linalg.solve(ridged, gap)
    except torch.linalg.LinAlgError as err:  # type: ignore[attr-defined]
        raise ModelError(
            f"a half-step of size {size} is singular with ridge_rel={ridge_rel:g}; use 1e-8 or more"
        ) from err
    return old + change


def alternate(
    step: Step,
    loss: Callable[[Pair], float],
    starts: Mapping[str, Pair],
    *,
    solver: Solver,
) -> tuple[Pair, Convergence]:
    """Repeat `step` from every start and keep the pair with the lowest loss; the first one on ties.

    `step` returns the next pair and its loss, `loss` judges a start. An iterate that is not below its
    predecessor is dropped, so the history never rises.
    """
    if not starts:
        raise ModelError("alternating least squares needs at least one start")
    best: tuple[Pair, Convergence] | None = None
    by_start: list[tuple[str, float]] = []
    for name, start in starts.items():
        pair, history, stopped = _run(step, loss, start, solver=solver)
        by_start.append((name, history[-1]))
        if best is None or history[-1] < best[1].history[-1]:
            best = pair, Convergence(start=name, history=history, stopped=stopped, by_start=())
    assert best is not None
    pair, kept = best
    return pair, Convergence(kept.start, kept.history, kept.stopped, tuple(by_start))


def _run(
    step: Step, loss: Callable[[Pair], float], start: Pair, *, solver: Solver
) -> tuple[Pair, tuple[float, ...], Stopped]:
    pair, history = start, [loss(start)]
    for _ in range(solver.max_iter):
        new, now = step(pair)
        if not now < history[-1]:
            return pair, tuple(history), "no_descent"
        pair = new
        history.append(now)
        if history[-2] - now < solver.rtol * history[-2]:
            return pair, tuple(history), "converged"
    return pair, tuple(history), "max_iter"
