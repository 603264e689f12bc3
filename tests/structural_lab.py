"""Structural methods on a toy GPT-2: a recipe for each way to set them up, a teacher, its statistics."""

from collections.abc import Callable

import torch

from model.compress.budget import Budget
from model.compress.contract import CompressedModel, Stats
from model.compress.methods import make_method
from model.compress.recipe import MethodRecipe
from model.compress.structural_recipe import LayerDrop, ModeGPT, ModeGPTJoint, PruneMLP
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=16, vocab_size=61)
IDX = torch.randint(61, (12, 16), generator=torch.Generator().manual_seed(5))
WIDTHS = {"hidden": 40, "head_rank": 10}
RECIPES = {
    "modegpt": ModeGPT(**WIDTHS),
    "modegpt-bias": ModeGPT(**WIDTHS, bias_correction=True, selector="greedy"),
    "modegpt-mixed": ModeGPT(**WIDTHS, vo_cov="mixed"),
    "modegpt-mlp": ModeGPT(targets="mlp", hidden=40),
    "modegpt-one-block": ModeGPT(**WIDTHS, layers=(1,)),
    "joint": ModeGPTJoint(**WIDTHS),
    "joint-plain": ModeGPTJoint(**WIDTHS, bias_correction=False, selector="greedy"),
    "joint-mixed": ModeGPTJoint(**WIDTHS, vo_cov="mixed"),
    "prune": PruneMLP(hidden=40),
    "prune-activation": PruneMLP(hidden=40, score="activation"),
    "layerdrop": LayerDrop(layers=1, select="bi"),
}


def teacher_of(toy: Callable[..., GPT2]) -> GPT2:
    """The model that all recipes compress."""
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


def inputs_of(model: GPT2) -> dict[str, torch.Tensor]:
    """What enters every matrix, (tokens, m), and the stream before and after every block."""
    seen: dict[str, torch.Tensor] = {}
    hooks = []
    for site in model.spec.sites():

        def at(_module, args, _out, name=site.name):
            seen[name] = args[0].flatten(0, 1)

        hooks.append(model.site(site.name).register_forward_hook(at))
    for i, block in enumerate(model.h):

        def around(_module, args, out, i=i):
            seen[f"before/h.{i}"], seen[f"after/h.{i}"] = args[0].flatten(0, 1), out.flatten(0, 1)

        hooks.append(block.register_forward_hook(around))
    with torch.no_grad():
        model(IDX)
    for hook in hooks:
        hook.remove()
    return seen


def measured(teacher: GPT2) -> Stats:
    """Sums over all tokens, the plain way."""
    seen, sums = inputs_of(teacher), {}
    for site in teacher.spec.sites():
        x = seen[site.name].double()
        sums[f"gram/{site.name}"], sums[f"mean/{site.name}"] = x.T @ x, x.sum(0)
    for i, block in enumerate(teacher.h):
        before, after = seen[f"before/h.{i}"], seen[f"after/h.{i}"]
        sums[f"block_influence/h.{i}"] = torch.cosine_similarity(before, after, dim=-1).sum()
        x = seen[f"h.{i}.attn.c_attn"].reshape(*IDX.shape, -1)
        with torch.no_grad():
            q, k, _ = block.attn.heads(x)
        future = torch.ones(16, 16, dtype=torch.bool).triu(1)
        rows = (q @ k.mT * block.attn.scale).masked_fill(future, -torch.inf).softmax(-1)
        mixed = rows @ x.unsqueeze(1)  # (B, H, T, C)
        sums[f"vo_mixed_gram/h.{i}"] = torch.einsum("bhtc,bhtd->hcd", mixed, mixed)
    return Stats(tokens=IDX.numel(), sequences=len(IDX), sums=sums)


def squeeze(recipe: MethodRecipe, model: GPT2, stats: Stats | None) -> CompressedModel:
    """The model under that recipe, within no budget."""
    method = make_method(recipe)
    plan = method.plan(model.spec, Budget(), stats)
    return method.compress(model, plan, stats, seed=0)


def logits(model: GPT2) -> torch.Tensor:
    """Of `IDX`, (B, T, V)."""
    with torch.no_grad():
        return model(IDX)


def errors(result: CompressedModel) -> dict[str, float]:
    """What is reported as lost, by module."""
    return {row.name: row.achieved_error for row in result.report}
