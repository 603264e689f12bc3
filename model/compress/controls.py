"""Controls: what an initialisation is worth, and what more training of the dense model is worth."""

import copy

import torch

from model.algebra.gauge import apply_gauge, match_norm
from model.compress.assemble import report_module, transplant
from model.compress.budget import Budget
from model.compress.contract import CompressedModel, ModuleReport, Plan, Stats, StatsSpec
from model.compress.kron_plan import KronChoice, plan_kron_mlp
from model.compress.kronecker import kron_layer, set_factors
from model.compress.recipe import Dense, RandomInit
from model.config import ModelSpec
from model.gpt2 import GPT2


class RandomInitMethod:
    """The structure of `kron_vl` with random factors, see `model.compress.recipe.RandomInit`.

    Every replaced matrix keeps the root-mean-square entry of the dense one, exactly; its bias becomes 0.
    Everything else keeps its pretrained weights.
    """

    name = "random_init"
    version = 1

    def __init__(self, config: RandomInit) -> None:
        self.config = config

    def stats(self, arch: ModelSpec) -> StatsSpec:
        """Weights alone."""
        return StatsSpec()

    def plan(self, arch: ModelSpec, budget: Budget, stats: Stats | None = None) -> Plan:
        """Both MLP matrices of the chosen blocks as Kronecker sums."""
        choice = KronChoice(shape=self.config.shape, terms=self.config.terms, layers=self.config.layers)
        return plan_kron_mlp(self.name, arch, choice, budget)

    @torch.no_grad()
    def compress(self, model: GPT2, plan: Plan, stats: Stats | None = None, *, seed: int) -> CompressedModel:
        """Random: another seed is another model."""
        fresh, generator = transplant(model, plan), torch.Generator().manual_seed(seed)
        reports: list[ModuleReport] = []
        for name in plan.changed():
            layer, weight = kron_layer(fresh, name), model.site(name).weight_matrix()
            left, right = (
                torch.randn(factor.shape, generator=generator, dtype=torch.float64)
                for factor in (layer.left, layer.right)
            )
            left, right = apply_gauge(left, right, gauge=self.config.gauge)
            set_factors(layer, *match_norm(left, right, norm=float(weight.double().norm())))
            if layer.bias is not None:
                layer.bias.zero_()
            reports.append(report_module(fresh, name, weight, predicted_error=None))
        return CompressedModel(model=fresh, plan=plan, report=tuple(reports))


class DenseMethod:
    """Nothing is compressed, see `model.compress.recipe.Dense`."""

    name = "dense"
    version = 1

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
