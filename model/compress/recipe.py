"""The settings of each compression method: one frozen dataclass per method, and nothing that loads torch.

`MethodRecipe` is the union of them, told apart by `name`. The class that does the work is in `methods.py`.
`needs` names the statistics that a method reads (fields of `contract.StatsSpec`): whether anything is
measured on the teacher, and what, follows from them. `gram` brings the mean along. `version` is raised when
the same settings give another result, so that old models are not mistaken for new ones.
"""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from model.compress.kron_recipe import AnyKron, Gauge, KronVL
from model.compress.low_rank_recipe import AnyLowRank
from model.compress.structural_recipe import AnyStructural


@dataclass(frozen=True, kw_only=True, slots=True)
class RandomInit:
    """Control: the structure of another method with random weights of the dense matrices' scale."""

    name: Literal["random_init"] = "random_init"
    version: ClassVar[int] = 2

    of: AnyKron | AnyLowRank | AnyStructural = field(
        default_factory=KronVL, metadata={"discriminator": "name"}
    )
    """The method whose structure is filled at random; its other settings only shape the plan."""

    gauge: Gauge = "rms"
    """How a term's norm is shared by its two factors."""

    @property
    def needs(self) -> tuple[str, ...]:
        """As the method itself: a structure may follow from what was measured."""
        return self.of.needs


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """Control: nothing is compressed; the teacher goes on training on the same tokens."""

    name: Literal["dense"] = "dense"
    version: ClassVar[int] = 1
    needs: ClassVar[tuple[str, ...]] = ()


MethodRecipe = AnyKron | AnyLowRank | AnyStructural | RandomInit | Dense

SEEDED_METHODS = frozenset({"kron_perm", "tqcompressor", "random_init"})
"""Methods whose result depends on the seed; for all others one compressed model serves every seed."""
