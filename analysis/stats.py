"""Statistics of comparisons: paired differences, intervals, and what may be called a difference.

All models see the same windows, documents or passages ("units"), so two models are compared unit by unit;
the bootstrap resamples units, and seeds first where there are several (Miller 2024, arXiv 2411.00640). Pure
functions of arrays, each with its generator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK = 500  # resamples held in memory at once


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with a percentile interval and the two-sided p-value of "no difference"."""

    estimate: float
    low: float
    high: float
    p_value: float
    level: float = 0.95

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def resampled_means(
    values: Floats, weights: Floats, *, rng: np.random.Generator, resamples: int = RESAMPLES
) -> Floats:
    """Σ values / Σ weights of each model, over the same resampled units: (M, U), (U,) -> (M, resamples).

    The difference of two rows is the paired bootstrap of their difference. `weights` are scored tokens, or
    ones for a mean of window means.
    """
    _same_units([values], weights)
    draws = np.empty((len(values), resamples))
    for begin in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - begin)
        units = _counts(rng, len(weights), rows)  # (R, U) how often each unit was drawn
        draws[:, begin : begin + rows] = (units @ values.T).T / (units @ weights)
    return draws


def interval(estimate: float, draws: Floats, *, level: float = 0.95) -> Interval:
    """Percentile interval of bootstrap `draws` (resamples,) and the p-value of zero."""
    low, high = np.quantile(draws, [(1 - level) / 2, (1 + level) / 2])
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return Interval(estimate, float(low), float(high), min(1.0, 2 * (tail + 1) / (len(draws) + 1)), level)


def seeded_difference(
    first: Floats,
    second: Floats,
    weights: Floats,
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Difference of two arms of several seeds: resample the seeds of each arm, then the units both share.

    first (S, U), second (S', U), weights (U,).
    """
    arms = ((1.0, first), (-1.0, second))
    _same_units([first, second], weights)
    draws = np.zeros(resamples)
    for begin in range(0, resamples, _CHUNK):
        rows = min(_CHUNK, resamples - begin)
        units = _counts(rng, len(weights), rows)
        for sign, arm in arms:
            seeds = _counts(rng, len(arm), rows) / len(arm)  # (R, S)
            draws[begin : begin + rows] += sign * np.einsum("rs,rs->r", seeds, units @ arm.T)
        draws[begin : begin + rows] /= units @ weights
    estimate = sum(sign * float(arm.mean(0).sum()) for sign, arm in arms) / float(weights.sum())
    return interval(estimate, draws, level=level)


def _same_units(arms: Sequence[Floats], weights: Floats) -> None:
    if len(weights) == 0 or any(arm.ndim != 2 or arm.shape[1] != len(weights) for arm in arms):
        shapes = ", ".join(str(arm.shape) for arm in arms)
        raise ValueError(f"values {shapes} and weights {weights.shape} do not describe the same units")


def _counts(rng: np.random.Generator, size: int, rows: int) -> Floats:
    """(rows, size) multiplicities of `size` draws with replacement."""
    if size == 1:
        return np.ones((rows, 1))
    drawn = rng.integers(size, size=(rows, size)) + size * np.arange(rows)[:, None]
    return np.bincount(drawn.ravel(), minlength=rows * size).reshape(rows, size).astype(np.float64)


def mcnemar(first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    """Exact two-sided p-value that two models are right equally often on the same passages."""
    only_first = int((first & ~second).sum())
    only_second = int((second & ~first).sum())
    discordant = only_first + only_second
    if discordant == 0:
        return 1.0
    logs = [math.lgamma(discordant + 1) - math.lgamma(k + 1) - math.lgamma(discordant - k + 1)
            for k in range(min(only_first, only_second) + 1)]  # fmt: skip
    tail = math.fsum(math.exp(log - discordant * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: rejecting below α keeps the family-wise error below α."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def minimum_detectable(sd: float, *, seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided t-test with `seeds` runs per arm finds with this power."""
    if seeds < 2:
        return math.inf
    freedom = 2 * (seeds - 1)
    return (_t_quantile(1 - alpha / 2, freedom) + _t_quantile(power, freedom)) * sd * math.sqrt(2 / seeds)


def _t_quantile(probability: float, freedom: int) -> float:
    """Student's t by bisection on a Simpson integral of its density; accurate to 1e-9 for the uses above."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def cdf(x: float) -> float:
        grid = np.linspace(0.0, x, 2001)
        density = scale * (1 + grid**2 / freedom) ** (-(freedom + 1) / 2)
        step = x / 2000
        return 0.5 + step / 3 * float(
            density[0] + density[-1] + 4 * density[1::2].sum() + 2 * density[2:-1:2].sum()
        )

    low, high = 0.0, 1e3
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if cdf(middle) < probability else (low, middle)
    return low


def pareto_front(sizes: Floats, losses: Floats) -> NDArray[np.bool_]:
    """(N,) which points no other point beats: none at most as large and at most as bad, and better in one."""
    smaller = (sizes[:, None] <= sizes) & (losses[:, None] <= losses)  # [i, j]: i is no worse than j
    better = (sizes[:, None] < sizes) | (losses[:, None] < losses)
    return np.asarray(~np.any(smaller & better, axis=0))
