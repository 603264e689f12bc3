"""The learning rate and the cutting of a batch, as pure functions."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config.training import TrainConfig
from pipeline.train.schedule import is_due, learning_rate, micro_batches, rate_at


@given(st.integers(1, 50), st.integers(1, 500), st.floats(1e-6, 1.0), st.floats(0.0, 1.0))
def test_rate_rises_to_the_peak_then_falls_to_the_floor(warmup, after, peak, ratio):
    total, floor = warmup + after, peak * ratio
    rates = [learning_rate(s, peak=peak, warmup=warmup, total=total, floor=floor) for s in range(total + 1)]
    assert all(b > a for a, b in pairwise(rates[:warmup]))
    assert rates[warmup - 1] == pytest.approx(peak)
    assert rates[warmup] == pytest.approx(peak)
    assert all(b <= a + 1e-12 for a, b in pairwise(rates[warmup:]))
    assert rates[total] == pytest.approx(floor)
    assert all(0 <= rate <= peak * (1 + 1e-12) for rate in rates)


def test_rate_is_half_way_down_in_the_middle_of_the_cosine():
    config = TrainConfig(max_steps=110, warmup_steps=10, lr=2.0, min_lr_ratio=0.5)
    assert rate_at(60, config) == pytest.approx(1.5)
    assert rate_at(0, config) == pytest.approx(0.2)


@given(st.integers(0, 40), st.integers(1, 12))
def test_micro_batches_cover_every_row_once(rows, micro_batch):
    parts = list(micro_batches(rows, micro_batch))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(rows))
    assert all(0 < part.stop - part.start <= micro_batch for part in parts)
    assert len(parts) == math.ceil(rows / micro_batch)


def test_what_is_due_every_few_steps_is_also_due_at_the_end():
    assert [step for step in range(1, 24) if is_due(step, 10, total=23)] == [10, 20, 23]
