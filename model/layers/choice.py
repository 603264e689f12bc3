"""Which way to multiply is the fastest: a model of the cost, in units of the dense product of one token.

Factored costs `share / efficiency` per token. Forming W first costs 1 per token and, once per call, as much
as `forming` tokens. In inference W may be kept, which costs 1; with few tokens both only read their numbers,
and the many small steps of a factored product weigh more. The constants are those of the CPUs that
`benchmarks/plans.py` was run on (docs/performance.md); a layer can be told otherwise by its `mode`.
"""

from dataclasses import dataclass
from typing import Literal

Way = Literal["factored", "materialize", "cached"]

KEPT_BEYOND = 0.9
"""Price of the factored product, dense being 1, from which a kept W is faster; it needs fewer calls."""

FEW_TOKENS = 64
"""Below, a product on a CPU takes the time of reading its numbers ..."""

KEPT_BEYOND_FEW = {"fp32": 0.6, "bf16": 0.4}
"""... and these are the shares, by the type of the numbers that are read."""

EFFICIENCY = 0.8
"""Of Kronecker products of many tokens, per multiply-accumulate; two plain products of a low rank have 1."""

LONG_SIDE = 128
EFFICIENCY_OF_SHORT_SIDES = 0.4
"""Of those none of whose factors has a side as long as `LONG_SIDE`: their products do not fill the units."""

FORMING_PER_TERM = 100.0
"""Tokens whose dense product takes as long as forming one Kronecker term, with its gradients."""


@dataclass(frozen=True, slots=True)
class CostModel:
    """What a kind of layer costs against the dense one."""

    share: float
    """Multiply-accumulates of the factored product over those of the dense one."""

    efficiency: float
    """How fast the factored product does one, dense being 1."""

    forming: float
    """Tokens whose dense product takes as long as forming W, with its gradients."""

    def in_training(self, tokens: int) -> Way:
        """Factored unless its price per token pays for the forming of W."""
        dearer = self.share / self.efficiency - 1.0
        return "materialize" if dearer > 0 and dearer * tokens > self.forming else "factored"

    def in_inference(self, tokens: int, *, few: Literal["fp32", "bf16"] | None) -> Way:
        """Factored or kept; `few` is the type that is read where few tokens are a matter of reading."""
        if few is not None and tokens < FEW_TOKENS:
            return "cached" if self.share > KEPT_BEYOND_FEW[few] else "factored"
        return "cached" if self.share > KEPT_BEYOND * self.efficiency else "factored"


def kronecker_cost(share: float, sides: tuple[int, int, int, int], *, terms: int) -> CostModel:
    """Of a sum of `terms` products of factors with these `sides` (m1, n1, m2, n2)."""
    efficiency = EFFICIENCY if max(sides) >= LONG_SIDE else EFFICIENCY_OF_SHORT_SIDES
    return CostModel(share=share, efficiency=efficiency, forming=FORMING_PER_TERM * terms)
