"""Statistics of comparisons: paired differences, intervals, and what may be called a difference.

All models see the same windows, documents or passages ("units"), so two models are compared unit by unit,
by a bootstrap over units (Miller 2024, arXiv 2411.00640). Where an arm has several seeds, their noise comes
on top. Three seeds cannot be resampled: an interval of 95 % made so holds three times in four. That level of
the hierarchy is Student's t, or Welch's for two arms. Pure functions of arrays, each with its generator.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

RESAMPLES = 10_000
_CHUNK = 500  # resamples held in memory at once
FEW = 30
"""Units below which a bootstrap is too sure of itself: eight documents that agree are no p of 0.0002."""

_CLOSE = 1e-12  # relative distance from a quantile within which only the distribution itself decides
_NORMAL = 1e6  # degrees of freedom beyond which Student's quantile is the normal one to six digits


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


@dataclass(frozen=True, slots=True)
class Noise:
    """What seeds alone add to an estimate."""

    error: float = 0.0
    """Standard error; 0 where no arm has two seeds, or where all seeds agree."""

    freedom: float = math.inf
    """Degrees of freedom of that error, by Welch and Satterthwaite; infinite where no arm has two seeds."""

    def on(self, draws: Floats, *, rng: np.random.Generator) -> Floats:
        """Bootstrap draws over units with the noise of the seeds on top."""
        if self.error == 0.0:
            return draws
        return draws + self.error * rng.standard_t(self.freedom, len(draws))


def seed_noise(arms: Sequence[Floats], shares: Sequence[float] = ()) -> Noise:
    """Noise of Σ share x mean of an arm; each arm is (S,), one number per seed; no shares: all one.

    Shares count squared, so a difference is 1 and -1. An arm of one seed is taken to be as noisy as the
    others are on average; where no arm has two seeds nothing is known, and the noise is 0.
    """
    weights = [share**2 / len(arm) for arm, share in zip(arms, shares or [1.0] * len(arms), strict=True)]
    freedom = sum(len(arm) - 1 for arm in arms)
    if not freedom:
        return Noise()
    alone = sum(weight for arm, weight in zip(arms, weights, strict=True) if len(arm) == 1)
    parts = [
        ((weight + alone * (len(arm) - 1) / freedom) * float(arm.var(ddof=1)), len(arm) - 1)
        for arm, weight in zip(arms, weights, strict=True)
        if len(arm) > 1
    ]
    variance = sum(part for part, _ in parts)
    if variance <= 0.0:
        return Noise(0.0, freedom)
    return Noise(math.sqrt(variance), variance**2 / sum(part**2 / count for part, count in parts))


def t_interval(estimate: float, noise: Noise, *, level: float = 0.95) -> Interval | None:
    """Student's interval of what only seeds make uncertain; None where nothing is known of them."""
    if noise.freedom == math.inf:
        return None
    if noise.error == 0.0:
        return Interval(estimate, estimate, estimate, float(estimate == 0.0), level)
    reach = t_quantile((1 + level) / 2, noise.freedom) * noise.error
    p_value = min(1.0, max(0.0, 2 * (1 - t_cdf(abs(estimate) / noise.error, noise.freedom))))
    return Interval(estimate, estimate - reach, estimate + reach, p_value, level)


def over_units(
    estimate: float, draws: Floats, noise: Noise, *, units: int, rng: np.random.Generator
) -> tuple[Interval, float] | None:
    """Interval of an estimate, from bootstrap draws over units and the noise of seeds, and what it detects.

    With fewer than `FEW` units both levels are Student's: the bootstrap gives the standard error alone, and
    its degrees of freedom are one less than the units, joined with those of the seeds (Satterthwaite). One
    unit says nothing: None.
    """
    if units < 2:
        return None
    total = _joined(draws, noise, units)
    found = _interval_of(estimate, draws, noise, total, units=units, rng=rng)
    return found, detectable(total.error, total.freedom)


def interval_over_units(
    estimate: float, draws: Floats, noise: Noise, *, units: int, rng: np.random.Generator
) -> Interval | None:
    """The same interval, for whoever compares with nothing."""
    if units < 2:
        return None
    total = _joined(draws, noise, units) if units < FEW else Noise()
    return _interval_of(estimate, draws, noise, total, units=units, rng=rng)


def _joined(draws: Floats, noise: Noise, units: int) -> Noise:
    """Both levels as one standard error with its degrees of freedom."""
    text = float(draws.std()) * math.sqrt(units / (units - 1))
    error = math.hypot(text, noise.error)
    parts = ((text, units - 1.0 if units < FEW else math.inf), (noise.error, noise.freedom))
    spread = sum((part / error) ** 4 / freedom for part, freedom in parts if part > 0)
    return Noise(error, 1 / spread if spread > 0 else math.inf)


def _interval_of(
    estimate: float, draws: Floats, noise: Noise, total: Noise, *, units: int, rng: np.random.Generator
) -> Interval:
    student = t_interval(estimate, total) if units < FEW and total.error > 0 else None
    return student or interval(estimate, noise.on(draws, rng=rng))


def seeded_difference(
    first: Floats,
    second: Floats,
    weights: Floats,
    *,
    rng: np.random.Generator,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> Interval:
    """Difference of two arms of several seeds: units that both share, resampled; seeds of each, by Welch's t.

    first (S, U), second (S', U), weights (U,).
    """
    _same_units([first, second], weights)
    means = np.stack([first.mean(0), second.mean(0)])
    draws = resampled_means(means, weights, rng=rng, resamples=resamples)
    total = float(weights.sum())
    noise = seed_noise([first.sum(1) / total, second.sum(1) / total])
    estimate = float(means[0].sum() - means[1].sum()) / total
    return interval(estimate, noise.on(draws[0] - draws[1], rng=rng), level=level)


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


def detectable(error: float, freedom: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided test finds with this power, from its standard error."""
    return (t_quantile(1 - alpha / 2, freedom) + t_quantile(power, freedom)) * error


def minimum_detectable(sd: float, *, seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided t-test with `seeds` runs per arm finds with this power."""
    if seeds < 2:
        return math.inf
    return detectable(sd * math.sqrt(2 / seeds), 2 * (seeds - 1), alpha=alpha, power=power)


def t_cdf(x: float, freedom: float) -> float:
    """Student's distribution function.

    With x = sqrt(freedom) tan θ it is an integral of a power of cos θ, smooth on a finite range, by Simpson.
    """
    grid = np.linspace(0.0, math.atan(x / math.sqrt(freedom)), 2001)
    height = np.cos(grid) ** (freedom - 1)
    inner = height[0] + height[-1] + 4 * height[1:-1:2].sum() + 2 * height[2:-1:2].sum()
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    return 0.5 + scale * float(inner) * float(grid[1]) / 3


@lru_cache(maxsize=4096)
def t_quantile(probability: float, freedom: float) -> float:
    """Student's quantile of a probability from 0.5 on, by bisection; the normal one for great freedom.

    Newton's steps come first, so that the distribution is asked near the answer alone: the same number from
    a quarter of the work.
    """
    if freedom > _NORMAL:
        return NormalDist().inv_cdf(probability)
    below, above = _bracket(probability, freedom)
    low, high = 0.0, 1e4
    for _ in range(80):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        is_below = middle < below or (middle < above and t_cdf(middle, freedom) < probability)
        low, high = (middle, high) if is_below else (low, middle)
    return low


def _bracket(probability: float, freedom: float) -> tuple[float, float]:
    """Two points between which the quantile lies: close together where Newton's steps find it."""
    x = max(NormalDist().inv_cdf(probability), 1e-3)
    log_height = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    for _ in range(8):
        slope = math.exp(log_height - (freedom + 1) / 2 * math.log1p(x * x / freedom))
        step = (probability - t_cdf(x, freedom)) / slope
        x += step
        if not 0.0 < x < 1e4:
            return 0.0, math.inf
        if abs(step) < _CLOSE * x / 10:
            break
    below, above = x * (1 - _CLOSE), x * (1 + _CLOSE)
    found = t_cdf(below, freedom) < probability <= t_cdf(above, freedom)
    return (below, above) if found else (0.0, math.inf)


def pareto_front(sizes: Floats, losses: Floats) -> NDArray[np.bool_]:
    """(N,) which points no other point beats: none at most as large and at most as bad, and better in one."""
    smaller = (sizes[:, None] <= sizes) & (losses[:, None] <= losses)  # [i, j]: i is no worse than j
    better = (sizes[:, None] < sizes) | (losses[:, None] < losses)
    return np.asarray(~np.any(smaller & better, axis=0))
