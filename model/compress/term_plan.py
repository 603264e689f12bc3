"""Kronecker terms where they gain most: each matrix has as many as its own singular values are worth.

One more term costs the entries of an A and a B, and gains the next squared singular value of the rearranged
weight in the metric of the method. Numbers only, no weight is read here.
"""

from dataclasses import replace

from model.algebra.allocation import greedy_gain
from model.algebra.shapes import KronShape, rank_warning
from model.compress.budget import Budget, Size
from model.compress.contract import Gains, Plan, Unmeasured
from model.compress.kron_plan import (
    DOWN,
    UP,
    KronChoice,
    base_size,
    chosen_shapes,
    kron_pair,
    nearest_that_fit,
    plan_kron_mlp,
)
from model.compress.kron_recipe import KronRecipe
from model.config import Kron, Matrix, ModelError, ModelSpec


def plan_terms(method: str, spec: ModelSpec, recipe: KronRecipe, budget: Budget) -> Plan:
    """As many terms everywhere; Unmeasured where `greedy_gain` asks for the weights first."""
    if budget.allocate not in ("uniform", "greedy_gain"):
        raise ModelError(
            f"{method} cannot spread a budget by {budget.allocate}; choose 'uniform' or 'greedy_gain'"
        )
    if budget.allocate == "greedy_gain" and budget.is_set and not recipe.terms:
        raise Unmeasured(
            f"{method}: terms by gain depend on the weights; they are known when it is compressed"
        )
    return plan_kron_mlp(method, spec, KronChoice.of(recipe), replace(budget, allocate="uniform"))


def plan_terms_by_gain(
    method: str, spec: ModelSpec, recipe: KronRecipe, budget: Budget, gains: Gains
) -> Plan:
    """The terms that gain most per parameter; `gains` are squared singular values by module, descending.

    A matrix has one term at least, and never so many that they hold more than its dense weight. Parameters
    are the price where they are capped, else multiply-accumulates. Raises ModelError for a budget not kept.
    """
    if recipe.terms or not budget.is_set:
        return plan_terms(method, spec, recipe, budget)
    choice = KronChoice.of(recipe)
    sites = {
        f"h.{i}.{role}": shape for i, shape in chosen_shapes(spec, choice).items() for role in (UP, DOWN)
    }
    price = {name: _price(shape, recipe, budget) for name, shape in sites.items()}
    units = {name: gains[name][: _most(shape, recipe)] for name, shape in sites.items()}
    unit = Size(1) if budget.params else Size(0, 1)
    limit = sum(price[name] * len(units[name]) for name in sites)
    room = max(0, budget.most(base_size(spec, choice, budget), unit, limit=limit))
    try:
        counts = greedy_gain(list(units.values()), list(price.values()), budget=room)
    except ModelError as err:
        raise ModelError(f"{method}: {err}; {nearest_that_fit(spec, choice, budget)}") from err
    matrices: dict[str, Matrix] = {
        name: _matrix(name, shape, choice, terms=terms)
        for (name, shape), terms in zip(sites.items(), counts, strict=True)
    }
    result = spec.with_matrices(matrices)
    budget.check(result, what=f"{method}, terms by gain", hint=lambda: nearest_that_fit(spec, choice, budget))
    fewest = dict(sorted(zip(sites.values(), counts, strict=True), key=_descending))
    warnings = [note for shape, terms in fewest.items() if (note := rank_warning(shape, terms))]
    notes = (f"keeps {min(counts)} to {max(counts)} terms", *warnings)
    return Plan(method=method, source=spec, spec=result, notes=notes)


def _price(shape: KronShape, recipe: KronRecipe, budget: Budget) -> int:
    return shape.params(1, scales=recipe.scales) if budget.params else min(shape.macs())


def _most(shape: KronShape, recipe: KronRecipe) -> int:
    """Most terms that hold fewer parameters than the weight; one at least."""
    saving = (shape.rows * shape.cols - 1) // shape.params(1, scales=recipe.scales)
    return max(1, min(shape.max_terms, saving))


def _matrix(name: str, shape: KronShape, choice: KronChoice, *, terms: int) -> Kron:
    return kron_pair(shape, choice, terms=terms)[name.endswith(DOWN)]


def _descending(entry: tuple[KronShape, int]) -> int:
    """The fewest terms of a shape come last, and stay."""
    return -entry[1]
