"""The low-rank family: SVD, FWSVD, ASVD, SVD-LLM with and without bias, KFAC-SVD. One solver, six metrics.

Each method is a choice of input metric C and output metric G in tr(G (W-K)^T C (W-K)). `algebra.low_rank`
finds the optimum of all of them, `rank_plan` the ranks; what differs stands in `metric_of`, nowhere else.
"""

# m, n rows and columns of W (in, out) · C (m, m) or (m,) · G (n, n) or (n,)

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from model.algebra.bias import corrected_bias
from model.algebra.low_rank import asvd_metric, low_rank, metric_values
from model.algebra.psd import centred, metric_loss, shrink
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, Gains, ModuleReport, Plan, Stats, StatsSpec, Unmeasured
from model.compress.low_rank_recipe import ASVD, FWSVD, KFACSVD, SVD, SVDLLM, SVDLLMBC, AnyLowRank
from model.compress.rank_plan import plan_low_rank, plan_ranks_by_gain, target_sites
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.low_rank import LowRankLinear


@dataclass(frozen=True)
class Metric:
    """What a method calls an error at one weight matrix."""

    name: str
    """As the report says it."""

    input: Tensor | None = None
    """C, a matrix or a diagonal; None is the identity."""

    output: Tensor | None = None
    """G, likewise."""

    mean: Tensor | None = None
    """Mean input (m,), where the bias takes over the mean of what is lost; C is then centred."""


def metric_of(config: AnyLowRank, stats: Stats, name: str) -> Metric:
    """What a method calls an error at the module `name`: the whole difference between the methods."""
    match config:
        case SVD():
            return Metric("frobenius")
        case ASVD():
            return Metric("mean |x|", input=asvd_metric(stats.mean(f"abs_mean/{name}"), alpha=config.alpha))
        case FWSVD():
            is_two_sided = config.weights == "row_col"
            output = stats.mean(f"col_fisher/{name}") if is_two_sided else None
            label = "row and column Fisher" if is_two_sided else "row Fisher"
            return Metric(label, input=stats.mean(f"row_fisher/{name}"), output=output)
        case SVDLLM() | SVDLLMBC():
            gram, mean = _inputs(stats, name, is_centred=isinstance(config, SVDLLMBC))
            return Metric("output error", input=gram, mean=mean)
        case KFACSVD():
            gram, mean = _inputs(stats, name, is_centred=config.bias_correction)
            output = shrink(stats.mean(f"delta_gram/{name}"), config.shrink_output)
            return Metric("K-FAC", input=shrink(gram, config.shrink_input), output=output, mean=mean)


def _inputs(stats: Stats, name: str, *, is_centred: bool) -> tuple[Tensor, Tensor | None]:
    """Second moment of a module's input; or its covariance and its mean."""
    gram = stats.mean(f"gram/{name}")
    if not is_centred:
        return gram, None
    mean = stats.mean(f"mean/{name}")
    return centred(gram, mean), mean


class LowRankMethod:
    """Every method of the family, see the recipes `SVD` to `KFACSVD` in `model.compress.recipe`."""

    def __init__(self, config: AnyLowRank) -> None:
        self.config, self.name = config, str(config.name)

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """What the metric is made of, at the matrices to be replaced."""
        sites = frozenset(site.name for site in target_sites(arch, self.config))
        wanted: dict[str, Any] = dict.fromkeys(self.config.needs, sites)
        return StatsSpec(**wanted)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Two thin factors at each target; the ranks follow from the budget alone, unless spread by gain."""
        return plan_low_rank(self.name, arch, self.config, budget)

    def gains(self, model: GPT2, stats: Stats | None = None) -> Gains:
        """Squared singular values of C^1/2 W G^1/2 by module.

        Without an output metric the errors of two modules have different units, and each is then taken as a
        share of all that its module has.
        """
        found: dict[str, tuple[float, ...]] = {}
        for site in target_sites(model.spec, self.config):
            metric, weight = self._metric(stats, site.name), model.site(site.name).weight_matrix().detach()
            values = metric_values(weight, input_metric=metric.input, output_metric=metric.output).square()
            total = float(values.sum())
            scale = total if metric.output is None and total > 0 else 1.0
            found[site.name] = tuple((values / scale).tolist())
        return found

    def plan_by_gain(self, arch: ModelSpec, budget: Budget, gains: Gains) -> Plan:
        """Ranks where they gain most."""
        return plan_ranks_by_gain(self.name, arch, self.config, budget, gains)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Exact and deterministic: the seed changes nothing."""
        fresh = transplant(model, plan)
        reports = tuple(self._fit(model, fresh, name, stats) for name in plan.changed())
        return CompressedModel(model=fresh, plan=plan, report=reports)

    def _metric(self, stats: Stats | None, name: str) -> Metric:
        if self.config.needs and stats is None:
            raise Unmeasured(f"{self.name} needs statistics: {', '.join(self.config.needs)}")
        return metric_of(self.config, stats or NO_STATS, name)

    def _fit(self, model: GPT2, fresh: GPT2, name: str, stats: Stats | None) -> ModuleReport:
        """Fill one layer, and correct its bias where the metric is centred."""
        metric = self._metric(stats, name)
        layer, weight = fresh.site(name), model.site(name).weight_matrix().detach().double()
        if not isinstance(layer, LowRankLinear):
            raise ModelError(
                f"{name} is {layer.matrix.describe()}, not low rank; the plan is another method's"
            )
        rank = layer.first.shape[1]
        try:
            fit = low_rank(weight, rank=rank, input_metric=metric.input, output_metric=metric.output)
        except ModelError as err:
            raise ModelError(f"{self.name}: {name}: {err}") from err
        layer.first.copy_(fit.first)
        layer.second.copy_(fit.second)
        return report_module(
            fresh,
            name,
            weight,
            predicted_error=fit.loss,
            metric=metric.name,
            input_metric=metric.input,
            output_metric=metric.output,
            bias_error=self._correct_bias(layer, weight, metric),
            sigma_first=float(fit.sigma[0]),
            sigma_kept=float(fit.sigma[rank - 1]),
        )

    def _correct_bias(self, layer: LowRankLinear, weight: Tensor, metric: Metric) -> float:
        """Give the mean of what is lost back; returns the error that rounding leaves of it in the metric."""
        if metric.mean is None:
            return 0.0
        if layer.bias is None or layer.n_bias < layer.n_out:
            raise ModelError(f"{self.name} corrects biases, and an output of this model has none")
        lost = weight - layer.weight_matrix().double()
        best = corrected_bias(layer.bias, mean=metric.mean, difference=lost)
        layer.bias.copy_(best)
        left = best - layer.bias.double()
        return metric_loss(left[None, :], output_metric=metric.output)


NO_STATS = Stats(tokens=1, sequences=1, sums={})
"""What a method that needs nothing is given."""
