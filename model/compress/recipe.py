"""The settings of each compression method: one frozen dataclass per method, and nothing that loads torch.

`MethodRecipe` is the union of them, told apart by `name`. The class that does the work is in `methods.py`.
`needs` names the statistics that a method reads (fields of `contract.StatsSpec`): whether anything is
measured on the teacher, and what, follows from them. `gram` brings the mean along. `version` is raised when
the same settings give another result, so that old models are not mistaken for new ones.
"""

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

from model.compress.kron_recipe import AnyKron, Gauge, KronVL, TQCompressor
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


def recipe_before(method: MethodRecipe) -> MethodRecipe | None:
    """The recipe whose recovered model this one starts from; None where it starts from the teacher."""
    return method.before if isinstance(method, TQCompressor) else None


SEEDED_METHODS = frozenset({"kron_perm", "tqcompressor", "random_init"})
"""Methods whose result depends on the seed; for all others one compressed model serves every seed."""


def as_table(recipe: Any, *, over: Any = None) -> dict[str, Any]:
    """A recipe as the shortest `[method]` table that means it when laid over another: name, what differs."""
    table: dict[str, Any] = {"name": recipe.name}
    below = over if type(over) is type(recipe) else type(recipe)()
    for item in fields(recipe):
        value = getattr(recipe, item.name)
        if item.name == "of":
            table["of"] = as_table(value, over=getattr(below, "of", None))
        elif value != getattr(below, item.name):
            table[item.name] = list(value) if isinstance(value, tuple) else value
    return table
