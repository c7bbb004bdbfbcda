"""The steps of pruning channels, whatever plans them: a copy to begin with, training what is left, the graph of it.

Rules of this file: torch is imported only when something is pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from variants.data import Array
from variants.export import example_tensors, export_graph
from variants.recipes.pruning.parameters import PruneChannels
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.fit import Losses, finetune
from variants.repository import RepositoryError

if TYPE_CHECKING:
    from torch import nn

    from variants.recipes.pruning.pruning import Pruning

_SAMPLES = 4
"""How many real samples a removal is proven on."""


def start(module: nn.Module, ingredients: Ingredients, parameters: PruneChannels) -> Pruning:
    """A copy of a module, with all its channels. Raises RecipeRejected without samples to run it on."""
    from variants.recipes.pruning.importance import values_of
    from variants.recipes.pruning.pruning import Pruning

    tensors = example_tensors(module, _inputs(ingredients), _SAMPLES, batched=ingredients.source.max_batch > 0)
    measure = partial(values_of, parameters.importance, ingredients)
    return Pruning(module, list(tensors.values()), measure, parameters.round_to)


def recover(
    module: nn.Module, ingredients: Ingredients, parameters: PruneChannels, epochs: int, part: tuple[float, float]
) -> Losses:
    """Train a pruned module; returns the losses. `part` is where this begins in all that is done, and its share."""
    teacher = ingredients.source.module if ingredients.teacher is None else ingredients.teacher
    if parameters.recover == "none" or epochs == 0 or teacher is None:
        return []
    begun, share = part
    partly = replace(ingredients, progress=lambda done: ingredients.progress(begun + share * done))
    return finetune(module, teacher, partly, recover=parameters.recover, epochs=epochs)


def exported(module: nn.Module, ingredients: Ingredients, name: str) -> Path:
    """The module as a graph in the recipe's folder. Raises RecipeRejected."""
    source, target = ingredients.source, ingredients.work / name
    try:
        export_graph(module, _inputs(ingredients), target, batched=source.max_batch > 0, axes=source.axes)
    except RepositoryError as error:
        raise RecipeRejected(f"the pruned module cannot be exported: {error}") from error
    return target


def _inputs(ingredients: Ingredients) -> Mapping[str, Array]:
    if ingredients.example is None:
        raise RecipeRejected("removing channels needs samples to run the module on; add `evaluation:` data")
    return ingredients.example.inputs
