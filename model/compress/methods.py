"""The list of compression methods: name of the recipe to the class that does it. The only such list."""

from collections.abc import Callable, Mapping
from typing import Any

from model.compress.budget import Budget
from model.compress.contract import CompressionMethod, GainMethod, Plan, Stats
from model.compress.controls import DenseMethod, RandomInitMethod
from model.compress.kron_act_perm import KronActPermMethod
from model.compress.kron_perm import KronPermMethod
from model.compress.kron_rivals import KnGPT2Method, TQCompressorMethod
from model.compress.kron_units import KronUnitsMethod
from model.compress.kron_weighted import KronActMethod, KronFisherMethod
from model.compress.kronecker import KronPruneMethod, KronVLMethod
from model.compress.layer_drop import LayerDropMethod, PruneMLPMethod
from model.compress.low_rank import LowRankMethod
from model.compress.modegpt import ModeGPTMethod
from model.compress.recipe import MethodRecipe
from model.gpt2 import GPT2

METHODS: Mapping[str, Callable[[Any], CompressionMethod]] = {
    "kron_vl": KronVLMethod,
    "kron_prune": KronPruneMethod,
    "kron_perm": KronPermMethod,
    "kron_fisher": KronFisherMethod,
    "kron_act": KronActMethod,
    "kron_act_perm": KronActPermMethod,
    "kron_units": KronUnitsMethod,
    "kngpt2": KnGPT2Method,
    "tqcompressor": TQCompressorMethod,
    "svd": LowRankMethod,
    "fwsvd": LowRankMethod,
    "asvd": LowRankMethod,
    "svdllm": LowRankMethod,
    "svdllm_bc": LowRankMethod,
    "kfac_svd": LowRankMethod,
    "modegpt": ModeGPTMethod,
    "modegpt_joint": ModeGPTMethod,
    "prune_mlp": PruneMLPMethod,
    "layerdrop": LayerDropMethod,
    "random_init": lambda recipe: RandomInitMethod(recipe, make_method(recipe.of)),
    "dense": DenseMethod,
}


def make_method(recipe: MethodRecipe) -> CompressionMethod:
    """The method that a recipe names, with its settings inside."""
    return METHODS[recipe.name](recipe)


def make_plan(method: CompressionMethod, model: GPT2, budget: Budget, stats: Stats | None = None) -> Plan:
    """The plan for a model at hand: also where the ranks follow from the weights (`greedy_gain`)."""
    if budget.allocate == "greedy_gain" and isinstance(method, GainMethod):
        return method.plan_by_gain(model.spec, budget, method.gains(model, stats))
    return method.plan(model.spec, budget, stats)
