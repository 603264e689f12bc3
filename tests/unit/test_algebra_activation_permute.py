"""Hidden orders chosen by output error: monotone, never worse than the stored order or than pruning."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.algebra.activation import activation_kron
from model.algebra.activation_permute import (
    _Move,
    _Problem,
    _Side,
    first_order_unit_metric,
    permuted_activation_kron_pair,
)
from model.algebra.alternate import DEFAULT_SOLVER, Solver
from model.algebra.nystrom import greedy_keep, refit, selection_loss
from model.algebra.permute import permuted_kron_pair
from model.algebra.psd import centred, metric_loss
from model.algebra.shapes import KronShape
from model.config import ModelError

WIDTH, HIDDEN = 8, 24
SHAPES = [KronShape(8, 6, 1, 4), KronShape(4, 12, 2, 2), KronShape(2, 8, 4, 3), KronShape(8, 24, 1, 1)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


class Mlp:
    """A random MLP with correlated inputs, units of different sizes, and what calibration would say of it."""

    def __init__(
        self, seed: int, *, up: torch.Tensor | None = None, down: torch.Tensor | None = None
    ) -> None:
        sizes = (0.4 * normal(seed, HIDDEN)).exp()
        self.up = normal(seed + 1, WIDTH, HIDDEN) * sizes if up is None else up
        self.down = normal(seed + 2, HIDDEN, WIDTH) if down is None else down
        spread = normal(seed + 3, WIDTH, WIDTH) * torch.linspace(1.5, 0.1, WIDTH)
        self.x = normal(seed + 4, 500, WIDTH) @ spread
        self.x = self.x - self.x.mean(dim=0)
        self.hid = torch.nn.functional.gelu(self.x @ self.up, approximate="tanh")
        self.inputs = self.x.T @ self.x / 500
        self.hidden = centred(self.hid.T @ self.hid / 500, self.hid.mean(dim=0))

    def order(self, shape: KronShape, **options):
        return permuted_activation_kron_pair(
            self.up, self.down, self.inputs, self.hidden, shape, terms=1, **options
        )

    def losses(self, up: torch.Tensor, down: torch.Tensor) -> tuple[float, float]:
        return (
            metric_loss(self.up - up, input_metric=self.inputs),
            metric_loss(self.down - down, input_metric=self.hidden),
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_history_never_rises_and_says_what_tokens_measure(shape: KronShape):
    for seed in range(0, 30, 10):
        mlp = Mlp(seed)
        found = mlp.order(shape)
        how = found.convergence
        assert all(later < earlier for earlier, later in pairwise(how.history))
        assert found.loss == how.history[-1] == min(loss for _, loss in how.by_start)
        assert sorted(found.hidden.tolist()) == list(range(HIDDEN))
        up, down = mlp.losses(*found.dense())
        energies = mlp.losses(torch.zeros_like(mlp.up), torch.zeros_like(mlp.down))
        assert found.loss == pytest.approx(up / energies[0] + down / energies[1], rel=1e-7, abs=1e-12)
        assert up == pytest.approx(
            float((mlp.x @ (mlp.up - found.dense()[0])).square().sum()) / 500, abs=1e-9
        )


def test_more_terms_than_a_group_has_units_are_fitted_too():
    mlp, shape = Mlp(3), KronShape(4, 12, 2, 2)
    losses = [
        permuted_activation_kron_pair(
            mlp.up, mlp.down, mlp.inputs, mlp.hidden, shape, terms=terms, max_sweeps=2
        ).loss
        for terms in range(1, shape.max_terms + 1)
    ]
    assert all(more < less for less, more in pairwise(losses))
    assert losses[-1] < 1e-12  # four terms of a 2x2 factor hold every weight


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_it_is_never_worse_than_the_activation_fit_in_the_stored_order(shape: KronShape):
    for seed in range(0, 30, 10):
        mlp = Mlp(seed)
        up = activation_kron(mlp.up, mlp.inputs, shape, terms=1)
        down = activation_kron(mlp.down, mlp.hidden, shape.transposed(), terms=1)
        stored = up.loss / up.energy + down.loss / down.energy
        only = mlp.order(shape, starts=(), max_sweeps=0)
        assert only.convergence.by_start == (("identity", only.loss),)
        assert only.loss == pytest.approx(stored, rel=1e-9)
        alternated = mlp.order(shape, starts=())
        assert alternated.loss <= stored * (1 + 1e-12)
        assert mlp.order(shape).loss < 0.95 * stored


def test_it_is_better_than_an_order_chosen_by_weights():
    gains = []
    for seed in range(0, 40, 10):
        mlp = Mlp(seed)
        order = permuted_kron_pair(mlp.up, mlp.down, SHAPES[0], terms=1).orders.hidden
        up = activation_kron(mlp.up[:, order], mlp.inputs, SHAPES[0], terms=1)
        down = activation_kron(mlp.down[order], mlp.hidden[order][:, order], SHAPES[0].transposed(), terms=1)
        gains.append(mlp.order(SHAPES[0]).loss / (up.loss / up.energy + down.loss / down.energy))
    assert np.mean(gains) < 0.95


def test_selecting_units_with_a_refit_is_a_special_case():
    for seed in range(0, 30, 10):
        mlp = Mlp(seed)
        keep = greedy_keep(mlp.hidden, mlp.down, 6)
        pruned = selection_loss(mlp.hidden, keep, mlp.down, refit(mlp.hidden, keep, mlp.down))
        found = mlp.order(SHAPES[0], weights=(0.0, 1.0), solver=Solver(max_iter=100))
        assert found.loss <= pruned * (1 + 1e-9)
        assert found.down.loss == pytest.approx(found.loss)
        first = mlp.order(SHAPES[0], starts=("selected",), max_sweeps=0, solver=Solver(max_iter=0))
        assert first.down.loss <= pruned * (1 + 1e-9)


def test_a_start_is_given_up_only_behind_the_best_and_all_are_on_record():
    mlp, given_up = Mlp(20), 0
    found = mlp.order(SHAPES[0], max_sweeps=30)
    by_start = dict(found.convergence.by_start)
    assert list(by_start) == ["identity", "norm_split", "aligned", "selected"]
    assert by_start[found.convergence.start] == found.loss == min(by_start.values())
    assert found.convergence.stopped in ("converged", "no_descent")
    for name in ("norm_split", "aligned", "selected"):
        alone = dict(mlp.order(SHAPES[0], max_sweeps=30, starts=(name,)).convergence.by_start)[name]
        assert by_start[name] >= alone
        given_up += by_start[name] > alone
    assert given_up > 0


def test_a_planted_order_is_found():
    levels = torch.tensor([[4.0, 2.0, 1.0, 0.5]]).double()
    scramble = torch.from_numpy(np.random.default_rng(3).permutation(HIDDEN))
    up = torch.kron(normal(0, 8, 6), levels)[:, scramble]
    down = torch.kron(normal(1, 6, 8), levels.reshape(4, 1))[scramble]
    mlp = Mlp(7, up=up, down=down)
    stored = mlp.order(SHAPES[0], starts=(), max_sweeps=0)
    found = mlp.order(SHAPES[0], max_sweeps=30)
    assert stored.up.loss > 0.2 * stored.up.energy
    assert found.loss < 0.25 * stored.loss


def test_the_order_folds_into_an_mlp():
    mlp, bias = Mlp(0), normal(9, HIDDEN)
    found = mlp.order(SHAPES[1])
    native = torch.tanh(mlp.x @ found.up.dense() + bias[found.hidden]) @ found.down.dense()
    up, down = found.dense()
    assert_close(native, torch.tanh(mlp.x @ up + bias) @ down)


def test_a_price_per_unit_moves_the_error_to_where_it_is_cheap():
    mlp = Mlp(0)
    price = torch.full((HIDDEN,), 1e-3, dtype=torch.float64)
    price[::2] = 1.0
    root = normal(4, HIDDEN, HIDDEN) / 50
    unit_metric = torch.diag(price) + root @ root.T
    found = mlp.order(SHAPES[0], unit_metric=unit_metric)
    assert all(later < earlier for earlier, later in pairwise(found.convergence.history))
    up, down = found.dense()
    energy = metric_loss(mlp.up, input_metric=mlp.inputs, output_metric=unit_metric)
    priced = metric_loss(mlp.up - up, input_metric=mlp.inputs, output_metric=unit_metric)
    total = priced / energy + mlp.losses(up, down)[1] / mlp.losses(up, torch.zeros_like(down))[1]
    assert found.loss == pytest.approx(total, rel=1e-6)
    plain = mlp.order(SHAPES[0]).dense()[0]
    assert priced < metric_loss(mlp.up - plain, input_metric=mlp.inputs, output_metric=unit_metric)
    with pytest.raises(ModelError, match="side of 1"):
        mlp.order(SHAPES[1], unit_metric=unit_metric)


def test_it_is_deterministic_and_refuses_what_does_not_fit():
    mlp = Mlp(0)
    one, two = mlp.order(SHAPES[0]), mlp.order(SHAPES[0])
    assert torch.equal(one.hidden, two.hidden)
    assert torch.equal(one.up.left, two.up.left)
    with pytest.raises(ModelError, match="need a finite 24x24 matrix"):
        permuted_activation_kron_pair(mlp.up, mlp.down, mlp.inputs, mlp.inputs, SHAPES[0], terms=1)
    with pytest.raises(ModelError, match="refit_iter=0"):
        mlp.order(SHAPES[0], refit_iter=0)
    with pytest.raises(ModelError, match="8x24 weight"):
        permuted_activation_kron_pair(mlp.down, mlp.up, mlp.inputs, mlp.hidden, SHAPES[0], terms=1)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_the_majoriser_is_above_the_true_change_and_exact_without_coupling(shape: KronShape):
    mlp, stored = Mlp(0), torch.arange(HIDDEN)
    generator = np.random.default_rng(0)
    up = _Side.of(mlp.up, shape, mlp.inputs, None)
    down = _Side.of(mlp.down, shape.transposed(), None, mlp.hidden)
    problem = _Problem(up, down, 1, DEFAULT_SOLVER, DEFAULT_SOLVER, "rms")
    for side in (up, down):
        fit = side.fit(stored, None, problem, from_scratch=True)
        move = _Move.of(side, stored, fit)
        assert move.before == pytest.approx(side.share * fit.loss)
        assert move.after(stored) == pytest.approx(move.before)
        for _ in range(20):
            order = stored.clone()  # a few exchanges, or all places anew
            some = torch.from_numpy(generator.permutation(HIDDEN)[: generator.integers(2, HIDDEN)])
            order[some] = some[torch.from_numpy(generator.permutation(len(some)))]
            cost = move.fixed if move.curve is None else move.fixed + HIDDEN * move.curve
            predicted = float((cost[stored, order] - cost[stored, stored]).sum())
            true = move.after(order) - move.before
            assert predicted >= true - 1e-12
            if move.curve is None:
                assert predicted == pytest.approx(true, abs=1e-10)


def test_an_accepted_order_is_better_with_the_same_factors():
    accepted = 0
    for seed in range(0, 50, 10):
        mlp, stored = Mlp(seed), torch.arange(HIDDEN)
        up = _Side.of(mlp.up, SHAPES[0], mlp.inputs, None)
        down = _Side.of(mlp.down, SHAPES[0].transposed(), None, mlp.hidden)
        problem = _Problem(up, down, 1, DEFAULT_SOLVER, DEFAULT_SOLVER, "rms")
        fit_up, fit_down = (side.fit(stored, None, problem, from_scratch=True) for side in (up, down))
        found = problem.better_order(stored, fit_up, fit_down, tau=1.0)
        if found is None:
            continue
        order, accepted = found[0], accepted + 1
        new_up, new_down = fit_up.dense(), fit_down.dense()
        back_up, back_down = torch.empty_like(new_up), torch.empty_like(new_down)
        back_up[:, order], back_down[order] = new_up, new_down
        losses = mlp.losses(back_up, back_down)
        assert up.share * losses[0] + down.share * losses[1] < problem.total(fit_up, fit_down)
    assert accepted >= 3


def test_the_unit_metric_is_the_output_error_of_small_changes():
    mlp, count = Mlp(0), 20_000
    x = normal(1, count, WIDTH)
    before = x @ mlp.up
    gates = 1 - torch.tanh(before).square()
    error = 1e-5 * normal(2, WIDTH, HIDDEN) * mlp.up  # a change of the weights
    metric = first_order_unit_metric(mlp.down, gates.T @ gates / count)
    assert float(torch.linalg.eigvalsh(metric)[0]) > -1e-9 * float(metric.diagonal().max())
    noise = 1e-5 * normal(3, count, HIDDEN)  # an error that does not depend on the gates
    change = (torch.tanh(before + noise) - torch.tanh(before)) @ mlp.down
    predicted = float((metric * (noise.T @ noise / count)).sum())
    assert float(change.square().sum()) / count == pytest.approx(predicted, rel=0.03)
    change = (torch.tanh(x @ (mlp.up + error)) - torch.tanh(before)) @ mlp.down
    predicted = metric_loss(error, input_metric=x.T @ x / count, output_metric=metric)
    assert float(change.square().sum()) / count == pytest.approx(predicted, rel=0.5)
