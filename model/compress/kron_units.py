"""`kron_units`: the best hidden units as a Kronecker product, which holds a narrow MLP exactly and more.

A product (in x k)(1 x n2) computes k features and gives each to n2 hidden units, scaled by B. With B = (1, …)
and the down factor B' = (1, 0, …) it *is* an MLP of k units, for 2 n2 numbers more: whatever a method for
narrower MLPs finds is a start inside the Kronecker family. So the units are MoDeGPT's, chosen in view of the
output and refitted (Nyström), and the others of each group are further GELUs of the same feature, with other
scales: silent at first, a learned mixture of nonlinearities after training. No search over orders is needed.
"""

# h hidden units, k kept · n2 = h / k units per feature · d residual width

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
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_plan import DOWN, UP, KronChoice, chosen_blocks, chosen_shapes, plan_kron_mlp
from model.compress.kron_recipe import KronUnits
from model.compress.kronecker import kron_layer, measured, set_factors
from model.compress.structural_report import MLP_ERROR, narrow_report
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2


def mixture_scales(count: int) -> Tensor:
    """Scales (count,) of the GELUs of one feature: 1, -1, then 2, -2, 1/2, -1/2, 4 and so on.

    gelu(z) - gelu(-z) = z: with the second a feature can pass unbent; sharper and softer ones follow.
    """
    sizes = [1.0]
    while 2 * len(sizes) < count:
        power = (len(sizes) + 1) // 2
        sizes.append(2.0**power if len(sizes) % 2 else 2.0**-power)
    signed = [sign * size for size in sizes for sign in (1.0, -1.0)]
    return torch.tensor(signed[:count], dtype=torch.float64)


class KronUnitsMethod:
    """See `model.compress.kron_recipe.KronUnits`."""

    name = "kron_units"

    def __init__(self, config: KronUnits) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Second moments and means of the hidden units."""
        blocks = chosen_blocks(arch, self.config.layers)
        return StatsSpec(gram=frozenset(f"h.{i}.{DOWN}" for i in blocks))

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Both MLP matrices of the chosen blocks; ModelError where the first factor splits the input."""
        choice = KronChoice(
            shape=self.config.shape,
            layer_shapes=self.config.layer_shapes,
            terms=1,
            layers=self.config.layers,
            decay_right=False,
            one_term=True,
        )
        for shape in chosen_shapes(arch, choice).values():
            if shape.m2 > 1:
                raise ModelError(
                    f"{self.name}: shape = [{shape.m1}, {shape.n1}] splits the input; the first factor must "
                    f"have all {shape.rows} input rows: [{shape.rows}, k], k a divisor of {shape.cols}"
                )
        return plan_kron_mlp(self.name, arch, choice, budget)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Closed forms only: the seed changes nothing."""
        stats = measured(stats, self.name, self.config.needs)
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for i in chosen_blocks(plan.source, self.config.layers):
            reports += self._fill(model, fresh, i, stats)
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _fill(self, model: GPT2, fresh: GPT2, i: int, stats: Stats) -> tuple[ModuleReport, ModuleReport]:
        up, up_bias = model.site(f"h.{i}.{UP}").to_dense()
        down, bias = model.site(f"h.{i}.{DOWN}").to_dense()
        gram, mean = (stats.mean(f"{each}/h.{i}.{DOWN}").to(down.device) for each in ("gram", "mean"))
        first, second = kron_layer(fresh, f"h.{i}.{UP}"), kron_layer(fresh, f"h.{i}.{DOWN}")
        assert first.bias is not None
        assert second.bias is not None
        metric = centred(gram, mean) if self.config.bias_correction else gram
        keep = self._select(metric, down, first.shape.n1)
        scales = mixture_scales(first.shape.n2).to(up.device)
        set_factors(first, up[:, keep].double()[None], scales[None, None])
        # hidden unit a n2 + b is unit b of feature a
        first.bias.copy_((up_bias[keep].double()[:, None] * scales).flatten())
        if self.config.bias_correction:
            new, new_bias = refit_with_bias(gram, mean, keep, down, bias)
            second.bias.copy_(new_bias)
        else:
            new = refit(gram, keep, down)
        silent = torch.zeros(len(scales), dtype=torch.float64, device=up.device)
        silent[0] = 1.0
        set_factors(second, new[None], silent[None, :, None])
        stored = second.left[0].double()
        lost = mean @ down.double() + bias.double() - mean[keep] @ stored - second.bias.double()
        rounding = float(lost.square().sum()) if self.config.bias_correction else 0.0
        return tuple(  # type: ignore[return-value]
            narrow_report(
                fresh,
                model,
                f"h.{i}.{role}",
                structure=fresh.site(f"h.{i}.{role}").matrix.describe(),
                predicted=selection_loss(metric, keep, down, new),
                achieved=selection_loss(metric, keep, down, stored) + rounding,
                energy=float((down.double() * (metric @ down.double())).sum()),
                metric=MLP_ERROR,
            )
            for role in (UP, DOWN)
        )

    def _select(self, metric: Tensor, down: Tensor, count: int) -> Tensor:
        """Indices (k,) of the hidden units that stay, ascending."""
        if self.config.selector == "greedy":
            return greedy_keep(metric, down, count)
        return keep_top(ridge_leverage(metric), count)
