"""A weight held as a product of two thin matrices, W = first second, which meet x one after the other."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.config import LowRank
from model.layers.choice import CostModel
from model.layers.structured import ParameterTag, StructuredLinear, normal_


class LowRankLinear(StructuredLinear):
    """y = (x first) second + b, with `first` (n_in, rank) and `second` (rank, n_out)."""

    def __init__(self, matrix: LowRank, n_in: int, n_out: int, *, n_bias: int) -> None:
        super().__init__(matrix, n_in, n_out, n_bias=n_bias)
        self.first = nn.Parameter(torch.zeros(n_in, matrix.rank))
        self.second = nn.Parameter(torch.zeros(matrix.rank, n_out))
        self.cost_model = CostModel(share=self.share, efficiency=1.0, forming=float(matrix.rank))

    def product(self, x: Tensor) -> Tensor:
        """xW without forming W: (..., n_in) -> (..., n_out)."""
        return (x @ self.first) @ self.second

    def weight_matrix(self) -> Tensor:
        """W (n_in, n_out)."""
        return self.first @ self.second

    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """Both factors N(0, (std / sqrt(rank))^1/2), so that the product has entries of that std; bias 0."""
        each = (std / self.first.shape[1] ** 0.5) ** 0.5
        normal_(self.first, std=each, generator=generator)
        normal_(self.second, std=each, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def tags(self) -> Mapping[str, ParameterTag]:
        """The larger factor is `factor_big`."""
        first_is_big = self.n_in >= self.n_out
        return {
            "first": ParameterTag("factor_big" if first_is_big else "factor_small", decay=True),
            "second": ParameterTag("factor_small" if first_is_big else "factor_big", decay=True),
            "bias": ParameterTag("dense", decay=False),
        }
