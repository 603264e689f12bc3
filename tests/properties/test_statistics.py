"""Statistics against closed forms, published values and simulation."""

import math
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.stats import (
    Interval,
    Noise,
    holm,
    interval,
    mcnemar,
    minimum_detectable,
    over_units,
    pareto_front,
    resampled_means,
    seed_noise,
    seeded_difference,
    t_cdf,
    t_interval,
)


def rng() -> np.random.Generator:
    return np.random.default_rng(11)


def mean_interval(values, weights, *, rng, resamples=10_000) -> Interval:
    draws = resampled_means(values[None], weights, rng=rng, resamples=resamples)[0]
    return interval(float(values.sum() / weights.sum()), draws)


def paired_difference(first, second, weights, *, rng, resamples=10_000) -> Interval:
    draws = resampled_means(np.stack([first, second]), weights, rng=rng, resamples=resamples)
    return interval(float((first - second).sum() / weights.sum()), draws[0] - draws[1])


def test_bootstrap_interval_matches_the_normal_one():
    values = rng().normal(3.0, 0.5, 400)
    found = mean_interval(values, np.ones(400), rng=rng())
    half = 1.96 * values.std() / math.sqrt(400)
    assert found.estimate == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    source = rng()
    covered = 0
    for _ in range(300):
        tokens = source.integers(20, 200, 60).astype(float)
        nll = tokens * (2.0 + source.normal(0, 0.3, 60))
        found = mean_interval(nll, tokens, rng=source, resamples=400)
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 300 <= 0.99


def test_pairing_removes_what_the_units_have_in_common():
    source = rng()
    difficulty = source.normal(4.0, 1.0, 300)
    first = difficulty + 0.02 + source.normal(0, 0.05, 300)
    second = difficulty + source.normal(0, 0.05, 300)
    found = paired_difference(first, second, np.ones(300), rng=source)
    assert found.excludes_zero
    assert found.p_value < 0.01
    alone = mean_interval(first, np.ones(300), rng=source)
    assert (alone.high - alone.low) > 5 * (found.high - found.low)


def test_no_difference_is_rejected_about_as_often_as_alpha():
    source = rng()
    rejected = 0
    for _ in range(300):
        values = source.normal(0, 1, 50)
        rejected += (
            paired_difference(values, np.zeros(50), np.ones(50), rng=source, resamples=400).p_value < 0.05
        )
    assert 0.01 <= rejected / 300 <= 0.12


def test_seeds_widen_an_interval_that_units_alone_would_make_too_narrow():
    source = rng()
    unit = source.normal(0, 0.01, 200)
    first = unit + np.array([0.0, 0.3, -0.3])[:, None]
    second = unit + np.zeros((3, 1))
    found = seeded_difference(first, second, np.ones(200), rng=source)
    assert not found.excludes_zero
    assert found.high - found.low > 0.4
    assert found.estimate == pytest.approx(0.0, abs=1e-12)


def test_three_seeds_cover_as_often_as_they_say():
    source, hit = rng(), 0
    for _ in range(400):
        first, second = source.normal(0, 1, 3), source.normal(0, 2, 3)
        found = t_interval(first.mean() - second.mean(), seed_noise([first, second], [1, -1]))
        hit += found.low <= 0 <= found.high
        assert found.excludes_zero == (found.p_value < 0.05)
    assert 0.92 <= hit / 400 <= 0.985  # resampling the seeds gives 0.76


def test_one_seed_borrows_the_noise_of_the_others_and_no_seeds_give_none():
    many, alone = np.array([1.0, 2.0, 4.0]), np.array([3.0])
    lent = seed_noise([many, alone], [1, -1])
    assert lent.error == pytest.approx(many.std(ddof=1) * math.sqrt(1 / 3 + 1))
    assert lent.freedom == pytest.approx(2)
    assert t_interval(0.1, seed_noise([alone, alone], [1, -1])) is None
    same = t_interval(0.1, seed_noise([np.ones(3), np.ones(2)], [1, -1]))
    assert (same.low, same.high, same.p_value) == (0.1, 0.1, 0.0)


def test_the_noise_of_a_difference_is_welchs():
    first, second = np.array([1.0, 1.5, 2.5, 3.0]), np.array([2.0, 6.0, 7.0])
    found = t_interval(first.mean() - second.mean(), seed_noise([first, second], [1, -1]))
    known = scipy.stats.ttest_ind(first, second, equal_var=False)
    assert found.p_value == pytest.approx(known.pvalue, abs=1e-9)
    assert (found.low, found.high) == pytest.approx(tuple(known.confidence_interval()), abs=1e-8)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.0, 300.0), st.floats(1.0, 1e5))
def test_students_distribution_is_scipys(x, freedom):
    assert t_cdf(x, freedom) == pytest.approx(scipy.stats.t.cdf(x, freedom), abs=1e-7)


@pytest.mark.parametrize("units", [5, 200])
def test_few_units_cover_as_often_as_they_say(units):
    source, hit, smallest = rng(), 0, []
    for _ in range(400):
        gaps = source.normal(0, 1, units)
        draws = resampled_means(gaps[None], np.ones(units), rng=source, resamples=300)[0]
        found, detects = over_units(float(gaps.mean()), draws, Noise(), units=units, rng=source)
        hit += found.low <= 0 <= found.high
        smallest.append(detects)
    assert 0.91 <= hit / 400 <= 0.985  # the bootstrap alone covers 0.83 with five
    power = scipy.stats.t if units < 30 else scipy.stats.norm
    args = (units - 1,) if units < 30 else ()
    expected = (power.ppf(0.975, *args) + power.ppf(0.8, *args)) / math.sqrt(units)
    assert np.mean(smallest) == pytest.approx(expected, rel=0.1)


def test_one_unit_says_nothing():
    assert over_units(0.1, np.full(50, 0.1), Noise(), units=1, rng=rng()) is None


def test_units_and_seeds_make_one_error_of_few_degrees_of_freedom():
    source = rng()
    draws = source.normal(0.5, 0.1, 4000)
    found, detects = over_units(0.5, draws, Noise(0.2, 4.0), units=9, rng=source)
    text = draws.std() * math.sqrt(9 / 8)
    error = math.hypot(text, 0.2)
    freedom = error**4 / (text**4 / 8 + 0.2**4 / 4)
    assert found.high - 0.5 == pytest.approx(scipy.stats.t.ppf(0.975, freedom) * error)
    assert found.p_value == pytest.approx(2 * scipy.stats.t.sf(0.5 / error, freedom))
    assert detects == pytest.approx(
        (scipy.stats.t.ppf(0.975, freedom) + scipy.stats.t.ppf(0.8, freedom)) * error
    )


def test_seeds_that_agree_leave_the_interval_of_the_units():
    source = rng()
    first = np.repeat(source.normal(3.0, 0.2, (1, 150)), 3, axis=0)
    second = first[:1] + source.normal(0.01, 0.05, (1, 150))
    found = seeded_difference(first, second, np.ones(150), rng=np.random.default_rng(5))
    alone = seeded_difference(first[:1], second, np.ones(150), rng=np.random.default_rng(5))
    assert (found.low, found.high) == pytest.approx((alone.low, alone.high))
    assert found.p_value == alone.p_value


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 40), st.integers(0, 1000))
def test_weights_are_the_denominator(count, seed):
    source = np.random.default_rng(seed)
    weights = source.integers(1, 50, count).astype(float)
    nll = weights * source.uniform(1, 5, count)
    found = mean_interval(nll, weights, rng=source, resamples=200)
    assert found.estimate == pytest.approx(nll.sum() / weights.sum())
    assert found.low <= found.high
    assert (nll / weights).min() - 1e-9 <= found.low <= found.high <= (nll / weights).max() + 1e-9


def test_units_that_differ_are_refused():
    with pytest.raises(ValueError, match="same units"):
        seeded_difference(np.zeros((1, 3)), np.zeros((1, 4)), np.ones(3), rng=rng())


def test_mcnemar_is_the_exact_binomial():
    first = np.array([True] * 8 + [False] * 1 + [True] * 5)
    second = np.array([False] * 8 + [True] * 1 + [True] * 5)
    assert mcnemar(first, second) == pytest.approx(2 * (1 + 9) / 2**9)
    assert mcnemar(first, first) == 1.0
    assert mcnemar(first, second) == mcnemar(second, first)


def test_holm_on_the_textbook_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.6, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), max_size=12))
def test_holm_keeps_the_order_and_never_lowers(p_values):
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    assert all(adjusted[i] <= adjusted[j] for i, j in pairwise(order))


def test_minimum_detectable_difference_of_the_modded_nanogpt_runs():
    assert minimum_detectable(0.00065, seeds=3) == pytest.approx(0.0020, abs=5e-5)
    assert minimum_detectable(0.00065, seeds=5) == pytest.approx(0.0013, abs=5e-5)
    assert minimum_detectable(1.0, seeds=1) == math.inf


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=15))
def test_pareto_front_is_what_nobody_beats(points):
    sizes, losses = (np.array(column, dtype=float) for column in zip(*points, strict=True))
    front = pareto_front(sizes, losses)
    for index, (size, loss) in enumerate(points):
        beaten = any(s <= size and q <= loss and (s, q) != (size, loss) for s, q in points)
        assert front[index] == (not beaten)
    assert front.any()
