"""The settings of each compression method: one frozen dataclass per method, and nothing that loads torch.

`MethodRecipe` is the union of them, told apart by `name`. The class that does the work is in `methods.py`.
"""

from dataclasses import dataclass
from typing import Literal

Gauge = Literal["rms", "sqrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KronVL:
    """Van Loan and Pitsianis: the nearest sum of Kronecker products in the Frobenius norm (Krony-PT)."""

    name: Literal["kron_vl"] = "kron_vl"

    shape: tuple[int, int] = (768, 768)
    """First factor (m1, n1) on the up-projection, (in, out); the down-projection takes its transpose."""

    terms: int = 1
    """Kronecker products that are summed; 0 takes as many as the budget allows."""

    scales: bool = False
    """One learned factor per term."""

    gauge: Gauge = "rms"
    """How a term's norm is shared by its two factors."""

    norm: Literal["none", "frobenius"] = "none"
    """`frobenius` scales the product up to the norm of the weight (Krony-PT III-F); it raises the error."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronPrune:
    """Krony-PT's pruning start: keep every m2-th row and n2-th column, one term."""

    name: Literal["kron_prune"] = "kron_prune"

    shape: tuple[int, int] = (384, 3072)
    """First factor (m1, n1) on the up-projection, (in, out)."""

    eps_init: float = 0.0
    """Value of the zeros of B; the paper's 0.1 lets gradients through from the start."""

    offset: Literal["first", "energy"] = "first"
    """Which rows and columns are kept: the first of each group, or those with the largest energy."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomInit:
    """Control: the structure of `kron_vl` with random factors of the dense matrix's scale."""

    name: Literal["random_init"] = "random_init"

    shape: tuple[int, int] = (768, 768)
    """First factor (m1, n1) on the up-projection, (in, out)."""

    terms: int = 1
    """Kronecker products that are summed."""

    gauge: Gauge = "rms"
    """How a term's norm is shared by its two factors."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """Control: nothing is compressed; the teacher goes on training on the same tokens."""

    name: Literal["dense"] = "dense"


MethodRecipe = KronVL | KronPrune | RandomInit | Dense

SEEDED_METHODS = frozenset({"random_init"})
"""Methods whose result depends on the seed; for all others one compressed model serves every seed."""
