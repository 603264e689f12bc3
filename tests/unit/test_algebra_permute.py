"""Permuted pairs: every step exact, never worse than the stored order, one hidden order that folds away."""

import itertools
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from model.algebra.kron import nearest_kron, rearrange, unrearrange
from model.algebra.permute import (
    Orders,
    _Pair,
    norm_split,
    permuted_kron_pair,
)
from model.algebra.regroup import Grid, align_levels, minimal_order
from model.algebra.shapes import KronShape
from model.config import ModelError

SHAPES = [KronShape(3, 4, 2, 3), KronShape(6, 3, 1, 4), KronShape(2, 6, 3, 2), KronShape(6, 12, 1, 1)]


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def pair_of(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(seed, 6, 12), 2 * normal(seed + 1, 12, 6)


def is_order(order: torch.Tensor) -> bool:
    return sorted(order.tolist()) == list(range(len(order)))


def test_an_assignment_is_the_best_of_all_permutations():
    cost = normal(0, 6, 6)
    best = min(sum(cost[i, p] for i, p in enumerate(order)) for order in itertools.permutations(range(6)))
    order = minimal_order(cost)
    assert float(cost[torch.arange(6), order].sum()) == pytest.approx(float(best))


def test_norm_split_gives_places_that_share_an_inner_index_similar_norms():
    norms = normal(2, 12)
    order = norm_split(norms, outer=4, inner=3)
    assert is_order(order)
    places = norms[order].reshape(4, 3)
    for level in range(2):
        assert places[:, level].min() > places[:, level + 1].max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("terms", [1, 2])
@pytest.mark.parametrize("hidden", ["shared", "separate"])
def test_history_never_rises_and_the_pair_is_never_worse_than_van_loan(shape, terms, hidden):
    terms = min(terms, shape.max_terms)
    for seed in range(4):
        up, down = pair_of(seed)
        found = permuted_kron_pair(up, down, shape, terms=terms, hidden=hidden, seed=seed)
        how = found.convergence
        assert all(later < earlier for earlier, later in pairwise(how.history))
        assert found.loss == how.history[-1] == min(loss for _, loss in how.by_start)
        stored = nearest_kron(up, shape, terms=terms).error
        stored += nearest_kron(down, shape.transposed(), terms=terms).error
        assert found.loss <= stored * (1 + 1e-12)
        new_up, new_down = found.dense()
        measured = float((up - new_up).square().sum() + (down - new_down).square().sum())
        assert found.loss == pytest.approx(measured, rel=1e-8, abs=1e-18)
        orders = found.orders
        for order in (orders.inputs, orders.hidden, orders.hidden_down, orders.outputs):
            assert is_order(order)
        if hidden == "shared":
            assert torch.equal(orders.hidden, orders.hidden_down)
        again = orders.put_back(*orders.pick(up, down))
        assert torch.equal(again[0], up)
        assert torch.equal(again[1], down)


def test_many_levels_of_the_residual_side_are_ordered_too():
    shape, gains = KronShape(2, 4, 6, 3), []
    for seed in range(4):
        up, down = normal(seed, 12, 12), normal(seed + 10, 12, 12)
        found = permuted_kron_pair(up, down, shape, terms=2, seed=seed)
        inner = permuted_kron_pair(up, down, shape, terms=2, seed=seed, outer=False)
        gains.append(inner.loss - found.loss)
        assert all(later < earlier for earlier, later in pairwise(found.convergence.history))
        new_up, new_down = found.dense()
        measured = float((up - new_up).square().sum() + (down - new_down).square().sum())
        assert found.loss == pytest.approx(measured, rel=1e-8)
    assert sum(gains) > 0


def test_the_shared_hidden_order_folds_and_the_outer_ones_are_gathers():
    up, down = pair_of(0)
    bias_up, bias_down, x = normal(3, 12), normal(4, 6), normal(5, 7, 6)
    found = permuted_kron_pair(up, down, SHAPES[0], terms=1)
    o = found.orders
    inner = torch.tanh(x[:, o.inputs] @ found.up.dense() + bias_up[o.hidden]) @ found.down.dense()
    native = torch.empty(7, 6, dtype=torch.float64)
    native[:, o.outputs] = inner
    new_up, new_down = found.dense()
    assert_close(native + bias_down, torch.tanh(x @ new_up + bias_up) @ new_down + bias_down)


def test_orders_that_cannot_matter_stay_as_stored():
    up, down = pair_of(1)
    flat = permuted_kron_pair(up, down, KronShape(6, 3, 1, 4), terms=1).orders
    assert flat.inputs.tolist() == flat.outputs.tolist() == list(range(6))
    assert flat.hidden.tolist() != list(range(12))
    tall = permuted_kron_pair(up, down, KronShape(2, 12, 3, 1), terms=1).orders
    assert tall.hidden.tolist() == list(range(12))
    inner = permuted_kron_pair(up, down, SHAPES[0], terms=1, outer=False).orders
    assert inner.inputs.tolist() == inner.outputs.tolist() == list(range(6))
    nothing = permuted_kron_pair(up, down, KronShape(6, 12, 1, 1), terms=1)
    assert [name for name, _ in nothing.convergence.by_start] == ["norm_split", "identity"]


def test_a_hidden_order_is_found_again():
    shape = KronShape(8, 6, 1, 4)
    levels = torch.tensor([[4.0, 2.0, 1.0, 0.5]]).double()  # norms tell the levels apart
    scramble = torch.from_numpy(np.random.default_rng(3).permutation(24))
    up = torch.kron(normal(0, 8, 6), levels)[:, scramble]
    down = torch.kron(normal(1, 6, 8), levels.reshape(4, 1))[scramble]
    energy = float(up.square().sum() + down.square().sum())
    assert nearest_kron(up, shape, terms=1).error > 0.2 * float(up.square().sum())
    found = permuted_kron_pair(up, down, shape, terms=1)
    assert found.loss < 0.1 * energy


def test_regrouping_a_level_never_lowers_the_energy_that_a_fit_holds():
    shape = KronShape(4, 6, 2, 3)
    for seed in range(5):
        up = normal(seed, 8, 18)
        fit = nearest_kron(up, shape, terms=2)
        right = fit.right / fit.right.flatten(1).norm(dim=1)[:, None, None]
        order = align_levels(torch.arange(18), [(up.T, right)], groups=6)
        assert is_order(order)
        levels = torch.arange(18).reshape(6, 3)
        assert torch.equal(order.reshape(6, 3).sort(dim=0).values, levels)  # units stay in their level
        after = nearest_kron(up[:, order], shape, terms=2)
        assert after.error <= fit.error * (1 + 1e-12)


def test_a_level_is_regrouped_as_well_as_any_permutation_of_it():
    units, right = normal(0, 8, 5), normal(1, 1, 1, 2)
    right = right / right.norm()

    def energy(order: torch.Tensor) -> float:  # what a fit holds with this B and the best A
        return float((units[order.reshape(4, 2)] * right.reshape(1, 2, 1)).sum(dim=1).square().sum())

    stored = torch.arange(8)
    first_level = [
        torch.stack([stored.reshape(4, 2)[list(order), 0], stored.reshape(4, 2)[:, 1]], dim=1).reshape(-1)
        for order in itertools.permutations(range(4))
    ]
    best = max(energy(order) for order in first_level)
    found = align_levels(stored, [(units, right)], groups=4)
    assert best > energy(stored)
    assert energy(found) >= best * (1 - 1e-12)


def test_the_residual_side_is_regrouped_as_well_as_any_permutation_of_a_depth():
    weight, basis = normal(0, 5, 8), normal(1, 1, 1, 2)
    basis, stored = basis / basis.norm(), torch.arange(8)

    def energy(order: torch.Tensor) -> float:
        return float((weight[:, order].reshape(5, 4, 2) * basis.reshape(2)).sum(dim=2).square().sum())

    grid = Grid(weight, KronShape(5, 4, 1, 2), hidden=torch.arange(5), outer=stored, basis=basis)
    grid.regroup_outer()
    first_depth = [
        torch.stack([stored.reshape(4, 2)[list(order), 0], stored.reshape(4, 2)[:, 1]], dim=1).reshape(-1)
        for order in itertools.permutations(range(4))
    ]
    best = max(energy(order) for order in first_depth)
    assert best > energy(stored)
    assert energy(grid.outer) >= best * (1 - 1e-12)


@pytest.mark.parametrize("shape", [*SHAPES, KronShape(2, 2, 3, 6)], ids=str)
@pytest.mark.parametrize("terms", [1, 2])
def test_a_grid_says_what_van_loan_says_in_every_order(shape, terms):
    terms, tall = min(terms, shape.max_terms), shape.transposed()
    units = pair_of(0)[1]
    grid = Grid(units, tall, hidden=torch.arange(12), outer=torch.arange(6))
    for _ in range(3):
        fit = nearest_kron(units[grid.hidden][:, grid.outer], tall, terms=terms)
        assert grid.fit(terms) == pytest.approx(fit.error, abs=1e-12)
        fitted = fit.dense()
        assert_close(grid.row_products(), fitted @ units[grid.hidden][:, grid.outer].T)
        assert_close(grid.column_products(), fitted.T @ units[grid.hidden][:, grid.outer])
        grid.regroup_outer()
        grid.lay(grid.hidden[torch.randperm(12, generator=torch.Generator().manual_seed(terms))], grid.outer)


def test_a_step_is_the_best_of_all_permutations_for_fixed_factors():
    stored, everywhere = torch.arange(4), [torch.tensor(order) for order in itertools.permutations(range(4))]
    moved = 0
    for seed, terms in itertools.product(range(3), (1, 3)):
        up, down = normal(seed, 4, 4), normal(seed + 10, 4, 4)
        pair = _Pair.of(up, down, KronShape(2, 2, 2, 2), terms, is_shared=True, is_outer=True)
        bases = [torch.linalg.qr(normal(seed + k, 4, terms)).Q.T.reshape(terms, 2, 2) for k in (20, 30)]
        fitted = [
            unrearrange(rearrange(each, pair.shape) @ basis.flatten(1).T @ basis.flatten(1), pair.shape)
            for each, basis in zip((up.T, down), bases, strict=True)
        ]  # the nearest sums with these second factors

        def after(step, pair: _Pair) -> Orders:
            grids = tuple(
                Grid(units, pair.shape, hidden=stored, outer=stored, basis=basis)
                for units, basis in zip((pair.up, pair.down), bases, strict=True)  # noqa: B023 - used at once
            )
            step(pair, grids)
            return Orders(grids[0].outer, grids[0].hidden, grids[1].hidden, grids[1].outer)

        def error(orders: Orders) -> float:
            new_up, new_down = orders.pick(up, down)  # noqa: B023 - used at once
            return float(
                (new_up - fitted[0].T).square().sum() + (new_down - fitted[1]).square().sum()  # noqa: B023
            )

        as_stored = Orders(stored, stored, stored, stored)
        found = after(_Pair.reorder_hidden, pair)
        assert torch.equal(found.hidden, found.hidden_down)
        best = min(error(replace(as_stored, hidden=order, hidden_down=order)) for order in everywhere)
        assert error(found) == pytest.approx(best)
        moved += error(found) < error(as_stored)
        pairs = list(itertools.product(everywhere, everywhere))
        best = min(error(replace(as_stored, inputs=one, outputs=two)) for one, two in pairs)
        assert error(after(_Pair.reorder_outer, pair)) == pytest.approx(best)
        best = min(error(replace(as_stored, hidden=one, hidden_down=two)) for one, two in pairs)
        assert error(after(_Pair.reorder_hidden, replace(pair, is_shared=False))) == pytest.approx(best)
    assert moved >= 2


@pytest.mark.parametrize("shape", [KronShape(6, 3, 1, 4), KronShape(3, 6, 2, 2)], ids=str)
def test_the_end_is_a_fixed_point_of_every_step(shape):
    for seed in range(6):
        up, down = pair_of(seed)
        found = permuted_kron_pair(up, down, shape, terms=1, max_sweeps=80)
        pair = _Pair.of(up, down, shape, 1, is_shared=True, is_outer=True)
        assert found.convergence.stopped != "max_iter"
        for step in (pair.reorder_outer, pair.reorder_hidden, pair.regroup):
            grids = pair.grids(found.orders)
            assert sum(grid.fit(1) for grid in grids) == pytest.approx(found.loss)
            step(grids)
            assert sum(grid.fit(1) for grid in grids) >= found.loss * (1 - 1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weights_in_single_precision_are_searched_in_it_and_fitted_in_double(shape):
    for seed in range(4):
        up, down = (each.float() for each in pair_of(seed))
        found = permuted_kron_pair(up, down, shape, terms=1, seed=seed)
        assert found.up.left.dtype == found.down.right.dtype == torch.float64
        fine = permuted_kron_pair(up.double(), down.double(), shape, terms=1, seed=seed)
        assert found.loss == pytest.approx(fine.loss, rel=1e-12)  # the same orders, exactly
        new_up, new_down = found.dense()
        measured = float((up - new_up).square().sum() + (down - new_down).square().sum())
        assert found.loss == pytest.approx(measured, rel=1e-8, abs=1e-18)
        stored = nearest_kron(up, shape, terms=1).error
        stored += nearest_kron(down, shape.transposed(), terms=1).error
        assert found.loss <= stored * (1 + 1e-12)
        assert all(later < earlier for earlier, later in pairwise(found.convergence.history))


def test_a_start_that_is_given_up_was_behind():
    for seed in range(4):
        up, down = pair_of(seed)
        found = permuted_kron_pair(up, down, SHAPES[0], terms=1, seed=seed, random_starts=6)
        assert len(found.convergence.by_start) == 8
        assert dict(found.convergence.by_start)[found.convergence.start] == found.loss
        assert found.convergence.stopped in ("converged", "no_descent")


def test_the_seed_decides_and_bad_arguments_are_refused():
    up, down = pair_of(5)
    one, same = (permuted_kron_pair(up, down, SHAPES[2], terms=1, seed=3) for _ in range(2))
    assert torch.equal(one.orders.hidden, same.orders.hidden)
    assert torch.equal(one.up.left, same.up.left)
    other = permuted_kron_pair(up, down, SHAPES[2], terms=1, seed=4)
    assert one.convergence.by_start != other.convergence.by_start
    with pytest.raises(ModelError, match="must not be negative"):
        permuted_kron_pair(up, down, SHAPES[0], terms=1, max_sweeps=-1)
    with pytest.raises(ModelError, match="6x12 weight"):
        permuted_kron_pair(up.T, down, SHAPES[0], terms=1)
