"""Factor shapes of a Kronecker sum: which are legal, what they cost, which rank they reach. Integers only.

A weight (m, n) as sum_k A_k (x) B_k needs A_k (m1, n1) and B_k (m2, n2) with m1*m2 = m and n1*n2 = n. So the
first factor alone names the shape, and everything about cost follows before a weight is touched. The one
trap: rank(A (x) B) = rank A * rank B, so a thin factor caps the rank of the whole matrix, whatever its size.
"""

import re
from dataclasses import dataclass
from math import isqrt, log
from typing import Literal

from model.config import ModelError

Gauge = Literal["rms", "sqrt"]
"""How a term's size is shared by its two factors: equal root-mean-square entries, or equal Frobenius norms.
"""

Order = Literal["b_first", "a_first"]
"""Which factor meets the input first in a product without W: A^T (X B), or (A^T X) B."""


class ShapeError(ModelError):
    """A factor shape, or its number of terms, does not fit a weight."""


@dataclass(frozen=True, slots=True, order=True)
class KronShape:
    """Shape of one term A (x) B: A is (m1, n1), B is (m2, n2), the weight is (m1*m2, n1*n2) = (in, out)."""

    m1: int
    """Rows of A."""
    n1: int
    """Columns of A."""
    m2: int
    """Rows of B."""
    n2: int
    """Columns of B."""

    def __post_init__(self) -> None:
        if min(self.m1, self.n1, self.m2, self.n2) < 1:
            raise ModelError(f"factor shape {self}: every side must be at least 1")

    def __str__(self) -> str:
        return f"({self.m1}x{self.n1})({self.m2}x{self.n2})"

    @property
    def rows(self) -> int:
        """Rows m of the weight."""
        return self.m1 * self.m2

    @property
    def cols(self) -> int:
        """Columns n of the weight."""
        return self.n1 * self.n2

    @property
    def max_terms(self) -> int:
        """Terms at which every weight is represented exactly; more would be redundant."""
        return min(self.m1 * self.n1, self.m2 * self.n2)

    def transposed(self) -> "KronShape":
        """The shape for the transposed weight: `mlp.c_proj`, when this one is for `c_fc`."""
        return KronShape(self.n1, self.m1, self.n2, self.m2)

    def params(self, terms: int = 1, *, scales: bool = False) -> int:
        """Parameters of all factors, without the bias; `scales` adds one per term."""
        return terms * (self.m1 * self.n1 + self.m2 * self.n2 + int(scales))

    def rank_bound(self, terms: int = 1) -> int:
        """Largest rank that a sum of `terms` products of this shape can have."""
        per_term = min(self.m1, self.n1) * min(self.m2, self.n2)
        return min(self.rows, self.cols, terms * per_term)

    def macs(self, terms: int = 1) -> tuple[int, int]:
        """Multiply-accumulates per row of input without forming W, as (B first, A first)."""
        b_first = self.m1 * self.n2 * (self.m2 + self.n1)
        a_first = self.m2 * self.n1 * (self.m1 + self.n2)
        return terms * b_first, terms * a_first

    @property
    def cheaper_order(self) -> Order:
        """The contraction order with fewer multiply-accumulates; B first on a tie."""
        b_first, a_first = self.macs()
        return "b_first" if b_first <= a_first else "a_first"


def divisors(number: int) -> tuple[int, ...]:
    """All divisors of a positive integer, ascending."""
    small = [d for d in range(1, isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*small, *(number // d for d in small)}))


def legal_shapes(rows: int, cols: int) -> tuple[KronShape, ...]:
    """Every factor shape of a (rows, cols) weight, ordered by m1, then n1; 396 of them for (768, 3072)."""
    return tuple(KronShape(a, b, rows // a, cols // b) for a in divisors(rows) for b in divisors(cols))


def nearest_shapes(rows: int, cols: int, first: tuple[int, int], *, count: int = 3) -> tuple[KronShape, ...]:
    """The legal shapes whose first factor is nearest to `first` (m1, n1) in ratio, nearest first."""

    def distance(shape: KronShape) -> tuple[float, KronShape]:
        m1, n1 = (max(1, side) for side in first)
        return abs(log(shape.m1 / m1)) + abs(log(shape.n1 / n1)), shape

    return tuple(sorted(legal_shapes(rows, cols), key=distance)[:count])


def kron_shape(rows: int, cols: int, first: tuple[int, int]) -> KronShape:
    """The shape of a (rows, cols) weight whose first factor is `first` = (m1, n1).

    Raises ModelError, naming the nearest legal shapes, when m1 does not divide rows or n1 does not divide
    cols.
    """
    m1, n1 = first
    if m1 >= 1 and n1 >= 1 and rows % m1 == 0 and cols % n1 == 0:
        return KronShape(m1, n1, rows // m1, cols // n1)
    nearest = ", ".join(f"{s.m1}x{s.n1}" for s in nearest_shapes(rows, cols, first))
    raise ShapeError(
        f"first factor {m1}x{n1} does not fit a {rows}x{cols} weight: {m1} must divide {rows} and {n1} must "
        f"divide {cols}; nearest legal first factors: {nearest}"
    )


def parse_shape(rows: int, cols: int, text: str) -> KronShape:
    """Read '768x768' (the first factor) or '(768x768)(1x4)' (both) as a shape of a (rows, cols) weight.

    Raises ModelError for other text, and when the second factor contradicts the weight.
    """
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    if not re.fullmatch(r"\s*\(?\d+x\d+\)?\s*(\(\d+x\d+\)\s*)?", text):
        raise ModelError(f"factor shape {text!r}: expected 'M1xN1' or '(M1xN1)(M2xN2)', such as '768x768'")
    shape = kron_shape(rows, cols, (numbers[0], numbers[1]))
    if numbers[2:] and (shape.m2, shape.n2) != (numbers[2], numbers[3]):
        raise ModelError(
            f"factor shape {text!r}: a {rows}x{cols} weight with this first factor needs {shape}"
        )
    return shape


def check_terms(shape: KronShape, terms: int) -> None:
    """Raise ModelError unless 1 <= terms <= max_terms, where the sum is already exact."""
    if not 1 <= terms <= shape.max_terms:
        raise ShapeError(
            f"{terms} terms of {shape}: choose 1 to {shape.max_terms}; "
            f"with {shape.max_terms} every {shape.rows}x{shape.cols} weight is exact"
        )


def rank_warning(shape: KronShape, terms: int = 1, *, strict: bool = False) -> str:
    """One line if the shape cannot reach full rank with so many terms, else the empty string.

    With `strict` the line is raised as ModelError.
    """
    full, bound = min(shape.rows, shape.cols), shape.rank_bound(terms)
    if bound == full:
        return ""
    per_term = shape.rank_bound()
    message = (
        f"{terms} term(s) of {shape} reach rank {bound} of {full} at most; "
        f"{-(-full // per_term)} terms, or a shape with larger smallest sides, would reach {full}"
    )
    if strict:
        raise ModelError(message)
    return message
