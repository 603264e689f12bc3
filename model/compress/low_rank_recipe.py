"""The settings of the low-rank methods: which matrices, which ranks, and what each method calls an error.

Loads no torch.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class LowRankRecipe:
    """What all low-rank methods share: a weight becomes two thin factors."""

    version: ClassVar[int] = 1

    targets: Literal["mlp", "all_linear"] = "mlp"
    """Weight matrices to replace: those of the MLP, or those of the attention as well."""

    rank: int = 0
    """Rank of every replaced matrix; 0 takes the largest ranks that the budget allows."""

    rank_multiple: int = 1
    """Ranks found by a budget are multiples of this; 8 suits tensor cores."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SVD(LowRankRecipe):
    """Truncated singular value decomposition: the nearest matrix of that rank."""

    name: Literal["svd"] = "svd"
    needs: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class FWSVD(LowRankRecipe):
    """Fisher-weighted SVD (arXiv 2207.00112): input features weigh as much as their weights matter."""

    name: Literal["fwsvd"] = "fwsvd"

    weights: Literal["row", "row_col"] = "row"
    """`row` as published; `row_col` weighs output features by their own Fisher sums as well."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Row Fisher, and column Fisher where it weighs."""
        return ("row_fisher",) if self.weights == "row" else ("col_fisher", "row_fisher")


@dataclass(frozen=True, kw_only=True, slots=True)
class ASVD(LowRankRecipe):
    """Activation-aware SVD (arXiv 2312.05821): input features weigh by their mean size."""

    name: Literal["asvd"] = "asvd"
    needs: ClassVar[tuple[str, ...]] = ("abs_mean",)

    alpha: float = 0.5
    """A feature weighs E|x|^(2 alpha); 0 is plain SVD."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SVDLLM(LowRankRecipe):
    """SVD-LLM's whitening (arXiv 2403.07378): the least output error over calibration tokens."""

    name: Literal["svdllm"] = "svdllm"
    needs: ClassVar[tuple[str, ...]] = ("gram",)


@dataclass(frozen=True, kw_only=True, slots=True)
class SVDLLMBC(LowRankRecipe):
    """`svdllm` and the bias together: the least output error that rank and a free bias can have."""

    name: Literal["svdllm_bc"] = "svdllm_bc"
    needs: ClassVar[tuple[str, ...]] = ("gram",)


@dataclass(frozen=True, kw_only=True, slots=True)
class KFACSVD(LowRankRecipe):
    """KFAC-SVD (LEMS): input second moments and output-gradient second moments as the metric."""

    name: Literal["kfac_svd"] = "kfac_svd"
    needs: ClassVar[tuple[str, ...]] = ("delta_gram", "gram")

    shrink_input: float = 0.1
    """Share of the input metric that is replaced by a multiple of the identity of equal trace."""

    shrink_output: float = 0.3
    """The same for the output metric."""

    bias_correction: bool = False
    """Solve with the covariance and give the mean of what is lost back through the bias."""


AnyLowRank = SVD | FWSVD | ASVD | SVDLLM | SVDLLMBC | KFACSVD
