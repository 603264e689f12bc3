"""The structure that all Kronecker methods share: both MLP matrices of the chosen blocks, transposed shapes.

A shape is written for `mlp.c_fc`; `mlp.c_proj` takes the transposed one. Shapes and number of terms are
chosen and checked here, against the weights and against the budget. Integers only, loads no torch.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from model.algebra.shapes import (
    KronShape,
    check_terms,
    kron_shape,
    legal_shapes,
    nearest_shapes,
    rank_warning,
)
from model.compress.budget import Budget, Size
from model.compress.contract import Plan, StatsSpec
from model.compress.kron_recipe import KronRecipe
from model.config import Kron, Matrix, ModelError, ModelSpec

UP, DOWN = "mlp.c_fc", "mlp.c_proj"

Gathers = Literal["none", "outer", "hidden", "all"]
"""Index buffers where an order cannot be folded: on the residual side, between the two matrices, or both."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KronChoice:
    """What a recipe asks for."""

    shape: tuple[int, int]
    """First factor (m1, n1) of `mlp.c_fc`."""

    terms: int
    """Terms; 0 takes as many as the budget allows."""

    layer_shapes: tuple[tuple[int, int], ...] = ()
    """First factors block by block; empty takes `shape` for all."""

    scales: bool = False
    """One learned scalar per term."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""

    gathers: Gathers = "none"
    """Which orders are kept as index buffers, where they can matter at all."""

    decay_right: bool = True
    """Whether weight decay may act on B."""

    one_term: bool = False
    """Whether the method knows no sums of several terms."""

    @classmethod
    def of(cls, recipe: KronRecipe, *, gathers: Gathers = "none") -> "KronChoice":
        """What a recipe of several terms asks for."""
        return cls(
            shape=recipe.shape,
            terms=recipe.terms,
            layer_shapes=recipe.layer_shapes,
            scales=recipe.scales,
            layers=recipe.layers,
            gathers=gathers,
        )


def kron_stats(arch: ModelSpec, needs: Iterable[str], layers: tuple[int, ...]) -> StatsSpec:
    """`needs` at both MLP matrices of the chosen blocks."""
    sites = frozenset(f"h.{i}.{role}" for i in chosen_blocks(arch, layers) for role in (UP, DOWN))
    wanted: dict[str, Any] = dict.fromkeys(needs, sites)
    return StatsSpec(**wanted)


def chosen_blocks(spec: ModelSpec, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the blocks to compress, ascending; ModelError for one that is not there."""
    last = len(spec.blocks) - 1
    if odd := [i for i in layers if not 0 <= i <= last]:
        raise ModelError(f"layers names block {odd[0]}; this model has blocks 0 to {last}")
    return tuple(sorted(set(layers))) if layers else tuple(range(last + 1))


def chosen_shapes(spec: ModelSpec, choice: KronChoice) -> dict[int, KronShape]:
    """Shape of `mlp.c_fc` in every block to compress; ModelError for one that does not fit."""
    blocks = chosen_blocks(spec, choice.layers)
    firsts = choice.layer_shapes or (choice.shape,) * len(blocks)
    if len(firsts) != len(blocks):
        raise ModelError(f"layer_shapes names {len(firsts)} shapes for {len(blocks)} compressed blocks")
    widths = {i: spec.blocks[i].mlp_hidden for i in blocks}
    if not choice.layer_shapes and len(set(widths.values())) > 1:
        raise ModelError(
            f"MLPs of widths {sorted(set(widths.values()))} cannot share one factor shape; choose fewer "
            "layers, or give each its own in layer_shapes"
        )
    return {
        i: kron_shape(spec.arch.n_embd, widths[i], first) for i, first in zip(blocks, firsts, strict=True)
    }


def kron_pair(shape: KronShape, choice: KronChoice, *, terms: int) -> tuple[Kron, Kron]:
    """What stands at `mlp.c_fc` and at `mlp.c_proj`; an order that cannot matter needs no gather."""
    outer = choice.gathers in ("outer", "all") and min(shape.m1, shape.m2) > 1
    hidden = choice.gathers in ("hidden", "all") and min(shape.n1, shape.n2) > 1
    up = Kron(
        m1=shape.m1,
        n1=shape.n1,
        m2=shape.m2,
        n2=shape.n2,
        terms=terms,
        scales=choice.scales,
        gather_in=outer,
        decay_right=choice.decay_right,
    )
    return up, replace(up.transposed(), gather_in=hidden)


def with_kron_mlp(spec: ModelSpec, choice: KronChoice, *, terms: int) -> ModelSpec:
    """A copy with so many terms at both MLP matrices of the chosen blocks."""
    matrices: dict[str, Matrix] = {}
    for i, shape in chosen_shapes(spec, choice).items():
        check_terms(shape, terms)
        up, down = kron_pair(shape, choice, terms=terms)
        matrices |= {f"h.{i}.{UP}": up, f"h.{i}.{DOWN}": down}
    return spec.with_matrices(matrices)


def plan_kron_mlp(method: str, spec: ModelSpec, choice: KronChoice, budget: Budget) -> Plan:
    """The plan of a Kronecker method; ModelError for an illegal shape or terms, or a budget not kept."""
    budget.require_uniform(method)
    shapes = tuple(dict.fromkeys(chosen_shapes(spec, choice).values()))
    if not choice.terms and not budget.is_set:
        raise ModelError(
            f"{method}: terms = 0 takes as many as the budget allows; set budget.params or terms"
        )
    terms = choice.terms or max(1, _most_terms(spec, choice, budget))
    result = with_kron_mlp(spec, choice, terms=terms)
    what = f"{method} {', '.join(map(str, shapes))}, terms = {terms}"
    budget.check(result, what=what, hint=lambda: nearest_that_fit(spec, choice, budget))
    notes = [note for shape in shapes if (note := rank_warning(shape, terms))]
    for shape in shapes:
        macs, dense = terms * min(shape.macs()), shape.rows * shape.cols
        if macs > dense:
            notes.append(
                f"{terms} term(s) of {shape} need {macs / dense:.2f} times the multiplications of a dense "
                "matrix"
            )
    return Plan(method=method, source=spec, spec=result, notes=tuple(notes))


def base_size(spec: ModelSpec, choice: KronChoice, budget: Budget) -> Size:
    """The cost of everything but both MLP matrices of the chosen blocks."""
    names = {f"h.{i}.{role}" for i in chosen_blocks(spec, choice.layers) for role in (UP, DOWN)}
    return budget.size_without(spec, (site for site in spec.sites() if site.name in names))


def _step(shapes: Iterable[KronShape], *, scales: bool) -> Size:
    """What one more term costs at both matrices of every block, shapes block by block."""
    found = [(shape.params(1, scales=scales), min(shape.macs())) for shape in shapes]
    return Size(2 * sum(params for params, _ in found), 2 * sum(macs for _, macs in found))


def _most_terms(spec: ModelSpec, choice: KronChoice, budget: Budget) -> int:
    """The largest number of terms that keeps the caps, the same in every block; not above 0 if none does."""
    shapes = chosen_shapes(spec, choice).values()
    limit = 1 if choice.one_term else min(shape.max_terms for shape in shapes)
    step = _step(shapes, scales=choice.scales)
    return budget.most(base_size(spec, choice, budget), step, limit=limit)


def shapes_at(spec: ModelSpec, choice: KronChoice, budget: Budget) -> list[tuple[KronShape, int]]:
    """Every shape, with the most terms, that keeps the budget: one at all chosen blocks."""
    blocks = chosen_blocks(spec, choice.layers)
    widths = {spec.blocks[i].mlp_hidden for i in blocks}
    if len(widths) > 1:
        return []
    base, found = base_size(spec, choice, budget), []
    for shape in legal_shapes(spec.arch.n_embd, widths.pop()):
        step = _step([shape] * len(blocks), scales=choice.scales)
        terms = budget.most(base, step, limit=1 if choice.one_term else shape.max_terms)
        if terms > 0 and budget.fits(base.grown(step, terms)):
            found.append((shape, terms))
    return found


def nearest_that_fit(spec: ModelSpec, choice: KronChoice, budget: Budget, *, count: int = 3) -> str:
    """The shapes nearest to the one asked for that keep the budget with some number of terms."""
    if choice.layer_shapes:
        return "change layer_shapes, terms or the cap"
    blocks = chosen_shapes(spec, choice)
    rows, cols = spec.arch.n_embd, next(iter(blocks.values())).cols

    def total(shape: KronShape, terms: int) -> int:
        chosen = replace(choice, shape=(shape.m1, shape.n1))
        return with_kron_mlp(spec, chosen, terms=terms).num_parameters(budget.convention)

    fitting = dict(shapes_at(spec, choice, budget))
    nearest = nearest_shapes(rows, cols, choice.shape, count=len(legal_shapes(rows, cols)))
    found = [
        f"shape = [{shape.m1}, {shape.n1}], terms = {fitting[shape]} ({total(shape, fitting[shape]):,})"
        for shape in [shape for shape in nearest if shape in fitting][:count]
    ]
    if found:
        return "nearest that keep it: " + "; ".join(found)
    smallest = min(legal_shapes(rows, cols), key=lambda shape: (shape.params(1), shape.m1))
    largest = spec.num_parameters(budget.convention)
    return f"no shape keeps it: these blocks leave {total(smallest, 1):,} to {largest:,} parameters"
