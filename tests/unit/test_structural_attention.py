"""Narrower heads: rewrites that lose nothing, and queries, keys and values that lose what is predicted."""

import itertools
from dataclasses import replace

import pytest
import torch
from structural_lab import IDX, RECIPES, WIDTHS, errors, inputs_of, logits, measured, squeeze, teacher_of

from model.algebra.psd import centred
from model.compress.modegpt_attention import Heads
from model.compress.structural_recipe import ModeGPT, ModeGPTJoint
from model.gpt2 import GPT2


@pytest.fixture(scope="module")
def teacher(toy):
    return teacher_of(toy)


@pytest.fixture(scope="module")
def stats(teacher):
    return measured(teacher)


# --- exact rewrites -----------------------------------------------------------------------------------------


def rewritten(teacher: GPT2, change) -> GPT2:
    """A copy of the teacher with the attention of every block rewritten by `change(Heads)`."""
    model = GPT2(teacher.spec).double()
    model.load_state_dict(teacher.state_dict())
    for i in range(len(model.h)):
        heads = change(Heads.of(model, i))
        packed, output = model.site(f"h.{i}.attn.c_attn"), model.site(f"h.{i}.attn.c_proj")
        parts = (heads.query, heads.key, heads.value)
        biases = (heads.query_bias, heads.key_bias, heads.value_bias)
        with torch.no_grad():
            packed.weight.copy_(torch.cat([part.transpose(0, 1).flatten(1) for part in parts], dim=1))
            packed.bias.copy_(torch.cat([part.flatten() for part in biases]))
            output.weight.copy_(heads.output.flatten(0, 1))
            output.bias.copy_(heads.output_bias)
    return model.eval()


def permuted(model: GPT2) -> GPT2:
    """E3 in place: hidden units in another order."""
    for i, block in enumerate(model.h):
        order = torch.randperm(128, generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            block.mlp.c_fc.weight.copy_(block.mlp.c_fc.weight[:, order])
            block.mlp.c_fc.bias.copy_(block.mlp.c_fc.bias[order])
            block.mlp.c_proj.weight.copy_(block.mlp.c_proj.weight[order])
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda heads: heads,
        Heads.without_key_bias,
        Heads.without_value_bias,
        lambda heads: heads.without_key_bias().without_value_bias(),
    ],
    ids=["none", "E1", "E2", "both"],
)
@pytest.mark.parametrize("order", [False, True], ids=["", "E3"])
def test_rewrites_leave_the_logits(change, order, teacher) -> None:
    model = rewritten(teacher, change)
    model = permuted(model) if order else model
    assert torch.allclose(logits(model), logits(teacher), rtol=1e-12, atol=1e-12)
    single = model.float()
    assert torch.allclose(logits(single).double(), logits(teacher), rtol=1e-4, atol=1e-4)


def test_a_value_bias_is_worth_something_and_is_carried(teacher) -> None:
    dropped = rewritten(teacher, lambda heads: replace(heads, value_bias=0 * heads.value_bias))
    assert (logits(dropped) - logits(teacher)).abs().max() > 1e-3


# --- attention ----------------------------------------------------------------------------------------------


def centred_logits(heads: Heads, x: torch.Tensor) -> torch.Tensor:
    """All pairs of queries and centred keys, (H, N, N)."""
    q = x @ heads.query + heads.query_bias.unsqueeze(1)
    k = (x - x.mean(0)) @ heads.key
    return q @ k.mT


@pytest.mark.parametrize("name", ["modegpt", "joint", "joint-mixed"])
def test_the_logit_error_is_the_one_over_all_pairs_of_tokens(name, teacher, stats) -> None:
    result = squeeze(RECIPES[name], teacher, stats)
    x = inputs_of(teacher)["h.1.attn.c_attn"]
    old, new = (centred_logits(Heads.of(model, 1), x) for model in (teacher, result.model))
    measured = (old - new).square().mean(dim=(1, 2)).sum()
    assert float(measured) == pytest.approx(errors(result)["h.1.attn.c_attn"], rel=1e-6)


def test_the_joint_pair_is_never_worse_than_any_selection_and_falls_with_rank(teacher, stats) -> None:
    def total(recipe) -> float:
        return sum(e for name, e in errors(squeeze(recipe, teacher, stats)).items() if "c_attn" in name)

    joint = [total(ModeGPTJoint(hidden=128, head_rank=r)) for r in (2, 6, 10, 15)]
    assert all(more < less for less, more in itertools.pairwise(joint))
    for r, best in zip((2, 6, 10, 15), joint, strict=True):
        assert best <= total(ModeGPT(hidden=128, head_rank=r))


def test_columns_are_chosen_by_both_norms_and_left_as_they_are(teacher, stats) -> None:
    model = squeeze(RECIPES["modegpt"], teacher, stats).model
    x = inputs_of(teacher)["h.0.attn.c_attn"]
    old, new = Heads.of(teacher, 0), Heads.of(model, 0)
    for h in range(2):
        q, k = x @ old.query[h] + old.query_bias[h], x @ old.key[h] + old.key_bias[h]
        keep = (q.square().mean(0) * k.square().mean(0)).topk(10).indices.sort().values
        assert torch.equal(new.query[h], old.query[h][:, keep])
        assert torch.equal(new.key[h], old.key[h][:, keep])
        assert torch.equal(new.query_bias[h], old.query_bias[h][keep])


@pytest.mark.parametrize("vo_cov", ["input", "mixed"])
def test_values_lose_what_is_predicted_on_the_tokens(vo_cov, teacher, stats) -> None:
    result = squeeze(ModeGPT(**WIDTHS, vo_cov=vo_cov), teacher, stats)
    x = inputs_of(teacher)["h.0.attn.c_attn"]
    old, new = Heads.of(teacher, 0), Heads.of(result.model, 0)
    lost = old.value @ old.output - new.value @ new.output  # (H, d, d)
    seen = x.expand(2, -1, -1)
    if vo_cov == "mixed":
        batches = x.reshape(*IDX.shape, -1)
        with torch.no_grad():
            q, k, _ = teacher.h[0].attn.heads(batches)
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        rows = (q @ k.mT * teacher.h[0].attn.scale).masked_fill(future, -torch.inf).softmax(-1)
        seen = (rows @ batches.unsqueeze(1)).transpose(0, 1).flatten(1, 2)
    measured = (seen @ lost).square().sum(-1).mean(-1).sum()
    assert float(measured) == pytest.approx(errors(result)["h.0.attn.c_proj"], rel=1e-6)


def test_the_output_bias_carries_the_value_biases_and_the_mean(teacher, stats) -> None:
    result = squeeze(RECIPES["joint"], teacher, stats)
    old, new = Heads.of(teacher, 0), Heads.of(result.model, 0)
    mean = stats.mean("mean/h.0.attn.c_attn")

    def constant(heads: Heads) -> torch.Tensor:
        return (
            torch.einsum("hs,hsd->d", mean @ heads.value + heads.value_bias, heads.output) + heads.output_bias
        )

    assert torch.allclose(constant(old), constant(new), rtol=1e-9, atol=1e-12)
    metric = centred(stats.mean("gram/h.0.attn.c_attn"), mean)
    lost = old.value @ old.output - new.value @ new.output
    left = torch.einsum("hcd,ce,hed->", lost, metric, lost)
    assert float(left) == pytest.approx(errors(result)["h.0.attn.c_proj"], rel=1e-6)
