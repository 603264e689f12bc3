"""One token through a sum of Kronecker products: two products with prepared factors, bias and terms included.

With many tokens the multiplications count, with one the calls and the reading. As Y = sum_k A_k^T X B_k, for
the token as a matrix X, the sum over the terms is part of the second product if the factors are laid side by
side beforehand. They are kept in fp32, whatever the precision asked for: on CPUs a product of one column with
a bf16 matrix takes longer than with an fp32 one, though that has twice the bytes.

BLAS libraries multiply a matrix and one column on a single thread. As a batch of blocks of rows, all threads
do, and memory is read two to three times as fast.
"""

# r terms · A (r, m1, n1) · B (r, m2, n2) · X (m1, m2) · Y and bias (n1, n2) · h blocks of the rows of A^T

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from model.algebra.kron import shape_of
from model.algebra.shapes import KronShape, Order

BLOCK = 65_536
"""Numbers of a block."""

MOST = 1.5
"""Share of the dense multiply-accumulates beyond which a kept W is faster; it is read by one thread."""

LESS = 0.75
"""A first is three operators, B first two: it has to save a quarter of the multiply-accumulates."""


def is_inference(tensor: Tensor) -> bool:
    """Whether nothing is differentiated or compiled here, on a CPU."""
    return tensor.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def is_one_token(x: Tensor, *, width: int) -> bool:
    """Whether x (..., width) is a single token of inference, of a type that may be computed in fp32."""
    if x.numel() != width or not is_inference(x):
        return False
    return x.dtype is torch.float32 or (
        torch.is_autocast_enabled("cpu") and x.dtype is torch.get_autocast_dtype("cpu")
    )


def through(steps: tuple[Callable[[Tensor], Tensor], ...], x: Tensor, *, width: int) -> Tensor:
    """One token (..., C) through steps whose order of numbers counts, not their shape: (..., width).

    The steps get fp32 and no autocast; the result is of the type that was asked for.
    """
    y = x.float().contiguous()  # a slice of one row may be strided
    half = torch.is_autocast_enabled("cpu")
    if half:
        torch.set_autocast_enabled("cpu", False)
    try:
        for step in steps:
            y = step(y)
    finally:
        if half:
            torch.set_autocast_enabled("cpu", True)
    if half:
        y = y.to(torch.get_autocast_dtype("cpu"))
    return y.view(*x.shape[:-1], width)


@dataclass(frozen=True, slots=True, eq=False)
class OneToken:
    """x (m1*m2,) -> (x[gather_in] W)[gather_out] + b, (n1*n2,).

    Detached from the layer, some of it in the same memory; good until a parameter of the layer changes. What
    changes through `parameter.data` in evaluation is not noticed: call `train()` and `eval()` after it.
    """

    order: Order
    token: tuple[int, int]
    """(m1, m2)."""
    left: Tensor
    """A^T in blocks: (h, n1*r/h, m1) if A comes first, else (h, n1/h, r*m1)."""
    right: Tensor
    """B (r*m2, n2) if A comes first, else B^T (n2*r, m2)."""
    bias: Tensor
    """(n1, n2) if A comes first, else (h, n1/h, n2); before the gather."""
    gathers: tuple[Tensor | None, Tensor | None]
    """Of the inputs and of the outputs."""

    @staticmethod
    def order_of(shape: KronShape) -> Order:
        """The faster order for one token."""
        b_first, a_first = shape.macs()
        return "a_first" if a_first < LESS * b_first else "b_first"

    @staticmethod
    def of(
        factors: tuple[Tensor, Tensor],
        bias: Tensor | None,
        *,
        order: Order,
        gathers: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> "OneToken":
        """Prepare the factors (r, m1, n1), (r, m2, n2) and the bias (n1*n2,) of a layer."""
        left, right = (each.detach().float() for each in factors)
        shape = shape_of(left, right)
        m1, n1, m2, n2 = shape.m1, shape.n1, shape.m2, shape.n2
        full = left.new_zeros(n1 * n2) if bias is None else bias.detach().float().clone()
        if gathers[1] is not None:
            full = full[gathers[1].argsort()]
        if order == "a_first":
            rows = left.permute(2, 0, 1).flatten(0, 1)  # (n1*r, m1)
            right, full = right.flatten(0, 1), full.view(n1, n2)
            h = _blocks(rows) if m2 == 1 else 1
        else:
            rows = left.permute(2, 0, 1).flatten(1)  # (n1, r*m1)
            right = right.permute(2, 0, 1).flatten(0, 1)
            h = _blocks(rows) if n2 == 1 else 1
            full = full.view(h, n1 // h, n2)
        blocks = rows.reshape(h, len(rows) // h, rows.shape[1]).contiguous()
        return OneToken(order, (m1, m2), blocks, right.contiguous(), full, gathers)

    def __call__(self, x: Tensor) -> Tensor:
        """fp32 -> fp32, contiguous, of any shape; autocast must be off."""
        gather_in, gather_out = self.gathers
        if gather_in is not None:
            x = x.view(-1).index_select(0, gather_in)
        y = self._a_first(x) if self.order == "a_first" else self._b_first(x)
        return y if gather_out is None else y.view(-1).index_select(0, gather_out)

    # BLAS is fast with columns whose numbers lie side by side: X, and what follows it, is made transposed.
    # One `as_strided` is a view, a transposition and a repetition for every block at once.

    def _a_first(self, x: Tensor) -> Tensor:
        m1, m2 = self.token
        if m2 > 1:
            x = x.as_strided((m2, m1), (1, m2)).contiguous()
        y = torch.bmm(self.left, x.as_strided((len(self.left), m1, m2), (0, 1, m1)))  # (h, n1*r/h, m2)
        return torch.addmm(self.bias, y.view(len(self.bias), -1), self.right)

    def _b_first(self, x: Tensor) -> Tensor:
        m1, m2 = self.token
        h, _, width = self.left.shape
        y = torch.mm(self.right, x.as_strided((m2, m1), (1, m2)))  # (n2*r, m1)
        columns = y.as_strided((h, width, self.bias.shape[2]), (0, 1, width))
        return torch.baddbmm(self.bias, self.left, columns)


def _blocks(rows: Tensor) -> int:
    """The most blocks of equally many rows that have at least `BLOCK` numbers each."""
    return next(h for h in range(max(1, rows.numel() // BLOCK), 0, -1) if len(rows) % h == 0)
