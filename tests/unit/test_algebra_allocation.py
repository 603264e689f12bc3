"""Allocation: the budget is met, caps hold, importance decides, greedy gains are optimal up to one unit."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.algebra.allocation import allocate_sparsity, even_layers, greedy_gain
from model.config import ModelError

small = settings(max_examples=60, deadline=None, derandomize=True)
SCORES = (0.21, 0.05, 0.30, 0.02, 0.11, 0.12, 0.08, 0.27, 0.19, 0.04, 0.15, 0.25)


@small
@given(
    st.lists(st.floats(0, 2), min_size=1, max_size=14),
    st.floats(0, 0.8),
    st.floats(1e-4, 10),
    st.floats(0.8, 0.95),
)
def test_sparsity_meets_the_budget_under_the_cap_and_follows_importance(scores, average, eps, cap):
    phi = allocate_sparsity(scores, average=average, eps=eps, cap=cap)
    assert sum(phi) / len(phi) == pytest.approx(average, abs=1e-9)
    assert max(phi) <= cap + 1e-12
    assert min(phi) >= -1e-12
    for (s1, p1), (s2, p2) in itertools.combinations(zip(scores, phi, strict=True), 2):
        assert (s1 - s2) * (p1 - p2) <= 1e-12 or s1 == s2


def test_without_a_binding_cap_it_is_the_softmax():
    phi = allocate_sparsity(SCORES, average=0.3, eps=10.0)
    share = [math.exp(-score / 10) for score in SCORES]
    assert phi == pytest.approx([12 * 0.3 * each / sum(share) for each in share])


def test_the_cap_binds_and_a_large_eps_is_uniform():
    assert max(allocate_sparsity(SCORES, average=0.5, eps=0.05)) == pytest.approx(0.8)
    assert allocate_sparsity(SCORES, average=0.3, eps=1e7) == pytest.approx([0.3] * 12, abs=1e-6)
    assert allocate_sparsity(SCORES, average=0.8, eps=0.05) == pytest.approx([0.8] * 12)
    assert sum(allocate_sparsity(SCORES, average=0.5, eps=1e-9)) == pytest.approx(6.0)  # shares underflow


def test_impossible_allocations_are_refused():
    with pytest.raises(ModelError, match=r"average sparsity 0.9 is outside \[0, 0.8\]"):
        allocate_sparsity(SCORES, average=0.9, eps=0.1)
    with pytest.raises(ModelError, match="eps=0"):
        allocate_sparsity(SCORES, average=0.3, eps=0.0)


def test_even_layers():
    assert even_layers(6) == (0, 2, 4, 7, 9, 11)
    assert even_layers(8) == (0, 2, 3, 5, 6, 8, 9, 11)
    for layers in (2, 5, 12, 13):
        for keep in range(2, layers + 1):
            kept = even_layers(keep, layers)
            assert len(set(kept)) == keep
            assert {kept[0], kept[-1]} == {0, layers - 1}
    for keep in (1, 13):
        with pytest.raises(ModelError, match=f"cannot keep {keep} of 12 layers"):
            even_layers(keep)


gains = st.lists(
    st.lists(st.floats(0, 10), min_size=1, max_size=4).map(lambda values: sorted(values, reverse=True)),
    min_size=1,
    max_size=4,
)


@small
@given(gains, st.data())
def test_greedy_fits_the_budget_and_is_optimal_up_to_one_unit(gain, data):
    prices = data.draw(st.lists(st.integers(1, 5), min_size=len(gain), max_size=len(gain)))
    weights = data.draw(st.lists(st.floats(0.1, 3), min_size=len(gain), max_size=len(gain)))
    budget = data.draw(st.integers(sum(prices), sum(prices) + 20))
    units = greedy_gain(gain, prices, budget=budget, weights=weights)

    def cost(choice):
        return sum(count * price for count, price in zip(choice, prices, strict=True))

    def value(choice):
        return sum(w * sum(g[:count]) for w, g, count in zip(weights, gain, choice, strict=True))

    assert cost(units) <= budget
    assert all(1 <= count <= len(g) for count, g in zip(units, gain, strict=True))
    for i, count in enumerate(units):  # nothing more fits
        assert count == len(gain[i]) or cost(units) + prices[i] > budget
    best = max(
        value(choice)
        for choice in itertools.product(*(range(1, len(g) + 1) for g in gain))
        if cost(choice) <= budget
    )
    one_unit = max(
        (w * g[c] for w, g, c in zip(weights, gain, units, strict=True) if c < len(g)), default=0.0
    )
    largest = max(w * g[0] for w, g in zip(weights, gain, strict=True))
    assert value(units) >= best - max(one_unit, largest) - 1e-9
    if len(set(prices)) == 1:
        assert value(units) == pytest.approx(best)


def test_weights_decide_and_the_minimum_is_kept():
    flat = [[1.0] * 5, [1.0] * 5]
    assert greedy_gain(flat, [2, 2], budget=12, weights=[1.0, 3.0]) == (1, 5)
    assert greedy_gain(flat, [2, 2], budget=12, weights=[3.0, 1.0]) == (5, 1)
    assert greedy_gain(flat, [2, 2], budget=12, weights=[3.0, 1.0], minimum=2) == (4, 2)
    assert greedy_gain(flat, [2, 2], budget=1000) == (5, 5)
    assert greedy_gain(flat, [2, 3], budget=11) == (4, 1)  # 2 left buys nothing at price 3


def test_impossible_budgets_are_refused():
    with pytest.raises(ModelError, match=r"1 unit\(s\) of every matrix need 4 parameters, budget 3"):
        greedy_gain([[1.0], [1.0]], [2, 2], budget=3)
    with pytest.raises(ModelError, match="as many prices"):
        greedy_gain([[1.0]], [1, 2], budget=3)
    with pytest.raises(ModelError, match="at least one parameter"):
        greedy_gain([[1.0]], [0], budget=3)
