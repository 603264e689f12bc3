"""Controls: what an initialisation is worth, and what more training of the dense model is worth."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model.algebra.gauge import apply_gauge, match_norm
from model.compress.assemble import report_module, source_matrix, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, CompressionMethod, ModuleReport, Plan, Stats, StatsSpec
from model.compress.recipe import Dense, RandomInit
from model.config import ModelError, ModelSpec
from model.gpt2 import GPT2
from model.layers.dense import DenseLinear
from model.layers.embedding import KroneckerEmbedding
from model.layers.kronecker import KroneckerLinear
from model.layers.low_rank import LowRankLinear
from model.layers.structured import StructuredLinear


class RandomInitMethod:
    """The structure of any method with random weights, see `model.compress.recipe.RandomInit`.

    Every replaced matrix keeps the root-mean-square entry of the dense one, exactly; its bias becomes 0.
    Everything else keeps its pretrained weights.
    """

    name = "random_init"

    def __init__(self, config: RandomInit, of: CompressionMethod) -> None:
        self.config, self.of = config, of

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """As the method itself: its structure may follow from what was measured."""
        return self.of.stats(arch)

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """The plan of the method itself."""
        return replace(self.of.plan(arch, budget, stats), method=self.name)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Random: another seed is another model."""
        fresh, generator = transplant(model, plan), torch.Generator().manual_seed(seed)
        reports: list[ModuleReport] = []
        for name in plan.changed():
            layer, (weight, _) = fresh.site(name), source_matrix(model, plan, name)
            layer.init_weights(std=1.0, generator=generator)
            rms = float(weight.double().square().mean().sqrt())
            self._scale(layer, norm=rms * (layer.n_in * layer.n_out) ** 0.5)
            shape_kept = weight.shape == (layer.n_in, layer.n_out)
            if shape_kept:
                reports.append(report_module(fresh, name, weight, predicted_error=None))
        table, weight = fresh.wte, model.wte.table().detach()
        if isinstance(table, KroneckerEmbedding):
            table.init_weights(std=1.0, generator=generator)
            norm = float(weight.double().norm())
            left, right = apply_gauge(table.left, table.right, gauge=self.config.gauge)
            _copy((table.left, table.right), match_norm(left, right, norm=norm))
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))

    def _scale(self, layer: StructuredLinear, *, norm: float) -> None:
        """Give the matrix that a layer stands for a Frobenius norm, its factors in their gauge."""
        match layer:
            case KroneckerLinear():
                left, right = apply_gauge(layer.left, layer.right, gauge=self.config.gauge)
                _copy((layer.left, layer.right), match_norm(left, right, norm=norm))
            case LowRankLinear():
                factors = layer.first.double(), layer.second.double()
                size = (norm / float((factors[0] @ factors[1]).norm())) ** 0.5
                _copy((layer.first, layer.second), (factors[0] * size, factors[1] * size))
            case DenseLinear():
                _copy((layer.weight,), (layer.weight * (norm / layer.weight.norm()),))
            case _:
                raise ModelError(f"{type(layer).__name__} has no random start")


def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


class DenseMethod:
    """Nothing is compressed, see `model.compress.recipe.Dense`."""

    name = "dense"

    def __init__(self, config: Dense) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Nothing."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """The model itself; ModelError under a cap that it does not keep."""
        budget.check(arch, what="dense", hint=lambda: "set budget.params = 0 for this control")
        return Plan(method=self.name, source=arch, spec=arch)

    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """A copy."""
        return CompressedModel(model=copy.deepcopy(model), plan=plan, report=())
