"""Narrower heads: fewer query/key columns and a lower value/output rank, from head-sized statistics.

A query/key pair matters through its logits, a value/output pair through its product. Both are low rank
problems whose metrics are d x d, but the optimum only needs their images inside the head, so every root here
is head-sized. All functions take leading batch dimensions, one entry per head.
"""

# d layer width, s head width, r kept · W_q, W_k, W_v (..., d, s), b_q (..., s), W_o (..., s, d)
# C second moment (d, d) or covariance of the layer input

from dataclasses import dataclass

import torch
from torch import Tensor

from model.algebra.psd import psd_roots
from model.config import ModelError


@dataclass(frozen=True)
class QueryKey:
    """A narrower query/key pair without key bias; products with the old logits scale."""

    query: Tensor
    """W_q', (..., d, r)."""
    query_bias: Tensor
    """b_q', (..., r)."""
    key: Tensor
    """W_k', (..., d, r)."""
    sigma: Tensor
    """All singular values, (..., s); the all-pairs logit error is the tail of their squares."""


@dataclass(frozen=True)
class ValueOutput:
    """A narrower value/output pair."""

    value: Tensor
    """W_v', (..., d, r)."""
    output: Tensor
    """W_o', (..., r, d)."""
    sigma: Tensor
    """All singular values of C^1/2 W_v W_o, (..., s); the error is the tail of their squares."""


def head_gram(weight: Tensor, bias: Tensor, gram: Tensor, mean: Tensor) -> Tensor:
    """E[z^T z], (..., s, s), for z = x W + b, from the second moment (d, d) and the mean (d,) of x alone."""
    weight, bias = weight.double(), bias.double()
    shift = (mean.double() @ weight).unsqueeze(-1) * bias.unsqueeze(-2)  # E[x W]^T b
    outer = bias.unsqueeze(-1) * bias.unsqueeze(-2)
    return weight.mT @ (gram.double() @ weight) + shift + shift.mT + outer


def head_metric(weight: Tensor, metric: Tensor) -> Tensor:
    """W^T C W, (..., s, s): the metric C seen from inside the head; the key covariance for C = Cov."""
    weight = weight.double()
    return weight.mT @ (metric.double() @ weight)


def cr_scores(query_gram: Tensor, key_gram: Tensor) -> Tensor:
    """CR importance of each query/key column, (..., s): sqrt(C_Q,ii C_K,ii).

    The product of the column norms of both symmetric roots, which needs no root; Cholesky factors would give
    other norms.
    """
    diagonals = query_gram.double().diagonal(dim1=-2, dim2=-1), key_gram.double().diagonal(dim1=-2, dim2=-1)
    return (diagonals[0].clamp_min(0) * diagonals[1].clamp_min(0)).sqrt()


def joint_query_key(
    query: Tensor, query_bias: Tensor, key: Tensor, query_gram: Tensor, key_cov: Tensor, *, rank: int
) -> QueryKey:
    """The rank-r query/key pair of least mean squared logit error over all pairs; exact at r = s.

    Takes E[q^T q] with the bias (`head_gram`) and the covariance of the keys (`head_metric`). Keys count
    centred, which softmax cannot see, and lose their bias. With S_q, S_k the roots of the two and S_q S_k = U
    S V^T: W_q' = W_q S_k V_r S_r^-1/2, W_k' = W_k S_q U_r S_r^-1/2. Never above any selection of r columns.
    """
    _check_rank(rank, query.shape[-1])
    root_q, root_k = psd_roots(query_gram).root, psd_roots(key_cov).root
    u, sigma, vh = torch.linalg.svd(root_q @ root_k)
    top = sigma[..., :rank]
    kept = top > 1e-12 * sigma[..., :1]
    scale = torch.where(kept, torch.where(kept, top, 1.0).rsqrt(), 0.0).unsqueeze(-2)
    to_query = root_k @ (vh.mT[..., :rank] * scale)  # (..., s, r)
    to_key = root_q @ (u[..., :rank] * scale)
    bias = (query_bias.double().unsqueeze(-2) @ to_query).squeeze(-2)
    return QueryKey(query=query.double() @ to_query, query_bias=bias, key=key.double() @ to_key, sigma=sigma)


def value_output(value: Tensor, output: Tensor, metric: Tensor, *, rank: int) -> ValueOutput:
    """The rank-r value/output pair of least output error in the metric C (..., d, d), inverse-free.

    V_r are the top right singular vectors of (W_v^T C W_v)^1/2 W_o; W_v' = W_v W_o V_r, W_o' = V_r^T.
    """
    _check_rank(rank, value.shape[-1])
    value, output = value.double(), output.double()
    _, sigma, vh = torch.linalg.svd(psd_roots(head_metric(value, metric)).root @ output, full_matrices=False)
    kept = vh[..., :rank, :]
    return ValueOutput(value=value @ (output @ kept.mT), output=kept, sigma=sigma)


def value_output_two_stage(value: Tensor, output: Tensor, metric: Tensor, *, rank: int) -> ValueOutput:
    """The same product in MoDeGPT's published form: SVD of C^1/2 W_v, then of (S_1 V_1^T) W_o.

    Costs a root and a pseudo-inverse root of the d x d metric; kept to check `value_output` against.
    """
    _check_rank(rank, value.shape[-1])
    roots = psd_roots(metric)
    u1, s1, vh1 = torch.linalg.svd(roots.root @ value.double(), full_matrices=False)
    u2, s2, vh2 = torch.linalg.svd((s1.unsqueeze(-1) * vh1) @ output.double(), full_matrices=False)
    new_value = roots.inverse @ (u1 @ u2[..., :rank])
    return ValueOutput(value=new_value, output=s2[..., :rank, None] * vh2[..., :rank, :], sigma=s2)


def _check_rank(rank: int, width: int) -> None:
    if not 1 <= rank <= width:
        raise ModelError(f"head rank {rank} of a head of width {width}: choose 1 to {width}")
