"""Tables that turn token ids into vectors, and, where the head is tied, vectors back into logits.

A Kronecker table (KnGPT2) is (vocab x n1) (x) (1 x n2): a narrow table, each entry spread by a short row.
"""

# r terms; B batch, T tokens, V rows of the table, C width

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Kron
from model.layers.structured import ParameterTag, Tagged, normal_


class Embedding(Tagged):
    """A dense table `weight` (V, C)."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(rows, width))

    def forward(self, idx: Tensor) -> Tensor:
        """Rows of the table: (B, T) -> (B, T, C)."""
        return F.embedding(idx, self.weight)

    def logits(self, x: Tensor) -> Tensor:
        """Inner products with every row: (..., C) -> (..., V)."""
        return F.linear(x, self.weight)

    def table(self) -> Tensor:
        """The dense table (V, C)."""
        return self.weight

    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """N(0, std)."""
        normal_(self.weight, std=std, generator=generator)

    def tags(self) -> Mapping[str, ParameterTag]:
        """Group `embedding`."""
        return {"weight": ParameterTag("embedding", decay=True)}


class KroneckerEmbedding(Tagged):
    """sum_k s_k A_k (x) b_k: `left` A (r, V, n1), `right` b (r, 1, n2); columns permuted if asked for."""

    gather_out: Tensor | None

    def __init__(self, matrix: Kron) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.zeros(matrix.terms, matrix.m1, matrix.n1))
        self.right = nn.Parameter(torch.zeros(matrix.terms, 1, matrix.n2))
        self.scales = nn.Parameter(torch.ones(matrix.terms)) if matrix.scales else None
        width = matrix.n1 * matrix.n2
        self.register_buffer("gather_out", torch.arange(width) if matrix.gather_out else None)

    def rows(self) -> Tensor:
        """The short rows s_k b_k, (r, n2)."""
        return self.right[:, 0] if self.scales is None else self.right[:, 0] * self.scales[:, None]

    def forward(self, idx: Tensor) -> Tensor:
        """Rows of the table: (B, T) -> (B, T, C)."""
        narrow = F.embedding(idx, self.left.transpose(0, 1).flatten(1))  # (B, T, r*n1)
        narrow = narrow.reshape(*idx.shape, self.left.shape[0], self.left.shape[2])  # (B, T, r, n1)
        wide = (narrow.mT @ self.rows()).flatten(-2)  # (B, T, n1*n2)
        return wide if self.gather_out is None else wide[..., self.gather_out]

    def logits(self, x: Tensor) -> Tensor:
        """Inner products with every row, through the factors: (..., C) -> (..., V)."""
        if self.gather_out is not None:
            x = x[..., self.gather_out.argsort()]
        narrow = x.reshape(*x.shape[:-1], self.left.shape[2], -1) @ self.rows().mT  # (..., n1, r)
        return F.linear(narrow.mT.flatten(-2), self.left.transpose(0, 1).flatten(1))  # (..., V)

    def table(self) -> Tensor:
        """The dense table (V, C)."""
        return self.forward(torch.arange(self.left.shape[1], device=self.left.device))

    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """Both factors N(0, (std / sqrt(terms))^1/2); scales 1."""
        each = (std / self.left.shape[0] ** 0.5) ** 0.5
        normal_(self.left, std=each, generator=generator)
        normal_(self.right, std=each, generator=generator)
        if self.scales is not None:
            nn.init.ones_(self.scales)

    def tags(self) -> Mapping[str, ParameterTag]:
        """The table is `embedding`, its short row and scales `factor_small`."""
        return {
            "left": ParameterTag("embedding", decay=True),
            "right": ParameterTag("factor_small", decay=True),
            "scales": ParameterTag("factor_small", decay=False),
        }
