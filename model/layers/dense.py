"""The weight matrix itself, with the face of its replacements. Stored (in, out), like GPT-2's `Conv1D`."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import Dense
from model.layers.choice import CostModel
from model.layers.structured import StructuredLinear, normal_


class DenseLinear(StructuredLinear):
    """y = xW + b with `weight` (n_in, n_out)."""

    def __init__(self, matrix: Dense, n_in: int, n_out: int, *, n_bias: int) -> None:
        super().__init__(matrix, n_in, n_out, n_bias=n_bias)
        self.weight = nn.Parameter(torch.zeros(n_in, n_out))
        self.cost_model = CostModel(
            share=self.share, efficiency=0.5, forming=0.0
        )  # W is there: never factored

    def product(self, x: Tensor) -> Tensor:
        """xW: (..., n_in) -> (..., n_out)."""
        return x @ self.weight

    def weight_matrix(self) -> Tensor:
        """W (n_in, n_out), the parameter itself."""
        return self.weight

    def init_weights(self, *, std: float, generator: torch.Generator) -> None:
        """N(0, std); biases 0."""
        normal_(self.weight, std=std, generator=generator)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., n_in) -> (..., n_out), whatever the mode."""
        return F.linear(x, self.weight.mT, self.full_bias())
