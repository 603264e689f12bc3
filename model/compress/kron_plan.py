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
from model.compress.budget import Budget
from model.compress.contract import Plan, StatsSpec
from model.compress.kron_recipe import KronRecipe
from model.config import Convention, Kron, Matrix, ModelError, ModelSpec

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
    if not choice.terms and not budget.params:
        raise ModelError(
            f"{method}: terms = 0 takes as many as the budget allows; set budget.params or terms"
        )
    terms = choice.terms or max(1, _most_terms(spec, choice, budget))
    result = with_kron_mlp(spec, choice, terms=terms)
    what = f"{method} {', '.join(map(str, shapes))}, terms = {terms}"
    budget.check(result, what=what, hint=lambda: _nearest(spec, choice, budget))
    notes = [note for shape in shapes if (note := rank_warning(shape, terms))]
    for shape in shapes:
        macs, dense = terms * min(shape.macs()), shape.rows * shape.cols
        if macs > dense:
            notes.append(
                f"{terms} term(s) of {shape} need {macs / dense:.2f} times the multiplications of a dense "
                "matrix"
            )
    return Plan(method=method, source=spec, spec=result, notes=tuple(notes))


def _base(spec: ModelSpec, choice: KronChoice, convention: Convention) -> int:
    """Parameters of everything but the matrices to be replaced."""
    names = {f"h.{i}.{role}" for i in chosen_blocks(spec, choice.layers) for role in (UP, DOWN)}
    replaced = sum(site.cost.params - site.n_bias for site in spec.sites() if site.name in names)
    return spec.num_parameters(convention) - replaced


def _most_terms(spec: ModelSpec, choice: KronChoice, budget: Budget) -> int:
    """The largest number of terms that keeps the cap, the same in every block; 0 if not even one does."""
    shapes = chosen_shapes(spec, choice).values()
    return budget.most_terms(
        base=_base(spec, choice, budget.convention),
        per_term=2 * sum(shape.params(1, scales=choice.scales) for shape in shapes),
        max_terms=1 if choice.one_term else min(shape.max_terms for shape in shapes),
    )


def shapes_at(spec: ModelSpec, choice: KronChoice, budget: Budget) -> list[tuple[KronShape, int, int]]:
    """Every (shape, terms, parameters) that keeps the budget: one shape at all chosen blocks, most terms."""
    blocks = chosen_blocks(spec, choice.layers)
    widths = {spec.blocks[i].mlp_hidden for i in blocks}
    if len(widths) > 1:
        return []
    base, found = _base(spec, choice, budget.convention), []
    for shape in legal_shapes(spec.arch.n_embd, widths.pop()):
        per_term = 2 * len(blocks) * shape.params(1, scales=choice.scales)
        most = 1 if choice.one_term else shape.max_terms
        terms = budget.most_terms(base=base, per_term=per_term, max_terms=most)
        if terms and budget.fits(base + terms * per_term):
            found.append((shape, terms, base + terms * per_term))
    return found


def _nearest(spec: ModelSpec, choice: KronChoice, budget: Budget, *, count: int = 3) -> str:
    """The shapes nearest to the one asked for that keep the budget with some number of terms."""
    if choice.layer_shapes:
        return "change layer_shapes, terms or the cap"
    base, blocks = _base(spec, choice, budget.convention), chosen_shapes(spec, choice)
    rows, cols = spec.arch.n_embd, next(iter(blocks.values())).cols
    fitting = {shape: (terms, total) for shape, terms, total in shapes_at(spec, choice, budget)}
    nearest = nearest_shapes(rows, cols, choice.shape, count=len(legal_shapes(rows, cols)))
    found = [
        f"shape = [{shape.m1}, {shape.n1}], terms = {fitting[shape][0]} ({fitting[shape][1]:,})"
        for shape in nearest
        if shape in fitting
    ]
    if found:
        return "nearest that keep it: " + "; ".join(found[:count])
    smallest = base + 2 * len(blocks) * min(
        shape.params(1, scales=choice.scales) for shape in legal_shapes(rows, cols)
    )
    largest = spec.num_parameters(budget.convention)
    return f"no shape keeps it: these blocks leave {smallest:,} to {largest:,} parameters"
