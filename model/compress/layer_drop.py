"""Baselines that only leave things out: whole blocks, or hidden units without a refit.

Nothing that stays is changed, so what these models lose is what structure alone costs.
"""

# m residual width · h hidden units, k kept · C second moment of the hidden activations (h, h)

from dataclasses import replace

import torch
from torch import Tensor

from model.algebra.allocation import even_layers
from model.algebra.nystrom import keep_top, selection_loss
from model.compress.assemble import source_matrix, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec, Unmeasured
from model.compress.kron_plan import chosen_blocks
from model.compress.structural_recipe import LayerDrop, PruneMLP
from model.compress.structural_report import MLP_ERROR, pair_report
from model.compress.width_plan import block_scores, plan_widths
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.dense import DenseLinear


class LayerDropMethod:
    """Fewer blocks, unchanged, see `model.compress.structural_recipe.LayerDrop`."""

    name = "layerdrop"

    def __init__(self, config: LayerDrop) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Block influence where blocks are chosen by it."""
        return StatsSpec(block_influence=self.config.select == "bi")

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """The kept blocks. A whole block is the smallest step, so only the cap counts, not its tolerance."""
        budget.require_uniform(self.name)
        keep = self.config.layers or self._most(arch, budget)
        result = self._without(arch, self._chosen(arch, keep, stats))
        notes: tuple[str, ...] = (f"keeps blocks {', '.join(str(block.source) for block in result.blocks)}",)
        if budget.is_set:
            size = budget.size(result)
            more = result if keep == len(arch.blocks) else self._without(arch, tuple(range(keep + 1)))
            is_most = budget.holds(size) and not budget.holds(budget.size(more))
            if not (is_most or budget.fits(size)):
                budget.check(result, what=f"layerdrop, {keep} blocks", hint=lambda: self._hint(arch, budget))
            notes += (f"{budget.gap(size)}: a block is the smallest step",)
        return Plan(method=self.name, source=arch, spec=result, notes=notes)

    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Copies: the seed changes nothing."""
        return CompressedModel(model=transplant(model, plan), plan=plan, report=())

    def _chosen(self, arch: ModelSpec, keep: int, stats: Stats | None) -> tuple[int, ...]:
        """Indices of the blocks that stay, ascending."""
        if self.config.select == "even":
            return even_layers(keep, len(arch.blocks))
        if not 1 <= keep <= len(arch.blocks):
            raise ModelError(f"layerdrop: cannot keep {keep} of {len(arch.blocks)} blocks")
        scores = block_scores(arch, stats, self.name)
        return tuple(sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep]))

    def _without(self, arch: ModelSpec, kept: tuple[int, ...]) -> ModelSpec:
        return replace(arch, blocks=tuple(arch.blocks[i] for i in kept))

    def _most(self, arch: ModelSpec, budget: Budget) -> int:
        if not budget.is_set:
            raise ModelError("layerdrop: layers = 0 takes as many as the budget allows; set budget.params")
        least = 2 if self.config.select == "even" else 1
        counts = range(least, len(arch.blocks) + 1)
        fitting = [n for n in counts if budget.holds(budget.size(self._without(arch, tuple(range(n)))))]
        return fitting[-1] if fitting else least

    def _hint(self, arch: ModelSpec, budget: Budget) -> str:
        most = self._most(arch, budget)
        count = self._without(arch, tuple(range(most))).num_parameters(budget.convention)
        return f"layers = {most} has {count:,}"


class PruneMLPMethod:
    """Fewer hidden units, no refit, see `model.compress.structural_recipe.PruneMLP`."""

    name = "prune_mlp"

    def __init__(self, config: PruneMLP) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Hidden second moments for `activation`."""
        if self.config.score == "magnitude":
            return StatsSpec()
        names = (f"h.{i}.mlp.c_proj" for i in chosen_blocks(arch, self.config.layers))
        return StatsSpec(gram=frozenset(names), block_influence=True)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Narrower MLPs."""
        return plan_widths(self.name, arch, self.config, budget, stats)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic: the seed changes nothing."""
        if self.config.needs and stats is None:
            raise Unmeasured(f"prune_mlp needs statistics: {', '.join(self.config.needs)}")
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for i in chosen_blocks(plan.source, self.config.layers):
            reports += self._prune(model, fresh, plan, i, stats)
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _prune(
        self, model: GPT2, fresh: GPT2, plan: Plan, i: int, stats: Stats | None
    ) -> tuple[ModuleReport, ModuleReport]:
        (up, bias), (down, _) = (
            source_matrix(model, plan, f"h.{i}.mlp.{name}") for name in ("c_fc", "c_proj")
        )
        assert bias is not None
        scores = up.double().norm(dim=0) * down.double().norm(dim=1)
        metric = "frobenius of mlp.c_proj"
        gram = torch.eye(len(down), dtype=torch.float64, device=down.device)
        if self.config.score == "activation":
            assert stats is not None
            gram, metric = stats.mean(f"gram/h.{i}.mlp.c_proj").to(down.device), MLP_ERROR
            scores = gram.diagonal() * down.double().square().sum(dim=1)
        keep = keep_top(scores, plan.spec.blocks[i].mlp_hidden)
        write_mlp(fresh, i, up[:, keep], bias[keep], down[keep])
        kept = fresh.site(f"h.{i}.mlp.c_proj").weight_matrix()
        energy = float((down.double() * (gram @ down.double())).sum())
        errors = [selection_loss(gram, keep, down, each) for each in (down[keep], kept)]
        return pair_report(
            fresh, model, i, predicted=errors[0], achieved=errors[1], energy=energy, metric=metric
        )


def write_mlp(fresh: GPT2, i: int, up: Tensor, up_bias: Tensor, down: Tensor) -> None:
    """Fill the two matrices of a narrower MLP and the bias between them."""
    first, second = (fresh.site(f"h.{i}.mlp.{name}") for name in ("c_fc", "c_proj"))
    assert isinstance(first, DenseLinear)
    assert isinstance(second, DenseLinear)
    assert first.bias is not None
    first.weight.copy_(up)
    first.bias.copy_(up_bias)
    second.weight.copy_(down)
