"""A weight held as a sum of Kronecker products, W = sum_k s_k A_k (x) B_k, and used without forming it.

Reshape x, multiply by one factor, multiply by the other; which comes first decides the cost, so the cheaper
order is taken. A factor B with a side of 1 needs no transposition between the two products: its own path.
"""

# r terms; `left` holds A (r, m1, n1), `right` holds B (r, m2, n2); W is (m1*m2, n1*n2) = (in, out)

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from model.algebra.kron import kron_apply, kron_sum
from model.algebra.shapes import KronShape, Order
from model.config import Kron
from model.layers.choice import Way, kronecker_cost
from model.layers.one_token import MOST, OneToken, is_inference, is_one_token, through
from model.layers.structured import ParameterTag, StructuredLinear, normal_


class KroneckerLinear(StructuredLinear):
    """y = (x[..., gather_in] W)[..., gather_out] + b; the gathers exist only where `matrix` asks for them.

    `order` forces a contraction order in factored mode; `auto` takes the cheaper one.
    """

    gather_in: Tensor | None
    gather_out: Tensor | None

    def __init__(self, matrix: Kron, n_in: int, n_out: int, *, n_bias: int) -> None:
        super().__init__(matrix, n_in, n_out, n_bias=n_bias)
        self.shape = KronShape(matrix.m1, matrix.n1, matrix.m2, matrix.n2)
        self.order: Order | Literal["auto"] = "auto"
        self.decay_right = matrix.decay_right
        sides = (matrix.m1, matrix.n1, matrix.m2, matrix.n2)
        self.cost_model = kronecker_cost(self.share, sides, terms=matrix.terms)
        self.left = nn.Parameter(torch.zeros(matrix.terms, matrix.m1, matrix.n1))
        self.right = nn.Parameter(torch.zeros(matrix.terms, matrix.m2, matrix.n2))
        self.scales = nn.Parameter(torch.ones(matrix.terms)) if matrix.scales else None
        self._prepared: tuple[tuple[object, ...], str, OneToken] | None = None
        self.register_buffer("gather_in", torch.arange(n_in) if matrix.gather_in else None)
        self.register_buffer("gather_out", torch.arange(n_out) if matrix.gather_out else None)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with the scales folded into the smaller one."""
        if self.scales is None:
            return self.left, self.right
        scales = self.scales[:, None, None]
        if self.left.numel() < self.right.numel():
            return self.left * scales, self.right
        return self.left, self.right * scales

    def product(self, x: Tensor) -> Tensor:
        """xW without forming W: (..., n_in) -> (..., n_out)."""
        if self.gather_in is not None:
            x = x[..., self.gather_in]
        left, right = self.factors()
        order = self._taken_order()
        if self.shape.m2 == 1 and order == "a_first":
            y = _row_product(x, left, right)
        elif self.shape.n2 == 1 and order == "b_first":
            y = _column_product(x, left, right)
        else:
            y = kron_apply(x, left, right, order=order)
        return y if self.gather_out is None else y[..., self.gather_out]

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out)."""
        if is_one_token(x, width=self.n_in) and (alone := self.for_one_token()):
            return through((alone,), x, width=self.n_out)
        return super().forward(x)

    def resolve_mode(self, tokens: int) -> Way:
        """What `forward` does with so many tokens, here and now."""
        if tokens == 1 and is_inference(self.left) and self.for_one_token():
            return "factored"
        return super().resolve_mode(tokens)

    def for_one_token(self) -> OneToken | None:
        """The factors as one token wants them, where they may stand for the parameters and are fast."""
        if self.training or (self.mode != "factored" and (self.mode != "auto" or self.share > MOST)):
            return None
        state, prepared = self._state(), self._prepared
        if prepared is not None and prepared[0] == state and prepared[1] == self.order:
            return prepared[2]
        if state is None or self.left.dtype is not torch.float32:
            return None
        gathers = (self.gather_in, self.gather_out)
        order = OneToken.order_of(self.shape) if self.order == "auto" else self.order
        one = OneToken.of(self.factors(), self.full_bias(), order=order, gathers=gathers)
        self._prepared = (state, self.order, one)
        return one

    def _taken_order(self) -> Order:
        return self.shape.cheaper_order if self.order == "auto" else self.order

    def train(self, mode: bool = True) -> "KroneckerLinear":  # noqa: FBT001, FBT002 - torch's signature
        """As in torch; what was prepared is dropped."""
        self._prepared = None
        super().train(mode)
        return self

    def weight_matrix(self) -> Tensor:
        """W (n_in, n_out), gathers included."""
        weight = kron_sum(*self.factors())
        if self.gather_in is not None:
            weight = weight[self.gather_in.argsort()]
        return weight if self.gather_out is None else weight[:, self.gather_out]

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{super().extra_repr()}, order={self.order}"

    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """Both factors N(0, (std / sqrt(terms))^1/2), so that the sum has entries of that std; scales 1."""
        each = (std / self.left.shape[0] ** 0.5) ** 0.5
        normal_(self.left, std=each, generator=generator)
        normal_(self.right, std=each, generator=generator)
        for parameter, value in ((self.scales, 1.0), (self.bias, 0.0)):
            if parameter is not None:
                nn.init.constant_(parameter, value)

    def tags(self) -> Mapping[str, ParameterTag]:
        """The larger factor is `factor_big`, the other one and the scales `factor_small`."""
        left_is_big = self.left.numel() >= self.right.numel()
        return {
            "left": ParameterTag("factor_big" if left_is_big else "factor_small", decay=True),
            "right": ParameterTag("factor_small" if left_is_big else "factor_big", decay=self.decay_right),
            "scales": ParameterTag("factor_small", decay=False),
            "bias": ParameterTag("dense", decay=False),
        }


def _row_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x times sum_k A_k (x) B_k with B_k (1, q), A first: every result of A feeds q neighbouring outputs."""
    r, m1, n1 = left.shape
    y = x @ left.permute(1, 2, 0).reshape(m1, n1 * r)  # (..., n1*r)
    return (y.reshape(*x.shape[:-1], n1, r) @ right[:, 0]).flatten(-2)  # (..., n1*q)


def _column_product(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """x times sum_k A_k (x) B_k with B_k (q, 1), B first: q neighbouring inputs are mixed, then meet A."""
    r, m1, n1 = left.shape
    y = (x.reshape(*x.shape[:-1], m1, right.shape[1]) @ right[:, :, 0].mT).flatten(-2)  # (..., m1*r)
    return y @ left.transpose(0, 1).reshape(m1 * r, n1)  # (..., n1)
