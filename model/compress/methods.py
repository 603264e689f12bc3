"""The list of compression methods: name of the recipe to the class that does it. The only such list."""

from collections.abc import Callable, Mapping
from typing import Any

from model.compress.contract import CompressionMethod
from model.compress.controls import DenseMethod, RandomInitMethod
from model.compress.kronecker import KronPruneMethod, KronVLMethod
from model.compress.recipe import MethodRecipe

METHODS: Mapping[str, Callable[[Any], CompressionMethod]] = {
    "kron_vl": KronVLMethod,
    "kron_prune": KronPruneMethod,
    "random_init": RandomInitMethod,
    "dense": DenseMethod,
}


def make_method(recipe: MethodRecipe) -> CompressionMethod:
    """The method that a recipe names, with its settings inside."""
    return METHODS[recipe.name](recipe)
