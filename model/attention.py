"""Causal self-attention: torch's function, and blocks of queries where bf16 on a CPU is faster in products.

torch's kernel for CPUs multiplies small tiles and reaches a quarter of the rate of a large product in bf16.
A block of queries against all keys up to its end is one product per step for all heads, a softmax over rows
that still lie in cache, and no scores outlive their block: the backward pass makes them again, as torch's
kernel does. Between its steps a block lies in bf16, and softmax works in fp32 inside: as exact as the formula
written out in bf16, with up to twice the rounding error of torch's kernel. So this is for training alone.
"""

# B rows · H heads · T tokens · Q, O width of a query or key, of a value
# P queries of a block, E keys up to its end

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES = 256
"""Of a block. Fewer waste less of the triangle on the diagonal, more make larger products."""

FEWEST_TOKENS = 128
"""Below, torch's kernel is as fast."""


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    """softmax(scale q k^T, masked) v: q, k (B, H, T, Q), v (B, H, T, O) -> (B, H, T, O)."""
    if _pays(q, v):
        out: Tensor = _forward(q, k, v, scale).transpose(1, 2)
        return out
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


def _pays(q: Tensor, v: Tensor) -> bool:
    """Whether this is training in bf16 on a CPU that multiplies it as such; AMX has not been measured.

    Not without gradients: what an evaluation in bf16 says is to be as exact as torch's kernel has it.
    """
    return (
        torch.is_grad_enabled()
        and q.requires_grad
        and q.device.type == "cpu"
        and q.dtype == v.dtype == torch.bfloat16
        and q.shape[2] >= FEWEST_TOKENS
        and _MULTIPLIES_BF16
    )


def _multiplies_bf16() -> bool:
    found: dict[str, object] = dict(getattr(torch.cpu, "get_capabilities", dict)())  # unknown to older torch
    return bool(found.get("avx512_bf16")) and not found.get("amx_tile")


_MULTIPLIES_BF16 = _multiplies_bf16()


@torch.library.custom_op("krony::causal_attention", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, T, H, O): as the layer behind it reads it."""
    out = _like_rows(v)
    scores, weights = (_room(q) for _ in range(2))
    for row in range(len(q)):
        queries, keys, values = q[row] * scale, k[row].contiguous(), v[row].contiguous()
        for block, before in _blocks(q.shape[2]):
            found = _weights(queries[:, block], keys[:, before], scores, weights)
            out[row, :, block] = torch.bmm(found, values[:, before])
    return out.transpose(1, 2)


@_forward.register_fake
def _(_q: Tensor, _k: Tensor, v: Tensor, _scale: float) -> Tensor:
    return _like_rows(v).transpose(1, 2)


@torch.library.custom_op("krony::causal_attention_backward", mutates_args=())
def _backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v; `grad` (B, T, H, O)."""
    grad_q, grad_k, grad_v = (_like_rows(each) for each in (q, k, v))
    scores, weights, slopes = (_room(q) for _ in range(3))
    for row in range(len(q)):
        queries, keys, values = q[row] * scale, k[row].contiguous(), v[row].contiguous()
        grads = grad[row].transpose(0, 1).contiguous()
        sum_k, sum_v = (torch.zeros(each.shape, device=q.device) for each in (keys, values))  # fp32
        for block, before in _blocks(q.shape[2]):
            found = _weights(queries[:, block], keys[:, before], scores, weights)
            slope = _view(slopes, found.shape)
            torch.bmm(grads[:, block], values[:, before].mT, out=slope)
            of_scores = _view(scores, found.shape)
            torch.ops.aten._softmax_backward_data.out(slope, found, -1, q.dtype, grad_input=of_scores)  # noqa: SLF001
            grad_q[row, :, block] = torch.bmm(of_scores, keys[:, before]) * scale
            sum_k[:, before] += torch.bmm(of_scores.mT, queries[:, block])
            sum_v[:, before] += torch.bmm(found.mT, grads[:, block])
        grad_k[row], grad_v[row] = sum_k, sum_v
    return grad_q, grad_k, grad_v


@_backward.register_fake
def _(_grad: Tensor, q: Tensor, k: Tensor, v: Tensor, _scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return _like_rows(q), _like_rows(k), _like_rows(v)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:  # noqa: ARG001
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_backward(grad, *ctx.saved_tensors, ctx.scale), None


_forward.register_autograd(_gradients, setup_context=_keep)


def _weights(queries: Tensor, keys: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
    """Attention of the last P of E positions to all of them, (H, P, E); both rooms are overwritten."""
    (heads, count, _), end = queries.shape, keys.shape[1]
    found = torch.bmm(queries, keys.mT, out=_view(scores, (heads, count, end)))
    found[:, :, end - count :] += found.new_full((count, count), -torch.inf).triu(1)
    out: Tensor = torch.ops.aten._softmax.out(found, -1, False, out=_view(weights, found.shape))  # noqa: SLF001
    return out


def _blocks(tokens: int) -> Iterator[tuple[slice, slice]]:
    """Queries of a block, and the keys that any of them may see."""
    for begin in range(0, tokens, QUERIES):
        end = min(begin + QUERIES, tokens)
        yield slice(begin, end), slice(end)


def _room(q: Tensor) -> Tensor:
    """Numbers for the scores of the largest block; products write only into whole tensors."""
    _, heads, tokens, _ = q.shape
    return q.new_empty(heads * min(QUERIES, tokens) * tokens)


def _view(room: Tensor, shape: tuple[int, ...]) -> Tensor:
    return room[: torch.Size(shape).numel()].view(shape)


def _like_rows(heads: Tensor) -> Tensor:
    """Empty (B, H, T, O) that lies as (B, T, H, O)."""
    rows, count, tokens, width = heads.shape
    return heads.new_empty(rows, tokens, count, width).transpose(1, 2)
