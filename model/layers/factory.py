"""From what a spec says to the module that does it. The only place that knows all layers."""

from collections.abc import Callable

from model.config import Dense, Kron, Site
from model.layers.dense import DenseLinear
from model.layers.embedding import Embedding, KroneckerEmbedding
from model.layers.kronecker import KroneckerLinear
from model.layers.low_rank import LowRankLinear
from model.layers.structured import StructuredLinear

LinearFactory = Callable[[Site], StructuredLinear]
"""What `GPT2` is given to fill each place where a weight matrix stands."""

TokenTable = Embedding | KroneckerEmbedding


def make_linear(site: Site) -> StructuredLinear:
    """The layer for one weight matrix, with all parameters zero."""
    matrix = site.matrix
    if isinstance(matrix, Dense):
        return DenseLinear(matrix, site.n_in, site.n_out, n_bias=site.n_bias)
    if isinstance(matrix, Kron):
        return KroneckerLinear(matrix, site.n_in, site.n_out, n_bias=site.n_bias)
    return LowRankLinear(matrix, site.n_in, site.n_out, n_bias=site.n_bias)


def make_table(matrix: Dense | Kron, *, rows: int, width: int) -> TokenTable:
    """The token table, with all parameters zero."""
    return KroneckerEmbedding(matrix) if isinstance(matrix, Kron) else Embedding(rows, width)
