"""How many parameters may remain, and the largest structure that keeps it. Integers only, loads no torch.

The cap is never exceeded and never rounded up. What does not fit, or falls too far below, is an error that
says by how much and which settings would do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from model.config import Convention, ModelError, ModelSpec

Allocation = Literal["uniform", "modegpt_bi", "greedy_gain"]
"""How a cap is spread over modules."""


class BudgetError(ModelError):
    """A structure does not keep its cap, or falls too far below it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """A cap on unique parameters."""

    params: int = 0
    """Largest number of parameters; 0 sets no cap."""

    convention: Convention = "tied_all"
    """What is counted."""

    tolerance: float = 0.002
    """How far below the cap the result may lie, relative."""

    allocate: Allocation = "uniform"
    """How the cap is spread over modules."""

    def __post_init__(self) -> None:
        if self.params < 0:
            raise ModelError(f"budget.params={self.params:,} must be 0 (no cap) or more")
        if not 0.0 <= self.tolerance < 1.0:
            raise ModelError(f"budget.tolerance={self.tolerance} must lie in [0, 1)")

    def fits(self, count: int) -> bool:
        """Whether so many parameters keep the cap and its tolerance."""
        return not self.params or self.params * (1 - self.tolerance) <= count <= self.params

    def check(self, spec: ModelSpec, *, what: str, hint: Callable[[], str]) -> None:
        """Raise ModelError unless the model keeps the cap; `hint` names what would."""
        count = spec.num_parameters(self.convention)
        if self.fits(count):
            return
        gap = count - self.params
        relation = f"{gap:,} above" if gap > 0 else f"{-gap:,} ({-gap / self.params:.2%}) below"
        allowed = "" if gap > 0 else f", more than the {self.tolerance:.2%} allowed"
        cap = f"the cap of {self.params:,} ({self.convention})"
        raise BudgetError(f"{what} has {count:,} parameters, {relation} {cap}{allowed}; {hint()}")

    def require_uniform(self, method: str) -> None:
        """Raise ModelError for an allocation that the method does not know."""
        if self.allocate != "uniform":
            raise ModelError(f"{method} spreads a budget evenly only; set budget.allocate to 'uniform'")

    def most_terms(self, *, base: int, per_term: int, max_terms: int) -> int:
        """Largest number of terms with `base + terms * per_term` at most the cap; 0 if not even one fits."""
        return max(0, min(max_terms, (self.params - base) // per_term))
