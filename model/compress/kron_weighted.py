"""Kronecker sums that weigh errors by what they cost: `kron_fisher` entry by entry, `kron_act` at the output.

Both minimise a loss that the Frobenius norm only stands for, in closed form where the weights allow it and by
alternating least squares from several starts otherwise. Every report says which start won, how many
iterations it took and by how much the last one still fell.
"""

import torch
from torch import Tensor

from model.algebra.activation import activation_kron, nearest_kron_psd, separable_metric_values
from model.algebra.alternate import Solver
from model.algebra.bias import corrected_bias
from model.algebra.psd import centred
from model.algebra.shapes import KronShape
from model.algebra.weighted import weighted_kron
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, Gains, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_plan import KronChoice, kron_stats, plan_kron_mlp
from model.compress.kron_recipe import Alternating, KronAct, KronActPerm, KronFisher
from model.compress.kronecker import course, kron_layer, measured, set_factors, term_gains
from model.compress.term_plan import plan_terms, plan_terms_by_gain
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.kronecker import KroneckerLinear


class KronFisherMethod:
    """Entries weigh by their Fisher information, see `model.compress.kron_recipe.KronFisher`."""

    name = "kron_fisher"

    def __init__(self, config: KronFisher) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Squared gradients of every entry of the matrices to be replaced."""
        return kron_stats(arch, self.config.needs, self.config.layers)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """As `kron_vl`."""
        return plan_kron_mlp(self.name, arch, KronChoice.of(self.config), budget)

    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic: the seed changes nothing. Biases stay, there is no mean to correct them with."""
        gathered = measured(stats, self.name, self.config.needs)
        fresh = transplant(model, plan)
        reports = tuple(self._fit(model, fresh, name, gathered) for name in plan.changed())
        return CompressedModel(model=fresh, plan=plan, report=reports)

    def _fit(self, model: GPT2, fresh: GPT2, name: str, stats: Stats) -> ModuleReport:
        layer, weight = kron_layer(fresh, name), model.site(name).weight_matrix().detach()
        fisher = stats.mean(f"full_fisher/{name}")
        fit = weighted_kron(
            weight,
            fisher,
            layer.shape,
            terms=layer.left.shape[0],
            method=self.config.solver,
            starts=self.config.starts,
            solver=solver_of(self.config),
            gauge=self.config.gauge,
        )
        set_factors(layer, fit.left, fit.right)
        return report_module(
            fresh,
            name,
            weight,
            predicted_error=fit.loss,
            metric="Fisher",
            entry_weights=fisher,
            largest_share=float(fisher.max() / fisher.sum()) if float(fisher.sum()) > 0 else 0.0,
            **course(fit.convergence),
        )


class KronActMethod:
    """The least output error of each matrix, see `model.compress.kron_recipe.KronAct`."""

    name = "kron_act"

    def __init__(self, config: KronAct) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Second moments and means of the inputs of the matrices to be replaced."""
        return kron_stats(arch, self.config.needs, self.config.layers)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """As `kron_vl`."""
        return plan_terms(self.name, arch, self.config, budget)

    def gains(self, model: GPT2, stats: Stats | None = None) -> Gains:
        """As `kron_vl`, in the product nearest to the metric; with one row in a factor that is the metric."""
        gathered = measured(stats, self.name, self.config.needs)

        def values(name: str, weight: Tensor, shape: KronShape) -> Tensor:
            metric, _ = input_metric(gathered, name, self.config)
            return separable_metric_values(weight, *nearest_kron_psd(metric, shape.m1, shape.m2), shape)

        return term_gains(model, self.config, values)

    def plan_by_gain(self, arch: ModelSpec, budget: Budget, gains: Gains) -> Plan:
        """Terms where they gain most."""
        return plan_terms_by_gain(self.name, arch, self.config, budget, gains)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Deterministic: the seed changes nothing."""
        gathered = measured(stats, self.name, self.config.needs)
        fresh = transplant(model, plan)
        reports = tuple(self._fit(model, fresh, name, gathered) for name in plan.changed())
        return CompressedModel(model=fresh, plan=plan, report=reports)

    def _fit(self, model: GPT2, fresh: GPT2, name: str, stats: Stats) -> ModuleReport:
        layer, weight = kron_layer(fresh, name), model.site(name).weight_matrix().detach()
        metric, mean = input_metric(stats, name, self.config)
        fit = activation_kron(
            weight,
            metric,
            layer.shape,
            terms=layer.left.shape[0],
            starts=self.config.starts,
            solver=solver_of(self.config),
            gauge=self.config.gauge,
        )
        set_factors(layer, fit.left, fit.right)
        return report_module(
            fresh,
            name,
            weight,
            predicted_error=fit.loss,
            metric="output error",
            input_metric=metric,
            bias_error=correct_bias(layer, weight, mean),
            top_share=top_share(metric),
            **course(fit.convergence),
        )


def input_metric(stats: Stats, name: str, config: KronAct | KronActPerm) -> tuple[Tensor, Tensor | None]:
    """C (m, m) of a module's input; and its mean (m,) where the bias gives back the mean of what is lost."""
    gram = stats.mean(f"gram/{name}")
    if not config.bias_correction:
        return gram, None
    mean = stats.mean(f"mean/{name}")
    return centred(gram, mean), mean


@torch.no_grad()
def correct_bias(layer: KroneckerLinear, weight: Tensor, mean: Tensor | None) -> float:
    """b' = b + mu (W - K), W (m, n) in the order of the layer; returns what rounding leaves of the error."""
    if mean is None:
        return 0.0
    if layer.bias is None or layer.n_bias < layer.n_out:
        raise ModelError("bias_correction needs a bias at every output, and one of this model has none")
    best = corrected_bias(layer.bias, mean=mean, difference=weight.double() - layer.weight_matrix().double())
    layer.bias.copy_(best)
    return float((best - layer.bias.double()).square().sum())


def solver_of(config: Alternating) -> Solver:
    """The settings of a recipe as the algebra takes them; ModelError for impossible ones."""
    return Solver(max_iter=config.max_iter, rtol=config.rtol, ridge_rel=config.ridge_rel)


def top_share(metric: Tensor) -> float:
    """Share of the trace that the largest coordinate holds: near 1, one feature owns the objective."""
    trace = float(metric.trace())
    return float(metric.diagonal().max()) / trace if trace > 0 else 0.0
