"""The token table as a Kronecker product: a narrow table whose entries are spread by a short row.

What KnGPT2 and TQCompressor do to the embedding. The head either reads the same factors, or is a dense matrix
of its own that starts as the old table.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from model.compress.assemble import report_matrix
from model.compress.contract import ModuleReport
from model.config import Kron, ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.embedding import KroneckerEmbedding

TABLE = "wte"


def with_kron_table(
    spec: ModelSpec, *, factor: int, gather: bool, head: Literal["untied", "tied"]
) -> ModelSpec:
    """A copy whose token table is `factor` times narrower; ModelError if the width is no multiple of it."""
    if not spec.tied:
        raise ModelError("the output head of this model is a matrix of its own already; expected a tied one")
    width = spec.arch.n_embd
    if width % factor:
        raise ModelError(f"a token table of width {width} cannot be narrowed {factor} times")
    table = Kron(m1=spec.arch.vocab_size, n1=width // factor, m2=1, n2=factor, gather_out=gather)
    return replace(spec, embedding=table, tied=head == "tied")


@torch.no_grad()
def set_table(fresh: GPT2, left: Tensor, right: Tensor, order: Tensor | None = None) -> None:
    """Fill the table with the factors of W[:, order]; the stored order if there is none."""
    table = fresh.wte
    if not isinstance(table, KroneckerEmbedding):
        raise ModelError("the token table of this plan is dense; the plan is another method's")
    table.left.copy_(left)
    table.right.copy_(right)
    if table.gather_out is not None and order is not None:
        table.gather_out.copy_(order.argsort())


def report_table(fresh: GPT2, weight: Tensor, *, predicted_error: float, **details: Any) -> ModuleReport:
    """The report of the token table, `weight` (V, C) before; it costs a row per token, and the tied head."""
    matrix, arch = fresh.spec.embedding, fresh.spec.arch
    assert isinstance(matrix, Kron)
    row = report_matrix(
        TABLE, matrix, weight, fresh.wte.table().detach(), predicted_error=predicted_error, **details
    )
    head = matrix.transposed().cost(arch.n_embd, arch.vocab_size).macs if fresh.spec.tied else 0
    return replace(row, macs=matrix.terms * arch.n_embd + head)
