"""Attention in blocks of queries is torch's, as exact as the formula written out in bf16, both ways."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import _MULTIPLIES_BF16, QUERIES, _forward, causal_attention

SHAPES = [
    (1, 2, 1024, 64, 64),
    (2, 3, 300, 64, 64),
    (2, 2, QUERIES, 16, 24),
    (1, 1, QUERIES + 1, 8, 8),
    (3, 2, 7, 8, 8),
]
"""B, H, T, Q, O."""


def heads(shape: tuple[int, ...], *, seed: int = 0) -> list[Tensor]:
    """q, k, v (B, H, T, .) in bf16, cut from one tensor as the layer before attention gives them."""
    rows, count, tokens, wide, out = shape
    x = torch.randn(
        rows, tokens, count * (2 * wide + out), generator=torch.Generator().manual_seed(seed)
    ).bfloat16()
    parts = x.split([count * wide, count * wide, count * out], dim=-1)
    return [each.reshape(rows, tokens, count, -1).transpose(1, 2) for each in parts]


def passes(attention: object, inputs: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Result and gradients of q, k, v, in fp32."""
    leaves = [each.detach().to(dtype).requires_grad_() for each in inputs]
    out = attention(*leaves)  # type: ignore[operator]
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(grad.to(dtype))
    return [each.detach().float() for each in (out, *(leaf.grad for leaf in leaves))]


def stock(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)


def blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _forward(q, k, v, 0.2).transpose(1, 2)


def distance(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


def formula(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Written out, every step in the type of its inputs."""
    tokens = q.shape[2]
    later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return torch.softmax((0.2 * q @ k.mT).masked_fill(later, -torch.inf), -1) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_are_as_exact_as_the_formula_in_bf16(shape: tuple[int, ...]) -> None:
    inputs = heads(shape)
    right = passes(stock, inputs, torch.float32)
    written = passes(formula, inputs, torch.bfloat16)
    for found, plain, exact in zip(passes(blocks, inputs, torch.bfloat16), written, right, strict=True):
        assert distance(found, exact) < 1.25 * distance(plain, exact)
        assert distance(found, exact) < 2**-7


def test_only_training_takes_them() -> None:
    q, k, v = heads((1, 2, 300, 16, 16))
    assert torch.equal(causal_attention(q, k, v, scale=0.2), stock(q, k, v))
    trained = [each.detach().requires_grad_() for each in (q, k, v)]
    in_blocks = torch.equal(causal_attention(*trained, scale=0.2), blocks(*trained))
    assert in_blocks == _MULTIPLIES_BF16
    with torch.no_grad():
        assert torch.equal(causal_attention(*trained, scale=0.2), stock(q, k, v))


def test_no_position_sees_a_later_one() -> None:
    q, k, v = heads((1, 2, 600, 16, 16))
    before = blocks(q, k, v)
    k[:, :, 300:], v[:, :, 300:] = 7.0, -7.0
    after = blocks(q, k, v)
    assert torch.equal(before[:, :, :300], after[:, :, :300])
    assert not torch.equal(before[:, :, 300:], after[:, :, 300:])


def test_the_operator_keeps_the_contract_of_torch() -> None:
    inputs = [each.detach().requires_grad_() for each in heads((2, 2, 40, 8, 8))]
    torch.library.opcheck(_forward, (*inputs, 0.2))


def test_autocast_and_the_compiler_change_nothing() -> None:
    inputs = heads((1, 2, 300, 16, 16))
    expected = passes(blocks, inputs, torch.bfloat16)
    compiled = torch.compile(blocks, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = passes(blocks, inputs, torch.bfloat16)
    for each in (found, passes(compiled, inputs, torch.bfloat16)):
        assert all(torch.equal(one, other) for one, other in zip(each, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_precisions_are_torchs_own(dtype: torch.dtype) -> None:
    q, k, v = (each.to(dtype) for each in heads((1, 2, 300, 16, 16)))
    assert torch.equal(causal_attention(q, k, v, scale=0.2), stock(q, k, v))
