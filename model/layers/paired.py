"""Both matrices of an MLP at once: whether that pays for a given pair of layers, and the call.

Layer by layer, the activations between the two are written and read several times, and they are the widest
tensor of a block. Where both layers are Kronecker sums that split the hidden units alike, one function does
the whole MLP. Whether it is taken follows from structure, device and number of tokens alone; a layer with a
forced mode or order, or with hooks, is called by itself. One token goes through factors that both layers have
prepared (`one_token.py`), in the order that was asked for.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from model.layers.kronecker import KroneckerLinear
from model.layers.narrow_mlp import narrow_mlp
from model.layers.one_token import is_one_token, through
from model.layers.structured import StructuredLinear

FEWEST_TOKENS = 64
"""Below, the two layers by themselves have less overhead (seen on CPUs)."""

MOST_MIXED = 32
"""Columns of B times terms of both layers, up to which mixing costs less than the products save."""


def paired(up: StructuredLinear, down: StructuredLinear, x: Tensor, *, gelu: str) -> Tensor | None:
    """down(GELU(up(x))) of (..., C) in one function; None where the layers should be called by themselves.

    `gelu` is torch's name of the approximation.
    """
    tokens = x.numel() // up.n_in
    if not (isinstance(up, KroneckerLinear) and isinstance(down, KroneckerLinear)):
        return None
    if tokens == 1:
        return _one_token(up, down, x, gelu=gelu)
    if gelu != "tanh" or x.device.type != "cpu" or tokens < FEWEST_TOKENS or not _is_narrow(up, down):
        return None
    if torch.float64 in (x.dtype, up.left.dtype):  # between the products all is fp32
        return None
    if not all(_is_free(layer, tokens) for layer in (up, down)):
        return None
    if up.gather_in is not None:
        x = x[..., up.gather_in]
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    left, right = up.factors()  # (r, C, n), (r, 1, q)
    left_down, right_down = down.factors()  # (s, n, C'), (s, q, 1)
    bias, bias_down = up.full_bias(), down.full_bias()
    flat = narrow_mlp(
        x.reshape(tokens, up.n_in).to(dtype),
        left.transpose(0, 1).flatten(1).to(dtype),
        right[:, 0].float(),
        (right.new_zeros(up.n_out) if bias is None else bias).float(),
        left_down.flatten(0, 1).to(dtype),
        right_down[:, :, 0].float(),
    )
    ordered = flat if down.gather_out is None else flat[:, down.gather_out]
    out = ordered if bias_down is None else ordered + bias_down
    return out.reshape(*x.shape[:-1], down.n_out)


def _one_token(up: KroneckerLinear, down: KroneckerLinear, x: Tensor, *, gelu: str) -> Tensor | None:
    """The whole MLP in five operators and no conversions but at its ends, where both layers are prepared."""
    if not is_one_token(x, width=up.n_in) or _is_heard(up) or _is_heard(down):
        return None
    first, last = up.for_one_token(), down.for_one_token()
    if first is None or last is None:
        return None
    return through((first, partial(F.gelu, approximate=gelu), last), x, width=down.n_out)


def _is_narrow(up: KroneckerLinear, down: KroneckerLinear) -> bool:
    """Whether B is one row up and one column down, over the same hidden units in the same order."""
    mixed = up.shape.n2 * (len(up.left) + len(down.left))
    return (
        up.shape.m2 == down.shape.n2 == 1
        and up.shape.n2 == down.shape.m2
        and up.gather_out is None
        and down.gather_in is None
        and mixed <= MOST_MIXED
    )


def _is_free(layer: KroneckerLinear, tokens: int) -> bool:
    """Whether nobody asked for, or listens to, this very layer."""
    return not _is_heard(layer) and layer.order == "auto" and layer.resolve_mode(tokens) == "factored"


def _is_heard(layer: KroneckerLinear) -> bool:
    """Whether somebody has hooks on this very layer."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)  # noqa: SLF001
    return any(hooks)
