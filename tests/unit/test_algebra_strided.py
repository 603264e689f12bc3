"""The pruning start: W itself on a stride, error the dropped energy, one hidden offset for the pair."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from model.algebra.kron import kron_sum
from model.algebra.shapes import KronShape
from model.algebra.strided import pair_offsets, strided_energy, strided_kron
from model.config import ModelError

SHAPE = KronShape(6, 9, 4, 2)
WEIGHT = torch.randn(24, 18, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("offset", itertools.product(range(4), range(2)))
def test_it_is_the_weight_masked_to_a_stride(offset: tuple[int, int]):
    mask = torch.outer(torch.arange(24) % 4 == offset[0], torch.arange(18) % 2 == offset[1])
    dense = kron_sum(*strided_kron(WEIGHT, SHAPE, offset=offset))
    assert torch.equal(dense, torch.where(mask, WEIGHT, 0.0))
    dropped = float(WEIGHT[~mask].square().sum())
    assert float((WEIGHT - dense).square().sum()) == pytest.approx(dropped)
    kept = strided_energy(WEIGHT, SHAPE)[offset]
    assert float(kept) == pytest.approx(float(WEIGHT.square().sum()) - dropped)


def test_eps_fills_the_zeros_of_the_second_factor():
    left, right = strided_kron(WEIGHT, SHAPE, offset=(1, 1), eps=0.1)
    assert torch.equal(left[0], WEIGHT[1::4, 1::2])
    assert right[0, 1, 1] == 1
    assert_close(right[0].flatten().sort().values[:-1], torch.full((7,), 0.1, dtype=torch.float64))


def test_krony_95m_keeps_every_second_input_of_the_up_projection():
    weight = torch.arange(24.0).reshape(4, 6)
    left, right = strided_kron(weight, KronShape(2, 6, 2, 1))
    assert torch.equal(left[0], weight[0::2].double())
    assert right.flatten().tolist() == [1.0, 0.0]


def test_weights_of_the_rows_change_the_choice():
    loud = torch.zeros(24)
    loud[2::4] = 1
    energy = strided_energy(WEIGHT, SHAPE, row_weights=loud)
    assert int(energy.sum(dim=1).argmax()) == 2
    assert float(energy[[0, 1, 3]].sum()) == 0


def test_the_pair_shares_its_hidden_offset_and_is_the_best_that_does():
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        up, down = (torch.rand(shape, generator=generator) for shape in ((4, 2), (2, 4)))
        (row, hidden), (hidden_down, col) = pair_offsets(up, down)
        assert hidden == hidden_down
        best = max(up[r, h] + down[h, c] for r in range(4) for h in range(2) for c in range(4))
        assert float(up[row, hidden] + down[hidden, col]) == pytest.approx(float(best))


def test_the_output_of_the_pruned_pair_depends_on_its_input():
    up = WEIGHT
    down = torch.randn(18, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    first, second = pair_offsets(strided_energy(up, SHAPE), strided_energy(down, SHAPE.transposed()))
    hidden = kron_sum(*strided_kron(up, SHAPE, offset=first))
    output = kron_sum(*strided_kron(down, SHAPE.transposed(), offset=second))
    assert float((hidden @ output).abs().max()) > 0
    other = (1 - second[0], second[1])
    assert float((hidden @ kron_sum(*strided_kron(down, SHAPE.transposed(), offset=other))).abs().max()) == 0


def test_an_offset_outside_the_stride_is_refused():
    with pytest.raises(ModelError, match="rows 0 to 3, columns 0 to 1"):
        strided_kron(WEIGHT, SHAPE, offset=(4, 0))
