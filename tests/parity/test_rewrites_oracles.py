"""Exact rewrites of GPT-2 against their references: alone and all together they leave the logits as they are.

E1 no key bias, E2 value bias into the output bias, E3 hidden units in another order, E4 zero padding of
narrow MLPs and heads. E2 holds without dropout, and this model has none.
"""

import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from model.compress.modegpt_attention import Heads
from model.config import GPT2Config, ModelSpec
from model.export import to_dense

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=61)
IDX = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(5))
ALL = ("E1", "E2", "E3", "E4")
SUBSETS = [subset for size in range(5) for subset in itertools.combinations(ALL, size)]


@pytest.fixture(scope="module")
def narrow(toy):
    """Blocks with fewer units and narrower heads, all biases in place: what E4 has something to do for."""
    dense = ModelSpec.dense(ARCH)
    widths = ((40, 5, 11), (128, 16, 3))
    blocks = tuple(
        replace(block, mlp_hidden=hidden, head_qk=qk, head_vo=vo)
        for block, (hidden, qk, vo) in zip(dense.blocks, widths, strict=True)
    )
    return toy(replace(dense, blocks=blocks), seed=1, dtype=torch.float64)


def reference(oracle, heads: Heads):
    """The heads of a block as the references hold them, with the scale of the stock head."""
    parts = (
        heads.query, heads.query_bias, heads.key, heads.key_bias,
        heads.value, heads.value_bias, heads.output, heads.output_bias,
    )  # fmt: skip
    return oracle.Attention(*(part.detach().numpy() for part in parts), scale=ARCH.head_dim**-0.5)


@torch.no_grad()
def write(model, i, heads: Heads) -> None:
    packed, output = model.site(f"h.{i}.attn.c_attn"), model.site(f"h.{i}.attn.c_proj")
    parts = (heads.query, heads.key, heads.value)
    packed.weight.copy_(torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1))
    biases = (heads.query_bias, heads.key_bias, heads.value_bias)
    packed.bias.copy_(torch.cat([part.flatten() for part in biases]))
    output.weight.copy_(heads.output.flatten(0, 1))
    output.bias.copy_(heads.output_bias)


@torch.no_grad()
def rewritten(model, subset):
    """A copy with the rewrites of the subset made."""
    model = copy.deepcopy(model)
    for i, block in enumerate(model.h):
        heads = Heads.of(model, i)
        heads = heads.without_key_bias() if "E1" in subset else heads
        heads = heads.without_value_bias() if "E2" in subset else heads
        write(model, i, heads)
        if "E3" in subset:
            order = torch.randperm(block.mlp.c_fc.n_out, generator=torch.Generator().manual_seed(i))
            block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[:, order])
            block.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[order])
            block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[order])
    return to_dense(model) if "E4" in subset else model


@pytest.mark.parametrize("subset", SUBSETS, ids=lambda subset: "+".join(subset) or "none")
@torch.no_grad()
def test_each_rewrite_and_all_together_leave_the_logits(subset, narrow):
    expected, model = narrow(IDX), rewritten(narrow, subset)
    assert (model.spec == ModelSpec.dense(ARCH)) == ("E4" in subset)
    assert float((model(IDX) - expected).abs().max()) <= 1e-12 * float(expected.abs().max())
    single, own = model.float()(IDX).double(), copy.deepcopy(narrow).float()(IDX).double()
    assert float((single - own).abs().max()) <= 1e-5 * float(expected.abs().max())


@torch.no_grad()
def test_attention_and_mlp_are_the_references(oracle, narrow):
    for i, block in enumerate(narrow.h):
        x = block.ln_1(narrow.embed(IDX))
        theirs = np.stack(
            [oracle.attention(row.numpy(), reference(oracle, Heads.of(narrow, i))) for row in x]
        )
        np.testing.assert_allclose(block.attn(x).numpy(), theirs, atol=1e-12)
        up, down = block.mlp.c_fc, block.mlp.c_proj
        parts = (part.numpy() for part in (up.weight, up.bias, down.weight, down.bias))
        np.testing.assert_allclose(block.mlp(x).numpy(), oracle.mlp(x.numpy(), *parts), atol=1e-12)


@torch.no_grad()
def test_biases_move_as_in_the_references(oracle, narrow):
    for i in range(2):
        heads = Heads.of(narrow, i)
        old = reference(oracle, heads)
        for ours, theirs in (
            (heads.without_key_bias(), oracle.drop_key_bias(old)),
            (heads.without_value_bias(), oracle.fold_value_bias(old)),
            (
                heads.without_key_bias().without_value_bias(),
                oracle.fold_value_bias(oracle.drop_key_bias(old)),
            ),
        ):
            found = reference(oracle, ours)
            for name in ("wq", "bq", "wk", "bk", "wv", "bv", "wo", "bo"):
                np.testing.assert_allclose(getattr(found, name), getattr(theirs, name), atol=1e-13)


@torch.no_grad()
def test_an_export_is_padded_as_in_the_references(oracle, narrow):
    dense = to_dense(narrow)
    for i in range(2):
        packed = oracle.pack_attention(reference(oracle, Heads.of(narrow, i)), ARCH.head_dim)
        attn, mlp, old = dense.h[i].attn, dense.h[i].mlp, narrow.h[i].mlp
        ours = (attn.c_attn.weight, attn.c_attn.bias, attn.c_proj.weight, attn.c_proj.bias)
        for mine, theirs in zip(ours, packed, strict=True):
            np.testing.assert_array_equal(mine.numpy(), theirs)
        parts = (part.numpy() for part in (old.c_fc.weight, old.c_fc.bias, old.c_proj.weight))
        padded = oracle.pad_hidden(*parts, ARCH.n_inner)
        for mine, theirs in zip((mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight), padded, strict=True):
            np.testing.assert_array_equal(mine.numpy(), theirs)
        again = oracle.split_attention(*packed, ARCH.n_head)
        np.testing.assert_array_equal(again.wq, reference(oracle, Heads.of(dense, i)).wq)
        order = np.random.default_rng(i).permutation(ARCH.n_inner)
        x = np.random.default_rng(9).normal(size=(4, 32))
        moved = oracle.permute_hidden(*padded, order)
        bias = mlp.c_proj.bias.numpy()
        np.testing.assert_allclose(oracle.mlp(x, *moved, bias), mlp(torch.from_numpy(x)).numpy(), atol=1e-12)
