"""Fewer hidden units: refit is least squares, its error a Schur trace, and selections do what they say."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.algebra.nystrom import (
    greedy_keep,
    keep_top,
    refit,
    refit_with_bias,
    ridge_leverage,
    selection_loss,
)
from model.algebra.psd import psd_pinv
from model.config import ModelError

WIDTH, HIDDEN, KEPT = 16, 48, 20
RNG = np.random.default_rng(0)


def normal(*shape: int) -> torch.Tensor:
    return torch.from_numpy(RNG.normal(size=shape))


X = normal(600, WIDTH) @ normal(WIDTH, WIDTH)
HID = torch.nn.functional.gelu(X @ normal(WIDTH, HIDDEN) / 4 + 0.2 * normal(HIDDEN), approximate="tanh")
DOWN, BIAS = normal(HIDDEN, WIDTH) / 6, normal(WIDTH) / 10
GRAM, MEAN = HID.T @ HID / 600, HID.mean(dim=0)


def measured(keep: torch.Tensor, new: torch.Tensor, bias: torch.Tensor = BIAS) -> float:
    return float((HID @ DOWN + BIAS - HID[:, keep] @ new - bias).square().sum()) / 600


def test_ridge_leverage_is_the_diagonal_it_names():
    for ridge_rel in (1.0, 0.01):
        ridge = ridge_rel * torch.trace(GRAM) / HIDDEN
        exact = torch.diagonal(GRAM @ torch.linalg.inv(GRAM + ridge * torch.eye(HIDDEN)))
        assert_close(ridge_leverage(GRAM, ridge_rel=ridge_rel), exact)
        assert_close(ridge_leverage(1e6 * GRAM, ridge_rel=ridge_rel), exact)
    assert float(ridge_leverage(GRAM, ridge_rel=1e-9).min()) > 0.99
    assert_close(ridge_leverage(torch.zeros(3, 3)), torch.zeros(3, dtype=torch.float64))
    with pytest.raises(ModelError, match="must be positive"):
        ridge_leverage(GRAM, ridge_rel=0.0)


def test_the_highest_scores_are_kept_in_order_and_ties_go_to_the_lower_index():
    scores = torch.tensor([0.5, 2.0, 0.5, 0.5, 3.0])
    assert keep_top(scores, 3).tolist() == [0, 1, 4]
    assert keep_top(scores, 5).tolist() == [0, 1, 2, 3, 4]
    for count in (0, 6):
        with pytest.raises(ModelError, match="choose 1 to 5"):
            keep_top(scores, count)


def test_the_refit_is_least_squares_and_its_error_a_schur_trace():
    keep = keep_top(ridge_leverage(GRAM), KEPT)
    new = refit(GRAM, keep, DOWN)
    assert_close(new, torch.linalg.lstsq(HID[:, keep], HID @ DOWN).solution, rtol=1e-6, atol=1e-8)
    inner = psd_pinv(GRAM[keep][:, keep])
    schur = float(torch.trace(DOWN.T @ (GRAM - GRAM[:, keep] @ inner @ GRAM[keep]) @ DOWN))
    assert selection_loss(GRAM, keep, DOWN, new) == pytest.approx(schur)
    assert selection_loss(GRAM, keep, DOWN, new) == pytest.approx(measured(keep, new))
    bare = selection_loss(GRAM, keep, DOWN, DOWN[keep])
    assert bare == pytest.approx(measured(keep, DOWN[keep]))
    assert schur < bare


def test_all_units_are_exact():
    every = torch.arange(HIDDEN)
    assert_close(refit(GRAM, every, DOWN), DOWN, rtol=1e-6, atol=1e-8)
    new, bias = refit_with_bias(GRAM, MEAN, every, DOWN, BIAS)
    assert_close(new, DOWN, rtol=1e-6, atol=1e-8)
    assert_close(bias, BIAS, rtol=1e-6, atol=1e-8)


def test_the_bias_corrected_refit_is_the_joint_optimum():
    keep = keep_top(ridge_leverage(GRAM), KEPT)
    new, bias = refit_with_bias(GRAM, MEAN, keep, DOWN, BIAS)
    inputs = torch.cat([HID[:, keep], torch.ones(600, 1, dtype=HID.dtype)], dim=1)
    joint = torch.linalg.lstsq(inputs, HID @ DOWN + BIAS).solution
    assert_close(new, joint[:-1], rtol=1e-6, atol=1e-8)
    assert_close(bias, joint[-1], rtol=1e-6, atol=1e-8)
    assert measured(keep, new, bias) <= measured(keep, refit(GRAM, keep, DOWN))


def test_dead_units_do_no_harm():
    gram = torch.zeros(HIDDEN + 2, HIDDEN + 2, dtype=torch.float64)
    gram[:HIDDEN, :HIDDEN] = GRAM
    down = torch.cat([DOWN, torch.ones(2, WIDTH, dtype=torch.float64)])
    keep = torch.cat([keep_top(ridge_leverage(GRAM), KEPT), torch.tensor([HIDDEN, HIDDEN + 1])])
    new = refit(gram, keep, down)
    assert torch.isfinite(new).all()
    assert selection_loss(gram, keep, down, new) == pytest.approx(
        selection_loss(GRAM, keep[:-2], DOWN, refit(GRAM, keep[:-2], DOWN))
    )
    greedy = greedy_keep(gram, down, KEPT)
    assert int(greedy.max()) < HIDDEN


def test_each_greedy_pick_is_the_best_single_addition():
    kept: list[int] = []
    for count in range(1, 5):
        losses = {
            unit: selection_loss(GRAM, keep, DOWN, refit(GRAM, keep, DOWN))
            for unit in range(HIDDEN)
            if unit not in kept
            for keep in [torch.tensor(sorted([*kept, unit]))]
        }
        kept = sorted([*kept, min(losses, key=losses.__getitem__)])
        assert greedy_keep(GRAM, DOWN, count).tolist() == kept


def test_greedy_beats_leverage_and_leverage_beats_nothing():
    greedy, leverage = greedy_keep(GRAM, DOWN, KEPT), keep_top(ridge_leverage(GRAM), KEPT)
    assert len(set(greedy.tolist())) == KEPT
    losses = [selection_loss(GRAM, keep, DOWN, refit(GRAM, keep, DOWN)) for keep in (greedy, leverage)]
    assert losses[0] < losses[1] < selection_loss(GRAM, leverage, DOWN, DOWN[leverage])
    assert greedy_keep(GRAM, DOWN, HIDDEN).tolist() == list(range(HIDDEN))
    with pytest.raises(ModelError, match="cannot keep 49"):
        greedy_keep(GRAM, DOWN, 49)
    spoiled = GRAM.clone()
    spoiled[3, 3] = torch.nan
    with pytest.raises(ModelError, match="need a finite 48x48 matrix"):
        greedy_keep(spoiled, DOWN, KEPT)


def test_more_units_never_hurt():
    losses = [
        selection_loss(GRAM, keep, DOWN, refit(GRAM, keep, DOWN))
        for keep in (greedy_keep(GRAM, DOWN, count) for count in range(4, HIDDEN, 4))
    ]
    assert losses == sorted(losses, reverse=True)
