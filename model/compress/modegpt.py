"""MoDeGPT, as published and with a better query/key step: narrower MLPs and heads, fitted on activations.

A matrix in front of a nonlinearity may only lose columns; what follows it is refitted (Nyström). Queries and
keys matter through their product, values through theirs with the output. The statistics are those of the
dense model, so every module is solved on its own; what is small here is small at run time.
"""

# h hidden units, k kept · d residual width · C second moment of the hidden activations (h, h)

import torch
from torch import Tensor

from model.algebra.nystrom import (
    greedy_keep,
    keep_top,
    refit,
    refit_with_bias,
    ridge_leverage,
    selection_loss,
)
from model.algebra.psd import centred
from model.compress.assemble import transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec, Unmeasured
from model.compress.kron_plan import chosen_blocks
from model.compress.layer_drop import write_mlp
from model.compress.modegpt_attention import narrow_attention
from model.compress.structural_recipe import ModeGPT, ModeGPTJoint
from model.compress.structural_report import MLP_ERROR, pair_report
from model.compress.width_plan import plan_widths
from model.config import ModelSpec
from model.gpt2 import GPT2


class ModeGPTMethod:
    """See `ModeGPT` and `ModeGPTJoint` in `model.compress.structural_recipe`."""

    def __init__(self, config: ModeGPT | ModeGPTJoint) -> None:
        self.config, self.name = config, str(config.name)

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Hidden second moments, those of attention inputs where heads narrow, and block influence."""
        is_mlp = self.config.targets == "mlp"
        roles = ("mlp.c_proj",) if is_mlp else ("attn.c_attn", "mlp.c_proj")
        blocks = chosen_blocks(arch, self.config.layers)
        return StatsSpec(
            gram=frozenset(f"h.{i}.{role}" for i in blocks for role in roles),
            vo_mixed_gram="vo_mixed_gram" in self.config.needs,
            block_influence=True,
        )

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Narrower MLPs, and narrower heads without key and value biases."""
        return plan_widths(self.name, arch, self.config, budget, stats)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Closed forms only: the seed changes nothing."""
        if stats is None:
            raise Unmeasured(f"{self.name} needs statistics: {', '.join(self.config.needs)}")
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for i in chosen_blocks(plan.source, self.config.layers):
            if self.config.targets == "all_linear":
                reports += narrow_attention(model, fresh, i, stats, self.config)
            reports += self._narrow_mlp(model, fresh, i, stats)
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _narrow_mlp(
        self, model: GPT2, fresh: GPT2, i: int, stats: Stats
    ) -> tuple[ModuleReport, ModuleReport]:
        """Keep hidden units and refit what follows them; the bias takes the mean over where asked for."""
        up, up_bias = model.site(f"h.{i}.mlp.c_fc").to_dense()
        down, bias = model.site(f"h.{i}.mlp.c_proj").to_dense()
        name = f"h.{i}.mlp.c_proj"
        gram, mean = (stats.mean(f"{each}/{name}").to(down.device) for each in ("gram", "mean"))
        metric = centred(gram, mean) if self.config.bias_correction else gram
        keep = self._select(metric, down, fresh.spec.blocks[i].mlp_hidden)
        layer = fresh.site(name)
        assert layer.bias is not None
        if self.config.bias_correction:
            new, new_bias = refit_with_bias(gram, mean, keep, down, bias)
            layer.bias.copy_(new_bias)
        else:
            new = refit(gram, keep, down)
        write_mlp(fresh, i, up[:, keep], up_bias[keep], new)
        stored = layer.weight_matrix().double()
        lost = mean @ down.double() + bias.double() - mean[keep] @ stored - layer.bias.double()
        rounding = float(lost.square().sum()) if self.config.bias_correction else 0.0
        return pair_report(
            fresh,
            model,
            i,
            predicted=selection_loss(metric, keep, down, new),
            achieved=selection_loss(metric, keep, down, stored) + rounding,
            energy=float((down.double() * (metric @ down.double())).sum()),
            metric=MLP_ERROR,
        )

    def _select(self, metric: Tensor, down: Tensor, count: int) -> Tensor:
        """Indices (k,) of the hidden units that stay, ascending."""
        if self.config.selector == "greedy":
            return greedy_keep(metric, down, count)
        return keep_top(ridge_leverage(metric, ridge_rel=self.config.ridge_rel), count)
