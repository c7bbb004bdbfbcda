"""prune-channels: whole channels go, which makes a model really smaller and faster.

Rules of this file: torch is imported only when something is pruned. What a channel is, what goes with it and how it is
taken out: `layers.py`, `trace.py`, `units.py` and `removal.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, field_validator

from variants.data import Array
from variants.export import example_tensors, export_graph
from variants.model_config import Section
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import Losses, as_finding, effort, finetune
from variants.repository import RepositoryError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from variants.recipes.pruning.pruning import Pruning

_SAMPLES = 2
"""How many real samples a removal is proven on."""

Importance = Literal["l1", "l2", "activation", "taylor", "batchnorm"]


class PruneChannels(Section):
    """`sparsity` is the share of each layer's channels that goes, or `auto` for as much as the gate lets pass.

    `importance` says which channels go, `recover` how accuracy comes back, and `round_to` of what number the widths
    that stay are multiples: ONNX Runtime's fast convolutions want 4. A given sparsity may be reached in `steps`, which
    share the epochs; `auto` takes its own.
    """

    sparsity: float | Literal["auto"] = 0.5
    importance: Importance = "l1"
    recover: Literal["distill", "finetune", "none"] = "distill"
    steps: int = Field(1, ge=1, le=20)
    round_to: int = Field(4, ge=1)

    @field_validator("sparsity", mode="before")
    @classmethod
    def _is_share(cls, value: Any) -> Any:
        if value == "auto" or (isinstance(value, (int, float)) and 0 < value < 1):
            return value
        raise ValueError(f"a share of the channels between 0 and 1, or auto, not {value!r}")


def prune_channels(ingredients: Ingredients, parameters: PruneChannels) -> Product:
    """Remove the least important channels, with everything that depends on them, and recover the accuracy."""
    if ingredients.source.module is None:
        raise RecipeRejected(
            "removing channels needs a torch source (module and safetensors); for ONNX there is `prune-unstructured`"
        )
    if parameters.recover != "none" and ingredients.training is None:
        raise RecipeRejected("recovering from pruning needs training data; add `training:` or say `recover: none`")
    if parameters.sparsity == "auto":
        from variants.recipes.pruning.search import SparsitySearch

        search = SparsitySearch(ingredients, parameters)
        search.run()
        pruning, losses, tried = search.best, search.losses, search.tried
    else:
        pruning, tried = start(ingredients.source.module, ingredients, parameters), []
        losses = _in_rounds(pruning, ingredients, parameters, parameters.sparsity)
    pruning.require_smaller()
    target = exported(pruning.module, ingredients, "pruned.onnx")
    facts = {
        "weights_before": pruning.weights_before,
        "weights_after": pruning.weights,
        "sparsity_reached": round(pruning.sparsity, 4),
        "epochs": len(losses),
    }
    findings = pruning.findings() | ({"sparsity": tried} if tried else {}) | (as_finding(losses) if losses else {})
    return Product({"model.onnx": target}, facts=facts, findings=findings, module=pruning.module)


def narrower(module: nn.Module, tensors: Mapping[str, torch.Tensor], sparsity: float) -> nn.Module:
    """A copy without this share of its channels, the smallest by L1 norm. Raises RecipeRejected if none can go.

    `tensors` are real samples in the order of `forward`.
    """
    from variants.recipes.pruning.importance import norms
    from variants.recipes.pruning.pruning import Pruning

    pruning = Pruning(module, list(tensors.values()), lambda _module, structure: [norms(structure, 1)], round_to=1)
    pruning.to(sparsity)
    pruning.require_smaller()
    return pruning.module


def start(module: nn.Module, ingredients: Ingredients, parameters: PruneChannels) -> Pruning:
    """A copy of a module, with all its channels. Raises RecipeRejected without samples to run it on."""
    import torch

    from variants.recipes.pruning.importance import values_of
    from variants.recipes.pruning.pruning import Pruning

    torch.manual_seed(0)
    tensors = example_tensors(module, _inputs(ingredients), _SAMPLES, batched=ingredients.source.max_batch > 0)
    measure = partial(values_of, parameters.importance, ingredients)
    return Pruning(module, list(tensors.values()), measure, parameters.round_to)


def _in_rounds(pruning: Pruning, ingredients: Ingredients, parameters: PruneChannels, sparsity: float) -> Losses:
    """Prune and recover in as many steps as asked for; returns the losses.

    Every step keeps the same share of what the one before left. The steps share the epochs; the last, after which
    nothing more goes, has half of them.
    """
    total = 0 if parameters.recover == "none" else effort(ingredients)[0]
    losses: Losses = []
    steps = parameters.steps
    for step in range(1, steps + 1):
        pruning.to(1 - (1 - sparsity) ** (step / steps))
        until = total if step == steps else total * step // (2 * (steps - 1))
        done = len(losses)
        part = (done / max(1, total), (until - done) / max(1, total))
        losses += recover(pruning.module, ingredients, parameters, until - done, part)
    return losses


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
