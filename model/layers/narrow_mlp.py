"""The MLP of (C x n)(1 x q) factors as one function: a narrow MLP whose units are mixtures of q GELUs.

With B of one row, hidden unit (j, c) is GELU(u_c y_j + b_jc) for y = x A, and the down-projection needs of it
only z_j = sum_c d_c GELU(u_c y_j + b_jc): two products of width n, and nothing of width n q that would have
to be written to memory. It is made in pieces that stay in cache, and made again in the backward pass, so that
y is all that is kept. Between the products everything is fp32, whatever the products are in.
"""

# ruff: noqa: PLR0917 - operators take their tensors by position
# N tokens, P of them in a piece · C width · r, s terms of A and D · n columns of A · q columns of B

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.layers.gelu import CUBIC, LINEAR

PIECE = 262_144
"""Numbers of a piece, tokens times n; the backward pass works on about eight such tensors at once."""


def narrow_mlp(x: Tensor, A: Tensor, u: Tensor, b: Tensor, D: Tensor, d: Tensor) -> Tensor:
    """(N, C) -> (N, C'): z D with z_sj = sum_c d_sc GELU(sum_r u_rc (x A)_rj + b_jc), GELU in its tanh form.

    A (C, r n) and D (s n, C') hold their terms side by side; u (r, q), d (s, q), b (n q,). The products are
    in the type of x, A and D; u, d and b are fp32. Differentiable once, in everything.
    """
    out: Tensor = _forward(x, A, u, b, D, d)[0]
    return out


@torch.library.custom_op("krony::narrow_mlp", mutates_args=())
def _forward(x: Tensor, A: Tensor, u: Tensor, b: Tensor, D: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and y (N, r n), which the backward pass needs."""
    q, n = d.shape[1], D.shape[0] // d.shape[0]
    y = x @ A
    z = y.new_empty(len(x), D.shape[0])
    biases = b.reshape(n, q).T.contiguous()
    for piece in _pieces(len(x), n):
        ys = _terms(y[piece], n)
        h, s = (torch.empty_like(ys[0]) for _ in range(2))
        mixed = torch.zeros(len(d), *h.shape, device=x.device)
        for c in range(q):
            _combine(ys, u[:, c], biases[c], out=h)
            torch.addcmul(_scalar(LINEAR), h, h, value=CUBIC, out=s)
            s.mul_(h).sigmoid_().mul_(h)
            for k in range(len(d)):
                mixed[k].addcmul_(s, d[k, c])
        _put(mixed, z[piece])
    return z @ D, y


@_forward.register_fake
def _(x: Tensor, A: Tensor, _u: Tensor, _b: Tensor, D: Tensor, _d: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], D.shape[1]), x.new_empty(x.shape[0], A.shape[1])


@torch.library.custom_op("krony::narrow_mlp_backward", mutates_args=())
def _backward(
    grad: Tensor, x: Tensor, A: Tensor, u: Tensor, b: Tensor, D: Tensor, d: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, A, u, b, D, d."""
    q, n = d.shape[1], D.shape[0] // d.shape[0]
    grad_z = grad @ D.mT
    z, grad_y = torch.empty_like(grad_z), torch.empty_like(y)
    grad_u, grad_d = torch.zeros_like(u), torch.zeros_like(d)
    biases = b.reshape(n, q).T.contiguous()
    grad_b = torch.zeros_like(biases)
    for piece in _pieces(len(x), n):
        ys, grads = _terms(y[piece], n), _terms(grad_z[piece], n)
        h, p, s = (torch.empty_like(ys[0]) for _ in range(3))
        mixed, back = torch.zeros_like(grads), torch.zeros_like(ys)
        for c in range(q):
            _combine(ys, u[:, c], biases[c], out=h)
            torch.addcmul(_scalar(LINEAR), h, h, value=CUBIC, out=p)  # k + K h^2
            torch.mul(p, h, out=s).sigmoid_()
            h.mul_(s)  # GELU
            for k in range(len(d)):
                mixed[k].addcmul_(h, d[k, c])
                grad_d[k, c] += torch.dot(h.view(-1), grads[k].view(-1))
            # GELU' = s + h s (1 - s) (k + 3 K h^2), and k + 3 K h^2 = 3 p - 2 k
            h.addcmul_(h, s, value=-1)
            torch.add(_scalar(-2 * LINEAR), p, alpha=3, out=p)
            s.addcmul_(h, p)
            _combine(grads, d[:, c], None, out=p)
            s.mul_(p)
            grad_b[c] += s.sum(0)
            for k in range(len(u)):
                back[k].addcmul_(s, u[k, c])
                grad_u[k, c] += torch.dot(s.view(-1), ys[k].view(-1))
        _put(mixed, z[piece])
        _put(back, grad_y[piece])
    return grad_y @ A.mT, x.mT @ grad_y, grad_u, grad_b.T.reshape(-1), z.mT @ grad, grad_d


@_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, A: Tensor, u: Tensor, b: Tensor, D: Tensor, d: Tensor, _y: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    gx, ga, gu, gb, gd, gs = (each.new_empty(each.shape) for each in (x, A, u, b, D, d))
    return gx, ga, gu, gb, gd, gs


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)  # nobody asks for a gradient of y
    ctx.save_for_backward(*inputs, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, ...]:
    return tuple(_backward(grad.contiguous(), *ctx.saved_tensors))


_forward.register_autograd(_gradients, setup_context=_keep)


def _pieces(tokens: int, n: int) -> Iterator[slice]:
    rows = max(1, PIECE // n)
    return (slice(begin, begin + rows) for begin in range(0, tokens, rows))


def _terms(rows: Tensor, n: int) -> Tensor:
    """(P, r n) as fp32 (r, P, n); no copy of one fp32 term."""
    return rows.reshape(len(rows), -1, n).transpose(0, 1).float().contiguous()


def _put(terms: Tensor, rows: Tensor) -> None:
    """The inverse of `_terms`, into `rows`."""
    rows.copy_(terms.transpose(0, 1).flatten(1))


def _combine(terms: Tensor, weights: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """bias + sum_k weights_k terms_k, (P, n)."""
    if bias is None:
        torch.mul(terms[0], weights[0], out=out)
    else:
        torch.addcmul(bias, terms[0], weights[0], out=out)
    for term, weight in zip(terms[1:], weights[1:], strict=True):
        out.addcmul_(term, weight)


def _scalar(value: float) -> Tensor:
    return torch.tensor(value)
