"""The sizes of Krony-PT by name, and every other Kronecker shape near a budget: integers only.

A row is one shape on all MLPs: `c_fc` takes it, `mlp.c_proj` its transpose. Parameters, rank and multiply-
accumulates are those of `ModelSpec`, so what is printed here is what a built model counts.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from model.algebra.shapes import legal_shapes
from model.config import GPT2Config, Kron, ModelError, ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class ShapeRow:
    """One size: GPT-2 whose MLP matrices all are sums of `terms` products of one shape."""

    name: str
    shape: str
    terms: int
    per_matrix: int
    """Parameters of one MLP matrix without its bias."""
    parameters: int
    """Unique parameters of the model, `wpe` included."""
    krony_parameters: int
    """The same without `wpe`, as Krony-PT counts."""
    rank: int
    """Largest rank of one MLP matrix."""
    full_rank: bool
    mlp_macs: float
    """Multiply-accumulates of the MLPs without forming W, relative to dense."""
    macs_per_token: int


PRESETS: tuple[tuple[str, Kron | None], ...] = (
    ("GPT-2", None),
    ("67M", Kron(m1=32, n1=64, m2=24, n2=48)),
    ("MF1", Kron(m1=256, n1=64, m2=3, n2=48)),
    ("MF2", Kron(m1=256, n1=1024, m2=3, n2=3)),
    ("80M-2", Kron(m1=256, n1=1024, m2=3, n2=3, terms=2)),
    ("81M", Kron(m1=768, n1=768, m2=1, n2=4)),
    ("81M-2x2", Kron(m1=384, n1=1536, m2=2, n2=2)),
    ("85M", Kron(m1=768, n1=1024, m2=1, n2=3)),
    ("92M-4", Kron(m1=256, n1=1024, m2=3, n2=3, terms=4)),
    ("92M-4 scales", Kron(m1=256, n1=1024, m2=3, n2=3, terms=4, scales=True)),
    ("95M", Kron(m1=384, n1=3072, m2=2, n2=1)),
    ("96M", Kron(m1=768, n1=1536, m2=1, n2=2)),
)
"""Krony-PT's models (arXiv 2412.12351v2, Table I) by their shape on GPT-2 small's `c_fc`."""


def presets() -> list[ShapeRow]:
    """The named sizes of Krony-PT, on GPT-2 small."""
    return [_row(name, GPT2Config(), kron) for name, kron in PRESETS]


def search(
    size: GPT2Config, *, near: int = 0, tolerance: float = 0.002, max_terms: int = 1, full_rank: bool = False
) -> list[ShapeRow]:
    """Every shape with up to `max_terms` terms, largest model first.

    `near` keeps models of at most that many parameters and at least `near * (1 - tolerance)`; `full_rank`
    drops shapes that cannot reach the rank of the dense matrix. Raises ModelError if nothing is left.
    """
    rows = []
    for shape in legal_shapes(size.n_embd, size.n_inner):
        for terms in range(1, min(max_terms, shape.max_terms) + 1):
            row = _row("", size, Kron(m1=shape.m1, n1=shape.n1, m2=shape.m2, n2=shape.n2, terms=terms))
            fits = not near or near * (1 - tolerance) <= row.parameters <= near
            if fits and (row.full_rank or not full_rank):
                rows.append(row)
    if not rows:
        raise ModelError(
            f"no Kronecker shape with up to {max_terms} terms has {near * (1 - tolerance):,.0f} to {near:,} "
            "parameters; allow more terms (--terms) or choose another size"
        )
    return sorted(rows, key=lambda row: (-row.parameters, row.mlp_macs))


def table(rows: Sequence[ShapeRow]) -> str:
    """Rows for a terminal."""
    head = f"{'size':<14}{'A x B of c_fc':<24}{'terms':>6}{'parameters':>14}{'without wpe':>14}"
    lines = [f"{head}{'rank':>7}{'MLP MACs':>10}"]
    for row in rows:
        rank = f"{row.rank}" if row.full_rank else f"{row.rank} !"
        lines.append(
            f"{row.name:<14}{row.shape:<24}{row.terms:>6}{row.parameters:>14,}{row.krony_parameters:>14,}"
            f"{rank:>7}{row.mlp_macs:>10.3f}"
        )
    if not all(row.full_rank for row in rows):
        lines.append("! cannot reach the rank of the dense matrix: rank(A x B) = rank A * rank B")
    return "\n".join(lines)


def as_dicts(rows: Sequence[ShapeRow]) -> list[dict[str, Any]]:
    """Rows as plain JSON."""
    return [asdict(row) for row in rows]


def _row(name: str, size: GPT2Config, kron: Kron | None) -> ShapeRow:
    dense = ModelSpec.dense(size)
    spec = dense
    if kron:
        up = {f"h.{i}.mlp.c_fc": kron for i in range(size.n_layer)}
        down = {f"h.{i}.mlp.c_proj": kron.transposed() for i in range(size.n_layer)}
        spec = dense.with_matrices(up | down)
    full = (
        kron.cost(size.n_embd, size.n_inner)
        if kron
        else dense.sites()[2].matrix.cost(size.n_embd, size.n_inner)
    )
    rest = dense.macs_per_token() - _mlp_macs(dense)
    return ShapeRow(
        name=name,
        shape=kron.describe().split(" ")[-1] if kron else "dense",
        terms=kron.terms if kron else 0,
        per_matrix=full.params,
        parameters=spec.num_parameters("tied_all"),
        krony_parameters=spec.num_parameters("krony_no_wpe"),
        rank=full.rank_bound,
        full_rank=full.rank_bound == min(size.n_embd, size.n_inner),
        mlp_macs=(spec.macs_per_token() - rest) / _mlp_macs(dense),
        macs_per_token=spec.macs_per_token(),
    )


def _mlp_macs(spec: ModelSpec) -> int:
    return sum(site.cost.macs for site in spec.sites() if ".mlp." in site.name)
