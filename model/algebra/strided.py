"""Keep every m2-th row and n2-th column of a weight: one Kronecker term that is W itself on a stride.

The pruning start of Krony-PT. A = W[o_row::m2, o_col::n2] and B is 1 at the offset, so nothing is
approximated where it is kept, and the error is the energy of what is dropped. An up/down pair must keep the
same hidden units, or what one writes the other drops.
"""

import torch
from torch import Tensor

from model.algebra.kron import check_weight
from model.algebra.shapes import KronShape
from model.config import ModelError


def strided_kron(
    weight: Tensor, shape: KronShape, *, offset: tuple[int, int] = (0, 0), eps: float = 0.0
) -> tuple[Tensor, Tensor]:
    """One term that keeps every m2-th row and n2-th column of W: the pruning start of Krony-PT.

    A = W[offset_row::m2, offset_col::n2], B has a 1 at `offset` and `eps` elsewhere; no gauge, so A is W
    itself. With eps = 0 the error is the energy of the dropped entries. Returns left (1, m1, n1), right (1,
    m2, n2).
    """
    check_weight(weight, shape)
    row, col = offset
    if not (0 <= row < shape.m2 and 0 <= col < shape.n2):
        raise ModelError(
            f"offset {offset} of {shape}: choose rows 0 to {shape.m2 - 1}, columns 0 to {shape.n2 - 1}"
        )
    left = weight.detach().double()[row :: shape.m2, col :: shape.n2].clone()
    right = torch.full((shape.m2, shape.n2), eps, dtype=torch.float64, device=left.device)
    right[row, col] = 1.0
    return left[None], right[None]


def strided_energy(weight: Tensor, shape: KronShape, *, row_weights: Tensor | None = None) -> Tensor:
    """Energy that each offset of `strided_kron` keeps, (m2, n2); rows weighted (m,), e.g. by E[x_i^2]."""
    check_weight(weight, shape)
    energy = weight.detach().double().square()
    if row_weights is not None:
        energy = energy * row_weights.double()[:, None]
    return energy.reshape(shape.m1, shape.m2, shape.n1, shape.n2).sum(dim=(0, 2))


def pair_offsets(up_energy: Tensor, down_energy: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """Best offsets (row, hidden) of an up-projection and (hidden, col) of the down-projection, hidden shared.

    Takes the energies of `strided_energy`, (m2, n2) and (n2, m2), and maximises their sum; lower offsets win
    ties.
    """
    best_row, best_col = up_energy.amax(dim=0), down_energy.amax(dim=1)  # (n2,), (n2,)
    hidden = int((best_row + best_col).argmax())
    return (int(up_energy[:, hidden].argmax()), hidden), (hidden, int(down_energy[hidden].argmax()))
