"""The Kronecker family on a toy GPT-2: a recipe for each way to set it up, a teacher, its statistics."""

from collections.abc import Callable

import torch

from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import CompressedModel, ModuleReport, Stats, StatsSpec
from model.compress.kron_recipe import (
    KnGPT2,
    KronAct,
    KronActPerm,
    KronFisher,
    KronPerm,
    KronPrune,
    KronUnits,
    KronVL,
    TQCompressor,
)
from model.compress.methods import make_method
from model.compress.recipe import MethodRecipe
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_ctx=24, vocab_size=61)
ROWS = torch.randint(61, (12, 24), generator=torch.Generator().manual_seed(7))
RECIPES = {
    "vl-shapes": KronVL(layer_shapes=((16, 16), (8, 32)), terms=2),
    "prune-importance": KronPrune(shape=(8, 32), offset="importance"),
    "perm": KronPerm(shape=(8, 32), terms=2),
    "perm-separate": KronPerm(shape=(8, 16), hidden="separate", random_starts=1),
    "perm-separate-inner": KronPerm(shape=(8, 16), hidden="separate", outer=False, random_starts=0),
    "perm-inner": KronPerm(shape=(16, 16), outer=False, random_starts=1),
    "fisher": KronFisher(shape=(8, 32), terms=2),
    "fisher-em": KronFisher(shape=(8, 32), solver="em", layers=(1,)),
    "fisher-separable": KronFisher(shape=(8, 32), solver="separable"),
    "act": KronAct(shape=(8, 32), terms=2),
    "act-plain": KronAct(shape=(8, 32), bias_correction=False),
    "act-closed": KronAct(shape=(16, 16), scales=True),
    "act-perm": KronActPerm(shape=(16, 16)),
    "act-perm-square": KronActPerm(shape=(8, 32), max_sweeps=3, bias_correction=False),
    "units": KronUnits(shape=(16, 32)),
    "kngpt2": KnGPT2(),
    "kngpt2-tied": KnGPT2(head="tied", layers=(0, 1)),
    "tq": TQCompressor(random_starts=1),
    "tq-tied": TQCompressor(head="tied", hidden="separate", random_starts=0, layers=(0,)),
}


def teacher_of(toy: Callable[..., GPT2]) -> GPT2:
    """The model that all recipes compress."""
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


def measured(teacher: GPT2) -> Stats:
    """All that any recipe needs to know of it, from `ROWS`."""
    spec = StatsSpec.everywhere(("gram", "full_fisher"), teacher.spec)
    return collect(teacher, spec, ROWS, measurement=Measurement())


def squeeze(
    recipe: MethodRecipe, model: GPT2, stats: Stats | None = None, *, seed: int = 0
) -> CompressedModel:
    """The model under that recipe, within no budget."""
    method = make_method(recipe)
    return method.compress(model, method.plan(model.spec, Budget(), stats), stats, seed=seed)


def matrix(model: GPT2, name: str) -> torch.Tensor:
    """The weight of a module as one matrix, (m, n)."""
    return model.site(name).weight_matrix().detach().double()


def row_of(result: CompressedModel, name: str) -> ModuleReport:
    """What is reported of a module."""
    return next(row for row in result.report if row.name == name)


def inputs(model: GPT2, name: str) -> torch.Tensor:
    """Every calibration input of a module, (tokens, m)."""
    found = []
    hook = model.site(name).register_forward_hook(lambda _m, args, _o: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(ROWS)
    hook.remove()
    return found[0].double()
