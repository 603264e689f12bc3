"""The low-rank family on a toy GPT-2: a recipe for each way to set it up, a teacher, its statistics."""

from collections.abc import Callable
from typing import Any

import torch

from model.compress.budget import Budget
from model.compress.calibration import Measurement, collect
from model.compress.contract import CompressedModel, Stats, StatsSpec
from model.compress.low_rank_recipe import ASVD, FWSVD, KFACSVD, SVD, SVDLLM, SVDLLMBC
from model.compress.methods import make_method, make_plan
from model.compress.recipe import MethodRecipe
from model.config import GPT2Config, ModelSpec
from model.gpt2 import GPT2

ARCH = GPT2Config(n_layer=2, n_head=2, n_embd=32, n_ctx=24, vocab_size=61)
ROWS = torch.randint(61, (12, 24), generator=torch.Generator().manual_seed(7))
RECIPES = {
    "svd": SVD(rank=7),
    "svd-all": SVD(rank=6, targets="all_linear", layers=(1,)),
    "fwsvd": FWSVD(rank=7),
    "fwsvd-two": FWSVD(rank=7, weights="row_col"),
    "asvd": ASVD(rank=7),
    "svdllm": SVDLLM(rank=7, targets="all_linear"),
    "svdllm-bc": SVDLLMBC(rank=7, targets="all_linear"),
    "kfac": KFACSVD(rank=7, targets="all_linear"),
    "kfac-bc": KFACSVD(rank=7, bias_correction=True),
}
NEEDS = ("gram", "abs_mean", "row_fisher", "col_fisher", "full_fisher", "delta_gram")


def teacher_of(toy: Callable[..., GPT2]) -> GPT2:
    """The model that all recipes compress."""
    return toy(ModelSpec.dense(ARCH), seed=1, dtype=torch.float64)


def measured(teacher: GPT2) -> Stats:
    """All that any recipe needs to know of it, from `ROWS`."""
    return collect(teacher, StatsSpec.everywhere(NEEDS, teacher.spec), ROWS, measurement=Measurement())


def squeeze(recipe: MethodRecipe, model: GPT2, stats: Stats | None, **budget: Any) -> CompressedModel:
    """The model under that recipe, within that budget."""
    method = make_method(recipe)
    return method.compress(model, make_plan(method, model, Budget(**budget), stats), stats, seed=0)
