"""`kron_act_perm`: activation-weighted products in an order of the hidden units that is chosen with them.

The order of the hidden units is free: it folds into both matrices and the bias. Which units share a factor is
then part of the fit, judged by what the two matrices lose at their outputs. No other method of the family
uses that freedom with a metric, and it costs neither a parameter nor a gather.
"""

import torch

from model.algebra.activation_permute import permuted_activation_kron_pair
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_plan import DOWN, UP, KronChoice, chosen_blocks, kron_stats, plan_kron_mlp
from model.compress.kron_recipe import KronActPerm
from model.compress.kron_weighted import correct_bias, input_metric, solver_of, top_share
from model.compress.kronecker import course, kron_layer, measured, set_factors
from model.config import ModelSpec
from model.gpt2 import GPT2


class KronActPermMethod:
    """Order and weighted fit together, see `model.compress.kron_recipe.KronActPerm`."""

    name = "kron_act_perm"

    def __init__(self, config: KronActPerm) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Second moments and means of the inputs of the matrices to be replaced."""
        return kron_stats(arch, self.config.needs, self.config.layers)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """As `kron_vl`: the order needs no buffer."""
        return plan_kron_mlp(self.name, arch, KronChoice.of(self.config), budget)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic: the seed changes nothing."""
        gathered = measured(stats, self.name, self.config.needs)
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for i in chosen_blocks(model.spec, self.config.layers):
            reports += self._fit(model, fresh, i, gathered)
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _fit(self, model: GPT2, fresh: GPT2, block: int, stats: Stats) -> tuple[ModuleReport, ModuleReport]:
        names = f"h.{block}.{UP}", f"h.{block}.{DOWN}"
        weights = model.site(names[0]).weight_matrix(), model.site(names[1]).weight_matrix()
        metrics = [input_metric(stats, name, self.config) for name in names]
        up, down = (kron_layer(fresh, name) for name in names)
        pair = permuted_activation_kron_pair(
            *weights,
            metrics[0][0],
            metrics[1][0],
            up.shape,
            terms=up.left.shape[0],
            starts=self.config.orders,
            max_sweeps=self.config.max_sweeps,
            refit_iter=self.config.refit_iter,
            solver=solver_of(self.config),
            gauge=self.config.gauge,
        )
        hidden = pair.hidden
        set_factors(up, pair.up.left, pair.up.right)
        set_factors(down, pair.down.left, pair.down.right)
        assert up.bias is not None
        up.bias.copy_(up.bias[hidden])
        reports = [
            report_module(
                fresh,
                name,
                weight,
                predicted_error=fit.loss,
                metric="output error",
                input_metric=metric,
                bias_error=correct_bias(layer, weight, mean),
                top_share=top_share(metric),
                pair_loss=pair.loss,
                **course(pair.convergence),
            )
            for name, layer, weight, fit, metric, mean in (
                (names[0], up, weights[0][:, hidden], pair.up, metrics[0][0], metrics[0][1]),
                (names[1], down, weights[1][hidden], pair.down, *_reordered(*metrics[1], hidden)),
            )
        ]
        return reports[0], reports[1]


def _reordered(
    metric: torch.Tensor, mean: torch.Tensor | None, order: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A metric and a mean of the hidden units in another order."""
    return metric[order][:, order], None if mean is None else mean[order]
