"""One recipe of every registered method under one cap, with its exact plan or the reason why there is none.

Track M may change MLP weights alone, track A more; the two are never ranked together. Low rank and widths
follow the cap by themselves. A Kronecker method needs a shape: of those that keep the cap and can reach full
rank, the one with the fewest multiplications. Integers only, no weight is read.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args

from model.algebra.shapes import KronShape
from model.compress.budget import Budget
from model.compress.contract import Plan
from model.compress.kron_plan import KronChoice, shapes_at
from model.compress.kron_recipe import KnGPT2, KronPlace, KronVL, TQCompressor
from model.compress.low_rank_recipe import SVD
from model.compress.methods import make_method
from model.compress.recipe import Dense, MethodRecipe, RandomInit
from model.compress.structural_recipe import LayerDrop, ModeGPTJoint, PruneMLP
from model.config import Convention, ModelError, ModelSpec

Track = Literal["M", "A"]
"""What may change: MLP weights alone; or any weight, with the token table where that is a rival's own way."""

TARGETS: dict[Track, Literal["mlp", "all_linear"]] = {"M": "mlp", "A": "all_linear"}


class AtBudget(NamedTuple):
    """What one method does under a cap."""

    label: str
    """Name of the method, with what it wraps."""

    recipe: MethodRecipe
    """Its settings; under the same cap they give the same plan."""

    plan: Plan | str
    """The plan that keeps the cap, or the reason why there is none."""


def recipes_at(
    spec: ModelSpec,
    cap: int,
    *,
    track: Track,
    convention: Convention = "tied_all",
    tolerance: float = 0.002,
) -> list[AtBudget]:
    """Every registered method of a track under `cap` parameters, in the order of the list of recipes.

    Settings that do not size a method stay at their defaults. A plan holds at most `cap` parameters and at
    least `cap * (1 - tolerance)`; `layerdrop` alone may fall further below, and its notes say how far.
    """
    budget = Budget(params=cap, convention=convention, tolerance=tolerance)
    kinds = [kind for kind in get_args(MethodRecipe) if track in tracks_of(kind)]
    return [_entry(kind, spec, budget, track) for kind in kinds]


def tracks_of(kind: Any) -> tuple[Track, ...]:
    """Where a recipe class is ranked. The controls stand on both; `modegpt_joint` differs in heads alone."""
    if issubclass(kind, RandomInit | Dense):
        return ("M", "A")
    if issubclass(kind, KronPlace | PruneMLP):
        return ("M",)
    has_targets = "targets" in {field.name for field in fields(kind)} and kind is not ModeGPTJoint
    return ("M", "A") if has_targets else ("A",)


def _entry(kind: Any, spec: ModelSpec, budget: Budget, track: Track) -> AtBudget:
    """The first settings that a method can follow the cap with; else the first reason why not."""
    recipe: MethodRecipe = kind()
    plan: Plan | str = ""
    for recipe in _sized(kind, spec, budget, track):
        try:
            plan = make_method(recipe).plan(spec, budget)
            break
        except ModelError as err:
            plan = plan or str(err)
    if not plan:
        plan = f"no shape at all MLPs keeps {budget.describe()}"
    label = f"random_init of {recipe.of.name}" if isinstance(recipe, RandomInit) else str(recipe.name)
    return AtBudget(label, recipe, plan)


def _sized(kind: Any, spec: ModelSpec, budget: Budget, track: Track) -> Iterator[MethodRecipe]:
    """Recipes that follow the cap, the preferred one first."""
    names = {field.name for field in fields(kind)}
    if issubclass(kind, KronPlace):
        yield from (kind(**settings) for settings in _shaped(spec, budget, has_terms="terms" in names))
    elif issubclass(kind, RandomInit):
        yield from (kind(of=of) for of in _sized(KronVL if track == "M" else SVD, spec, budget, track))
    elif issubclass(kind, LayerDrop):
        yield kind(layers=0)
    elif issubclass(kind, KnGPT2 | TQCompressor):
        yield kind(head="tied")
    elif "targets" in names:
        yield kind(targets=TARGETS[track])
    else:
        yield kind()


def _shaped(spec: ModelSpec, budget: Budget, *, has_terms: bool) -> Iterator[dict[str, Any]]:
    """Shapes, with terms where a method knows them: full rank first, then the fewest multiplications."""
    fitting = shapes_at(spec, KronChoice(shape=(1, 1), terms=0, one_term=not has_terms), budget)

    def merit(row: tuple[KronShape, int]) -> tuple[bool, int, int]:
        shape, terms = row
        is_short = shape.rank_bound(terms) < min(shape.rows, shape.cols)
        # of the two orders of one product the one with the large factor first
        return is_short, terms * min(shape.macs()), -shape.m1 * shape.n1

    for shape, terms in sorted(fitting, key=merit):
        yield {"shape": (shape.m1, shape.n1)} | ({"terms": terms} if has_terms else {})
