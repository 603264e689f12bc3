"""The structure that all Kronecker methods share: both MLP matrices of the chosen blocks, transposed shapes.

A shape is written for `mlp.c_fc`; `mlp.c_proj` takes the transposed one. Shape and number of terms are chosen
and checked here, against the weight and against the budget. Integers only, loads no torch.
"""

from dataclasses import dataclass

from model.algebra.shapes import (
    KronShape,
    check_terms,
    kron_shape,
    legal_shapes,
    nearest_shapes,
    rank_warning,
)
from model.compress.budget import Budget
from model.compress.contract import Plan
from model.config import Convention, Kron, Matrix, ModelError, ModelSpec

UP, DOWN = "mlp.c_fc", "mlp.c_proj"


@dataclass(frozen=True, kw_only=True, slots=True)
class KronChoice:
    """What a recipe asks for."""

    shape: tuple[int, int]
    """First factor (m1, n1) of `mlp.c_fc`."""

    terms: int
    """Terms; 0 takes as many as the budget allows."""

    scales: bool = False
    """One learned scalar per term."""

    layers: tuple[int, ...] = ()
    """Blocks to compress; empty means all."""

    decay_right: bool = True
    """Whether weight decay may act on B."""

    one_term: bool = False
    """Whether the method knows no sums of several terms."""


def chosen_blocks(spec: ModelSpec, layers: tuple[int, ...]) -> tuple[int, ...]:
    """Indices of the blocks to compress, ascending; ModelError for one that is not there."""
    last = len(spec.blocks) - 1
    if odd := [i for i in layers if not 0 <= i <= last]:
        raise ModelError(f"layers names block {odd[0]}; this model has blocks 0 to {last}")
    return tuple(sorted(set(layers))) if layers else tuple(range(last + 1))


def with_kron_mlp(spec: ModelSpec, shape: KronShape, choice: KronChoice, *, terms: int) -> ModelSpec:
    """A copy with so many terms of `shape` at each chosen `mlp.c_fc`, of its transpose at `mlp.c_proj`."""
    up = Kron(
        m1=shape.m1,
        n1=shape.n1,
        m2=shape.m2,
        n2=shape.n2,
        terms=terms,
        scales=choice.scales,
        decay_right=choice.decay_right,
    )
    matrices: dict[str, Matrix] = {}
    for i in chosen_blocks(spec, choice.layers):
        matrices |= {f"h.{i}.{UP}": up, f"h.{i}.{DOWN}": up.transposed()}
    return spec.with_matrices(matrices)


def plan_kron_mlp(method: str, spec: ModelSpec, choice: KronChoice, budget: Budget) -> Plan:
    """The plan of a Kronecker method; ModelError for an illegal shape or terms, or a budget not kept."""
    budget.require_uniform(method)
    rows, cols = _mlp_size(spec, choice)
    shape = kron_shape(rows, cols, choice.shape)
    terms = choice.terms or _most_terms(spec, shape, choice, budget)
    if not choice.terms and not budget.params:
        raise ModelError(
            f"{method}: terms = 0 takes as many as the budget allows; set budget.params or terms"
        )

    def hint() -> str:
        return _nearest(spec, choice, budget)

    what = f"{method} {shape}, terms = {max(1, terms)}"
    check_terms(shape, max(1, terms))
    result = with_kron_mlp(spec, shape, choice, terms=max(1, terms))
    budget.check(result, what=what, hint=hint)
    notes = [note for note in (rank_warning(shape, terms),) if note]
    macs, dense = terms * min(shape.macs()), shape.rows * shape.cols
    if macs > dense:
        notes.append(
            f"{terms} term(s) of {shape} need {macs / dense:.2f} times the multiplications of a dense matrix"
        )
    return Plan(method=method, source=spec, spec=result, notes=tuple(notes))


def _mlp_size(spec: ModelSpec, choice: KronChoice) -> tuple[int, int]:
    """(in, out) of `mlp.c_fc`, the same in all chosen blocks."""
    widths = {spec.blocks[i].mlp_hidden for i in chosen_blocks(spec, choice.layers)}
    if len(widths) > 1:
        raise ModelError(
            f"MLPs of widths {sorted(widths)} cannot share one factor shape; choose fewer layers"
        )
    return spec.arch.n_embd, widths.pop()


def _base(spec: ModelSpec, choice: KronChoice, convention: Convention) -> int:
    """Parameters of everything but the matrices to be replaced."""
    names = {f"h.{i}.{role}" for i in chosen_blocks(spec, choice.layers) for role in (UP, DOWN)}
    replaced = sum(site.cost.params - site.n_bias for site in spec.sites() if site.name in names)
    return spec.num_parameters(convention) - replaced


def _most_terms(spec: ModelSpec, shape: KronShape, choice: KronChoice, budget: Budget) -> int:
    matrices = 2 * len(chosen_blocks(spec, choice.layers))
    return budget.most_terms(
        base=_base(spec, choice, budget.convention),
        per_term=matrices * shape.params(1, scales=choice.scales),
        max_terms=1 if choice.one_term else shape.max_terms,
    )


def _nearest(spec: ModelSpec, choice: KronChoice, budget: Budget, *, count: int = 3) -> str:
    """The shapes nearest to the one asked for that keep the budget with some number of terms."""
    base = _base(spec, choice, budget.convention)
    matrices = 2 * len(chosen_blocks(spec, choice.layers))
    rows, cols = _mlp_size(spec, choice)
    found: list[str] = []
    for shape in nearest_shapes(rows, cols, choice.shape, count=len(legal_shapes(rows, cols))):
        terms = _most_terms(spec, shape, choice, budget)
        total = base + matrices * shape.params(terms, scales=choice.scales)
        if terms and budget.fits(total):
            found.append(f"shape = [{shape.m1}, {shape.n1}], terms = {terms} ({total:,})")
        if len(found) == count:
            break
    if found:
        return "nearest that keep it: " + "; ".join(found)
    smallest = base + matrices * min(
        shape.params(1, scales=choice.scales) for shape in legal_shapes(rows, cols)
    )
    largest = spec.num_parameters(budget.convention)
    return f"no shape keeps it: these blocks leave {smallest:,} to {largest:,} parameters"
