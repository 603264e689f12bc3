"""Kronecker methods: how the factors of the two MLP matrices are chosen. The structure is `kron_plan`'s.

`kron_vl` is the nearest sum in the Frobenius norm (Van Loan & Pitsianis 1993), the method of Krony-PT.
`kron_prune` is Krony-PT's pruning start: a strided choice of rows and columns stands for all of them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from model.algebra.alternate import Convergence
from model.algebra.gauge import best_scales, kron_norm
from model.algebra.kron import nearest_kron
from model.algebra.shapes import KronShape
from model.algebra.strided import pair_offsets, strided_energy, strided_kron
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, Gains, ModuleReport, Plan, Stats, StatsSpec, Unmeasured
from model.compress.kron_plan import (
    DOWN,
    UP,
    KronChoice,
    chosen_blocks,
    chosen_shapes,
    kron_stats,
    plan_kron_mlp,
)
from model.compress.kron_recipe import KronPrune, KronRecipe, KronVL
from model.compress.term_plan import plan_terms, plan_terms_by_gain
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.kronecker import KroneckerLinear


def kron_layer(model: GPT2, name: str) -> KroneckerLinear:
    """The Kronecker layer at a weight matrix of a planned model."""
    layer = model.site(name)
    if not isinstance(layer, KroneckerLinear):
        raise ModelError(
            f"{name} is {layer.matrix.describe()}, not a Kronecker sum; the plan is another method's"
        )
    return layer


def measured(stats: Stats | None, method: str, needs: tuple[str, ...]) -> Stats:
    """The statistics; Unmeasured, naming what is needed, if there are none."""
    if stats is None:
        raise Unmeasured(f"{method} needs statistics: {', '.join(needs)}")
    return stats


@torch.no_grad()
def set_factors(layer: KroneckerLinear, left: Tensor, right: Tensor, scales: Tensor | None = None) -> None:
    """Copy float64 factors (r, m1, n1), (r, m2, n2) and scales (r,) into a layer, in its own precision."""
    layer.left.copy_(left)
    layer.right.copy_(right)
    if layer.scales is not None and scales is not None:
        layer.scales.copy_(scales)


def course(how: Convergence) -> dict[str, float | str]:
    """How a fit came about, for a report: the start that won, its iterations, and how it stopped."""
    history = how.history
    fell = 1.0 - history[-1] / history[-2] if len(history) > 1 and history[-2] > 0 else 0.0
    by_start: dict[str, float | str] = {f"loss_from_{name}": loss for name, loss in how.by_start}
    return {
        "start": how.start,
        "stopped": how.stopped,
        "iterations": float(how.iterations),
        "history_length": float(len(history)),
        "loss_at_start": history[0],
        "last_decrease": fell,
        **by_start,
    }


@torch.no_grad()
def term_gains(model: GPT2, recipe: KronRecipe, values: Callable[[str, Tensor, KronShape], Tensor]) -> Gains:
    """What every further term gains at each matrix, as a share of all that it has.

    `values` are the singular values of a weight (m, n) rearranged to a shape, in the metric of the method.
    Outputs of different matrices have different units, so losses are compared as shares.
    """
    found: dict[str, tuple[float, ...]] = {}
    for i, up in chosen_shapes(model.spec, KronChoice.of(recipe)).items():
        for name, shape in ((f"h.{i}.{UP}", up), (f"h.{i}.{DOWN}", up.transposed())):
            squares = values(name, model.site(name).weight_matrix(), shape).square()
            found[name] = tuple((squares / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)).tolist())
    return found


def _plain_values(_name: str, weight: Tensor, shape: KronShape) -> Tensor:
    return nearest_kron(weight, shape, terms=1).sigma


class KronVLMethod:
    """Van Loan and Pitsianis, see `model.compress.kron_recipe.KronVL`."""

    name = "kron_vl"

    def __init__(self, config: KronVL) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Both MLP matrices of the chosen blocks as Kronecker sums."""
        return plan_terms(self.name, arch, self.config, budget)

    def gains(self, model: GPT2, stats: Stats | None = None) -> Gains:
        """Squared singular values of the rearranged weights by module, as shares of what a module has."""
        return term_gains(model, self.config, _plain_values)

    def plan_by_gain(self, arch: ModelSpec, budget: Budget, gains: Gains) -> Plan:
        """Terms where they gain most."""
        return plan_terms_by_gain(self.name, arch, self.config, budget, gains)

    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Exact and deterministic: the seed changes nothing."""
        fresh = transplant(model, plan)
        reports = tuple(self._fit(model, fresh, name) for name in plan.changed())
        return CompressedModel(model=fresh, plan=plan, report=reports)

    def _fit(self, model: GPT2, fresh: GPT2, name: str) -> ModuleReport:
        """Fill one layer. With scales, the norm is matched by them and the factors stay the projection's."""
        layer, weight = kron_layer(fresh, name), model.site(name).weight_matrix().detach()
        terms, has_scales = layer.left.shape[0], layer.scales is not None
        fit = nearest_kron(
            weight,
            layer.shape,
            terms=terms,
            gauge=self.config.gauge,
            norm="none" if has_scales else self.config.norm,
        )
        predicted, scales = fit.error, None
        if has_scales:
            scales = best_scales(weight, fit.left, fit.right)
            if self.config.norm == "frobenius":
                norm = kron_norm(fit.left, fit.right)
                alpha = fit.energy**0.5 / norm if norm > 0 else 1.0
                scales = torch.full((terms,), alpha, dtype=torch.float64)
                predicted = (
                    fit.tail + (1 - alpha) ** 2 * norm**2
                )  # the fit is a projection: K is orthogonal to W - K
        set_factors(layer, fit.left, fit.right, scales)
        return report_module(fresh, name, weight, predicted_error=predicted, tail=fit.tail)


class KronPruneMethod:
    """Krony-PT's pruning start, see `model.compress.kron_recipe.KronPrune`."""

    name = "kron_prune"

    def __init__(self, config: KronPrune) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone; for `importance` also the mean squares of the inputs."""
        return kron_stats(arch, self.config.needs, self.config.layers)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """One term at both MLP matrices of the chosen blocks; B is exempt from weight decay."""
        choice = KronChoice(
            shape=self.config.shape,
            terms=1,
            layer_shapes=self.config.layer_shapes,
            layers=self.config.layers,
            decay_right=False,
            one_term=True,
        )
        return plan_kron_mlp(self.name, arch, choice, budget)

    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Exact and deterministic: the seed changes nothing."""
        fresh = transplant(model, plan)
        reports: list[ModuleReport] = []
        for i in chosen_blocks(model.spec, self.config.layers):
            names = (f"h.{i}.{UP}", f"h.{i}.{DOWN}")
            weights = tuple(model.site(name).weight_matrix().detach() for name in names)
            layers = tuple(kron_layer(fresh, name) for name in names)
            squares = self._mean_squares(names, stats)
            offsets = self._offsets(weights, layers[0].shape, squares)
            for name, weight, layer, offset in zip(names, weights, layers, offsets, strict=True):
                left, right = strided_kron(weight, layer.shape, offset=offset, eps=self.config.eps_init)
                set_factors(layer, left, right)
                predicted = strided_error(weight, layer.shape, offset=offset, eps=self.config.eps_init)
                row, col = offset
                reports.append(
                    report_module(
                        fresh, name, weight, predicted_error=predicted, offset_row=row, offset_col=col
                    )
                )
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _mean_squares(
        self, names: tuple[str, str], stats: Stats | None
    ) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """E[x^2] of the inputs of the pair, (m,) and (n,), where rows weigh by it."""
        if self.config.offset != "importance":
            return None, None
        gathered = measured(stats, self.name, self.config.needs)
        up, down = (gathered.mean(f"gram/{name}").diagonal() for name in names)
        return up, down

    def _offsets(
        self,
        weights: tuple[Tensor, ...],
        shape: KronShape,
        squares: tuple[Tensor, Tensor] | tuple[None, None],
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """(row, column) to keep in `c_fc` and in `c_proj`; the hidden offset is one number for the pair.

        Otherwise the kept hidden units of one would meet the dropped ones of the other.
        """
        if self.config.offset == "first":
            return (0, 0), (0, 0)
        up = strided_energy(weights[0], shape, row_weights=squares[0])
        down = strided_energy(weights[1], shape.transposed(), row_weights=squares[1])
        return pair_offsets(up, down)


def strided_error(weight: Tensor, shape: KronShape, *, offset: tuple[int, int], eps: float) -> float:
    """||W - A (x) B||^2 of `strided_kron`, from the blocks alone: the energy dropped, if eps is 0."""
    blocks = weight.double().reshape(shape.m1, shape.m2, shape.n1, shape.n2)
    kept = blocks[:, offset[0], :, offset[1]]  # (m1, n1)
    others = torch.ones(shape.m2, shape.n2, dtype=torch.bool)
    others[offset] = False
    rest = blocks.permute(1, 3, 0, 2)[others]  # (m2*n2 - 1, m1, n1)
    return float((rest - eps * kept).square().sum())
