"""The settings of the structural methods: fewer blocks, hidden units, narrower heads. Loads no torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class WidthRecipe:
    """What all methods share that keep some hidden units, and perhaps narrower heads."""

    version: ClassVar[int] = 1

    hidden: int = 0
    """Hidden units that every MLP keeps; 0 takes as much as the budget allows."""

    rank_multiple: int = 1
    """Widths found by a budget are multiples of this; 8 suits tensor cores."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""

    eps: float = 0.1
    """How evenly `budget.allocate = "modegpt_bi"` spreads the cuts: blocks that turn the stream lose less."""

    max_sparsity: float = 0.8
    """Largest share that `modegpt_bi` may take from one block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneMLP(WidthRecipe):
    """Control: hidden units are kept by a score and nothing is refitted; what MoDeGPT's refit is worth."""

    name: Literal["prune_mlp"] = "prune_mlp"

    score: Literal["magnitude", "activation"] = "magnitude"
    """`magnitude`: norm of a unit's column in times its row out. `activation`: its mean square times the
    squared row.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing for `magnitude`."""
        return () if self.score == "magnitude" else ("block_influence", "gram")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGPTRecipe(WidthRecipe):
    """What both forms of MoDeGPT share."""

    targets: Literal["mlp", "all_linear"] = "all_linear"
    """The MLP alone, or queries, keys, values and their output as well."""

    head_rank: int = 0
    """Width of every query, key and value per head, given together with `hidden`; 0 follows the budget."""

    selector: Literal["rls", "greedy"] = "rls"
    """Which hidden units stay: by ridge leverage, as published, or one by one for the least output error."""

    ridge_rel: float = 1.0
    """Ridge of the leverage, relative to the mean eigenvalue of the hidden second moment."""

    vo_cov: Literal["input", "mixed"] = "input"
    """Metric of values: inputs of the layer, or inputs as attention averages them, which has no mean to
    correct by.
    """

    @property
    def needs(self) -> tuple[str, ...]:
        """Second moments, how much each block turns the stream; and mixed ones where they are the metric."""
        mixed = self.targets == "all_linear" and self.vo_cov == "mixed"
        return ("block_influence", "gram", "vo_mixed_gram") if mixed else ("block_influence", "gram")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGPT(ModeGPTRecipe):
    """MoDeGPT (arXiv 2408.09632): Nyström for the MLP, columns of queries and keys, SVD for values."""

    name: Literal["modegpt"] = "modegpt"

    bias_correction: bool = False
    """Fit in covariances and give the mean of what is lost back through the biases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModeGPTJoint(ModeGPTRecipe):
    """MoDeGPT with the best query/key pair of its rank, which a model without rotary positions allows."""

    name: Literal["modegpt_joint"] = "modegpt_joint"

    bias_correction: bool = True
    """Fit in covariances and give the mean of what is lost back through the biases."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDrop:
    """Some blocks are kept unchanged, the others are gone: the latency baseline."""

    name: Literal["layerdrop"] = "layerdrop"
    version: ClassVar[int] = 1

    layers: int = 6
    """Blocks to keep; 0 takes as many as the budget allows."""

    select: Literal["even", "bi"] = "even"
    """`even`: evenly spaced, as DistilGPT2. `bi`: those that turn the residual stream most."""

    @property
    def needs(self) -> tuple[str, ...]:
        """Nothing for `even`."""
        return ("block_influence",) if self.select == "bi" else ()


AnyStructural = LayerDrop | PruneMLP | ModeGPT | ModeGPTJoint
