"""How large a compressed model may be, and the largest structure that is. Integers only, loads no torch.

Three caps, of which every one that is set must hold: parameters, multiply-accumulates, and what attention
keeps of the past. None is ever exceeded or rounded up. What does not fit, or stays far below all of them, is
an error that says by how much and which settings would do.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Literal, NamedTuple

from model.config import Convention, ModelError, ModelSpec, Site

Allocation = Literal["uniform", "modegpt_bi", "greedy_gain"]
"""How a cap is spread over modules."""


class BudgetError(ModelError):
    """A structure does not keep its caps, or stays too far below all of them."""


KV_BYTES = 2
"""Bytes of one cached key or value entry: bf16."""


class Size(NamedTuple):
    """What a model costs, or may cost."""

    params: int
    """Unique parameters, in a convention."""

    macs: int = 0
    """Multiply-accumulates per token, factored, with the output head, without attention scores."""

    kv_bytes: int = 0
    """Bytes of keys and values that one token of the past takes, in bf16."""

    def grown(self, step: "Size", times: int = 1) -> "Size":
        """The size with so many times `step` on top."""
        return Size(*(value + times * each for value, each in zip(self, step, strict=True)))


def kv_bytes(spec: ModelSpec) -> int:
    """Bytes of keys and values per token of the past, over all blocks, in bf16."""
    entries = sum(spec.arch.n_head * (block.head_qk + block.head_vo) for block in spec.blocks)
    return KV_BYTES * entries


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """Caps on what a compressed model costs; 0 sets none."""

    params: int = 0
    """Largest number of unique parameters."""

    macs: int = 0
    """Largest number of multiply-accumulates per token, factored, without attention scores."""

    kv_bytes: int = 0
    """Most bytes of keys and values per token of the past, in bf16."""

    convention: Convention = "tied_all"
    """What is counted."""

    tolerance: float = 0.002
    """How far below its caps the result may lie, relative; it must be as near as that to one of them."""

    allocate: Allocation = "uniform"
    """How the caps are spread over modules."""

    def __post_init__(self) -> None:
        for name in Size._fields:
            if getattr(self, name) < 0:
                raise ModelError(f"budget.{name}={getattr(self, name):,} must be 0 (no cap) or more")
        if not 0.0 <= self.tolerance < 1.0:
            raise ModelError(f"budget.tolerance={self.tolerance} must lie in [0, 1)")

    @property
    def caps(self) -> Size:
        """The caps; 0 where there is none."""
        return Size(self.params, self.macs, self.kv_bytes)

    @property
    def is_set(self) -> bool:
        """Whether there is any cap."""
        return any(self.caps)

    def size(self, spec: ModelSpec) -> Size:
        """What a model costs; computed only where there is a cap, 0 elsewhere."""
        return Size(
            spec.num_parameters(self.convention) if self.params else 0,
            spec.macs_per_token("factored") if self.macs else 0,
            kv_bytes(spec) if self.kv_bytes else 0,
        )

    def size_without(self, spec: ModelSpec, replaced: Iterable[Site]) -> Size:
        """The cost of everything but the weight matrices that are to be replaced, as far as it is capped."""
        gone = [Size(site.cost.params - site.n_bias, site.cost.macs) for site in replaced]
        return reduce(lambda left, matrix: left.grown(matrix, -1), gone, self.size(spec))

    def holds(self, size: Size) -> bool:
        """Whether no cap is exceeded."""
        return all(value <= cap for value, cap in self._pairs(size))

    def fits(self, size: Size) -> bool:
        """Whether no cap is exceeded, and one of them is used to within the tolerance."""
        used = [value >= cap * (1 - self.tolerance) for value, cap in self._pairs(size)]
        return self.holds(size) and (any(used) or not used)

    def check(self, spec: ModelSpec, *, what: str, hint: Callable[[], str]) -> None:
        """Raise ModelError unless the model keeps every cap and uses one; `hint` names what would."""
        size = self.size(spec)
        if self.fits(size):
            return
        gaps = [
            (value - cap, f"{value:,} {UNITS[name]}", f"{cap:,}{self._counted(name)}", cap)
            for name, value, cap in zip(Size._fields, size, self.caps, strict=True)
            if cap
        ]
        above = [gap for gap in gaps if gap[0] > 0]
        if above:
            gap, found, cap_text, _ = above[0]
            raise BudgetError(f"{what} has {found}, {gap:,} above the cap of {cap_text}; {hint()}")
        gap, found, cap_text, cap = max(gaps, key=lambda each: each[0] / each[3])
        raise BudgetError(
            f"{what} has {found}, {-gap:,} ({-gap / cap:.2%}) below the cap of {cap_text}, more than the "
            f"{self.tolerance:.2%} allowed; {hint()}"
        )

    def gap(self, size: Size) -> str:
        """How far a size lies below the cap that it uses most."""
        used = [(cap - value, cap) for value, cap in self._pairs(size)]
        gap, cap = min(used, key=lambda each: each[0] / each[1])
        return f"{gap:,} ({gap / cap:.2%}) below the cap"

    def describe(self) -> str:
        """The caps in words, with the tolerance."""
        caps = [
            f"{cap * (1 - self.tolerance):,.0f} to {cap:,} {UNITS[name]}{self._counted(name)}"
            for name, cap in zip(Size._fields, self.caps, strict=True)
            if cap
        ]
        return " and ".join(caps) or "no cap"

    def require_uniform(self, method: str) -> None:
        """Raise ModelError for an allocation that the method does not know."""
        if self.allocate != "uniform":
            raise ModelError(f"{method} spreads a budget evenly only; set budget.allocate to 'uniform'")

    def most(self, base: Size, step: Size, *, limit: int) -> int:
        """The largest n up to `limit` at which `base` and n times `step` keep every cap; -1 if none does."""
        if not self.holds(base):
            return -1
        pairs = zip(self._pairs(base), self._pairs(step), strict=True)
        return min([limit, *((cap - value) // each for (value, cap), (each, _) in pairs if each)])

    def _pairs(self, size: Size) -> Iterator[tuple[int, int]]:
        return ((value, cap) for value, cap in zip(size, self.caps, strict=True) if cap)

    def _counted(self, name: str) -> str:
        return f" ({self.convention})" if name == "params" else ""


UNITS = {
    "params": "parameters",
    "macs": "multiply-accumulates per token",
    "kv_bytes": "bytes of keys and values per token",
}
"""The caps in words."""
