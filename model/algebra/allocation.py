"""How much each layer or matrix may keep: sparsity by importance, ranks by gain, evenly spaced layers.

Numbers in, numbers out, no tensors: a plan is known before a weight is touched.
"""

from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from math import exp

from model.config import ModelError


def allocate_sparsity(
    scores: Sequence[float], *, average: float, eps: float, cap: float = 0.8
) -> tuple[float, ...]:
    """Share of each layer to remove: L average softmax(-scores / eps), cut at `cap`, the excess re-spread.

    Maximises sum s_l (1 - phi_l) + eps entropy(phi) under mean phi = average (MoDeGPT, arXiv 2408.09632); the
    cap is needed because the softmax is not bounded by 1. Important layers lose less; a large eps is uniform.
    Raises ModelError when average is outside [0, cap] or eps is not positive.
    """
    if not 0 <= average <= cap:
        raise ModelError(f"average sparsity {average:g} is outside [0, {cap:g}]; lower it or raise the cap")
    if eps <= 0:
        raise ModelError(f"eps={eps:g} must be positive")
    lowest = min(scores)
    share = [exp(-(score - lowest) / eps) for score in scores]
    capped: set[int] = set()
    while True:
        free = [layer for layer in range(len(share)) if layer not in capped]
        phi = [cap] * len(share)
        if not free:
            return tuple(phi)
        left = average * len(share) - cap * len(capped)
        total = sum(share[layer] for layer in free)
        for layer in free:  # all shares may have underflowed: then the free layers are equal
            phi[layer] = left * share[layer] / total if total > 0 else left / len(free)
        over = {layer for layer in free if phi[layer] > cap}
        if not over:
            return tuple(phi)
        capped |= over


def even_layers(keep: int, layers: int = 12) -> tuple[int, ...]:
    """Evenly spaced layer indices, first and last included, halves rounded up; 6 of 12 are DistilGPT2's."""
    if not 2 <= keep <= layers:
        raise ModelError(f"cannot keep {keep} of {layers} layers evenly: choose 2 to {layers}")
    return tuple((2 * i * (layers - 1) + keep - 1) // (2 * (keep - 1)) for i in range(keep))


def greedy_gain(
    gains: Sequence[Sequence[float]],
    prices: Sequence[int],
    *,
    budget: int,
    weights: Sequence[float] | None = None,
    minimum: int = 1,
) -> tuple[int, ...]:
    """Units (ranks, terms) per matrix: always the best gain per parameter next, until nothing fits.

    `gains[i]` are the squared singular values of matrix i in its metric, descending; `prices[i]` the
    parameters of one more unit; `weights[i]` what its error costs the model. Optimal for an additive loss up
    to one unit, because gains fall. Ties go to the earlier matrix. Raises ModelError when `minimum` units of
    each exceed the budget.
    """
    if len(prices) != len(gains) or (weights is not None and len(weights) != len(gains)):
        raise ModelError(f"{len(gains)} matrices need as many prices and weights")
    if min(prices) < 1:
        raise ModelError("the price of a unit must be at least one parameter")
    weights = [1.0] * len(gains) if weights is None else weights
    units = [min(minimum, len(gain)) for gain in gains]
    left = budget - sum(count * price for count, price in zip(units, prices, strict=True))
    if left < 0:
        raise ModelError(
            f"{minimum} unit(s) of every matrix need {budget - left:,} parameters, budget {budget:,}"
        )

    def entry(i: int) -> tuple[float, int]:
        return -weights[i] * gains[i][units[i]] / prices[i], i

    heap = [entry(i) for i in range(len(gains)) if units[i] < len(gains[i])]
    heapify(heap)
    while heap:
        _, i = heappop(heap)
        if prices[i] > left:
            continue
        units[i] += 1
        left -= prices[i]
        if units[i] < len(gains[i]):
            heappush(heap, entry(i))
    return tuple(units)
