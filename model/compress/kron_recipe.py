"""The settings of the Kronecker methods: Krony-PT's, ours with better objectives and orders, and two rivals.

All of them replace both MLP matrices of the chosen blocks; what differs is how the factors are chosen. Loads
no torch.
"""

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

from model.marks import UNLESS_DEFAULT

Gauge = Literal["rms", "sqrt"]


@dataclass(frozen=True, kw_only=True, slots=True)
class KronPlace:
    """Where Kronecker products stand, and of which shape."""

    version: ClassVar[int] = 1

    shape: tuple[int, int] = (768, 768)
    """First factor (m1, n1) on the up-projection, (in, out); the down-projection takes its transpose."""

    layer_shapes: tuple[tuple[int, int], ...] = ()
    """A first factor of its own for every compressed block, in order; empty gives all of them `shape`."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronRecipe(KronPlace):
    """What methods with sums of several terms share."""

    terms: int = 1
    """Kronecker products that are summed; 0 takes as many as the budget allows."""

    scales: bool = False
    """One learned factor per term."""

    gauge: Gauge = "rms"
    """How a term's norm is shared by its two factors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternating(KronRecipe):
    """What methods share that alternate between the two factors."""

    max_iter: int = 50
    """Iterations from each start."""

    rtol: float = 1e-5
    """Stop when an iteration lowers the loss by less than this share of it."""

    ridge_rel: float = 1e-8
    """Pull towards the previous iterate, relative to the mean diagonal entry of the system."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronVL(KronRecipe):
    """Van Loan and Pitsianis: the nearest sum of Kronecker products in the Frobenius norm (Krony-PT)."""

    name: Literal["kron_vl"] = "kron_vl"
    needs: ClassVar[tuple[str, ...]] = ()

    norm: Literal["none", "frobenius"] = "none"
    """`frobenius` scales the product up to the norm of the weight (Krony-PT III-F); it raises the error."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronPrune(KronPlace):
    """Krony-PT's pruning start: keep every m2-th row and n2-th column, one term."""

    name: Literal["kron_prune"] = "kron_prune"

    shape: tuple[int, int] = (384, 3072)
    """First factor (m1, n1) on the up-projection, (in, out)."""

    eps_init: float = 0.0
    """Value of the zeros of B; the paper's 0.1 lets gradients through from the start."""

    offset: Literal["first", "energy", "importance"] = "first"
    """Which rows and columns are kept: the first of each group; those with the largest energy; or those with
    the largest energy in the output, each input feature weighing as much as its mean square.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Mean squares of the inputs, for `importance`."""
        return ("gram",) if self.offset == "importance" else ()


@dataclass(frozen=True, kw_only=True, slots=True)
class KronPerm(KronRecipe):
    """Van Loan in better orders of rows and columns (TQCompressor's idea, with a search of ours)."""

    name: Literal["kron_perm"] = "kron_perm"
    version: ClassVar[int] = 3
    needs: ClassVar[tuple[str, ...]] = ()

    hidden: Literal["shared", "separate"] = "shared"
    """One hidden order for both matrices, which costs nothing; or one each, which costs a gather."""

    outer: bool = True
    """Whether the residual side is reordered too, by a gather before and after the MLP."""

    random_starts: int = 1
    """Random orders to start from, beside norm split and the stored order."""

    max_sweeps: int = 20
    """Rounds of fit and reordering from each start; one that falls hopelessly behind is given up."""

    rtol: float = 1e-4
    """Stop when no reordering lowers the error by more than this share of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronFisher(Alternating):
    """Every weight counts by its Fisher information: min sum_ij F_ij (W - K)_ij^2."""

    name: Literal["kron_fisher"] = "kron_fisher"
    needs: ClassVar[tuple[str, ...]] = ("full_fisher",)

    solver: Literal["als", "em", "separable"] = "als"
    """Alternating least squares; expectation maximisation, slower; or the closed form for the nearest Fisher
    that is a Kronecker product, a surrogate that may be worse than `kron_vl`.
    """

    starts: tuple[Literal["vl", "separable"], ...] = ("vl", "separable")
    """Where to start; the lowest loss is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronAct(Alternating):
    """The least output error of each matrix over calibration tokens, bias included."""

    name: Literal["kron_act"] = "kron_act"
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    bias_correction: bool = True
    """Solve with the covariance and give the mean of what is lost back through the bias."""

    starts: tuple[Literal["vl", "kron_gram"], ...] = ("vl", "kron_gram")
    """Where to start; the lowest loss is kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronActPerm(Alternating):
    """`kron_act` in an order of the hidden units that is chosen with it, for the whole MLP; it folds away."""

    name: Literal["kron_act_perm"] = "kron_act_perm"
    version: ClassVar[int] = 2
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    bias_correction: bool = True
    """Solve with the covariance and give the mean of what is lost back through the bias."""

    orders: tuple[Literal["norm_split", "aligned", "selected"], ...] = ("norm_split", "aligned", "selected")
    """Orders to start from, beside the stored one."""

    max_sweeps: int = 10
    """Rounds of reordering and refit from each order; one that falls hopelessly behind is given up."""

    refit_iter: int = 3
    """Iterations of the fit in each round."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronUnits(KronPlace):
    """The best hidden units, refitted (MoDeGPT), as a Kronecker product with further GELUs to learn."""

    name: Literal["kron_units"] = "kron_units"
    needs: ClassVar[tuple[str, ...]] = ("gram",)

    shape: tuple[int, int] = (768, 768)
    """First factor (n_in, k) on the up-projection: all input rows, k features; k divides the hidden width."""

    selector: Literal["greedy", "rls"] = "greedy"
    """Which units stay: one by one for the least output error, or by ridge leverage."""

    bias_correction: bool = True
    """Fit in the covariance and give the mean of what is lost back through the bias."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KnGPT2:
    """KnGPT2-style (ours): factor 2 at the attention and MLP matrices of odd blocks, and at the token table.

    After Edalati et al. (arXiv 2110.08152), whose code is not public: products of (in x out/2)(1x2), and of
    (in/2 x out)(2x1) going down, one term each, the nearest in the Frobenius norm.
    """

    name: Literal["kngpt2"] = "kngpt2"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()

    head: Literal["untied", "tied"] = "untied"
    """A dense output head of its own, which starts as the token table; or the factored table."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means the odd ones, counted from 0."""

    gauge: Gauge = "sqrt"
    """How a term's norm is shared by its two factors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TQCompressor:
    """TQCompressor-style (ours): permuted products at the MLPs of odd blocks, the token table by four.

    After Abronin et al. (arXiv 2401.16367), with the search of `kron_perm` in place of the one that is not
    released: `terms` products of half the rows and a quarter of the columns, the table twice halved in the
    best orders of channels found. All at once, or in its three stages with recovery training after each.
    """

    name: Literal["tqcompressor"] = "tqcompressor"
    version: ClassVar[int] = 3
    needs: ClassVar[tuple[str, ...]] = ()

    terms: int = 4
    """Kronecker products per MLP matrix."""

    head: Literal["untied", "tied"] = "untied"
    """A dense output head of its own, which starts as the token table; or the factored table."""

    hidden: Literal["shared", "separate"] = "shared"
    """One hidden order for both matrices; or, as published, one each."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means the odd ones, counted from 0."""

    gauge: Gauge = "sqrt"
    """How a term's norm is shared by its two factors."""

    random_starts: int = 1
    """Random orders to start from, beside norm split and the stored order."""

    max_sweeps: int = 20
    """Rounds of fit and reordering from each start; one that falls hopelessly behind is given up."""

    rtol: float = 1e-4
    """Stop when no reordering lowers the error by more than this share of it."""

    stage: Literal["once", "table", "mlp", "inner"] = field(default="once", metadata=UNLESS_DEFAULT)
    """How far to go: halve the table; then the MLPs; then halve what is left of the table. Each stage after
    the first starts from the recovered model of the one before; `once` does all of it on the teacher.
    """

    @property
    def before(self) -> "TQCompressor | None":
        """The stage that this one starts from; None where it starts from the teacher."""
        earlier: dict[str, Literal["table", "mlp"]] = {"mlp": "table", "inner": "mlp"}
        return replace(self, stage=earlier[self.stage]) if self.stage in earlier else None


AnyKron = (
    KronVL | KronPrune | KronPerm | KronFisher | KronAct | KronActPerm | KronUnits | KnGPT2 | TQCompressor
)
