"""prune-channels: whole channels go, which makes a model really smaller and faster.

Rules of this file: torch is imported only when something is pruned. What a channel is, what goes with it and how it is
taken out: `layers.py`, `trace.py`, `units.py` and `removal.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from variants.recipes.pruning.parameters import PruneChannels
from variants.recipes.pruning.search import SparsitySearch
from variants.recipes.pruning.steps import exported, recover, start
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import Losses, as_finding, effort

if TYPE_CHECKING:
    import torch
    from torch import nn

    from variants.recipes.pruning.pruning import Pruning


def prune_channels(ingredients: Ingredients, parameters: PruneChannels) -> Product:
    """Remove the least important channels, with everything that depends on them, and recover the accuracy."""
    if ingredients.source.module is None:
        raise RecipeRejected(
            "removing channels needs a torch source (module and safetensors); for ONNX there is `prune-unstructured`"
        )
    if parameters.recover != "none" and ingredients.training is None:
        raise RecipeRejected("recovering from pruning needs training data; add `training:` or say `recover: none`")
    if parameters.sparsity == "auto":
        search = SparsitySearch(ingredients, parameters)
        search.run()
        pruning, losses, tried = search.best, search.losses, search.tried
    else:
        pruning, tried = start(ingredients.source.module, ingredients, parameters), []
        losses = _in_rounds(pruning, ingredients, parameters, parameters.sparsity)
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


def _in_rounds(pruning: Pruning, ingredients: Ingredients, parameters: PruneChannels, sparsity: float) -> Losses:
    """Prune and recover in as many steps as asked for; returns the losses. Raises RecipeRejected if nothing can go.

    Every step keeps the same share of what the one before left. The steps share the epochs; the last, after which
    nothing more goes, has half of them.
    """
    total = 0 if parameters.recover == "none" else effort(ingredients)[0]
    losses: Losses = []
    steps = parameters.steps
    for step in range(1, steps + 1):
        pruning.to(1 - (1 - sparsity) ** (step / steps))
        if pruning.weights == pruning.weights_before and step < steps:
            continue  # nothing to recover from; later steps have its epochs
        pruning.require_smaller()
        until = total if step == steps else total * step // (2 * (steps - 1))
        done = len(losses)
        part = (done / max(1, total), (until - done) / max(1, total))
        losses += recover(pruning.module, ingredients, parameters, until - done, part)
    return losses
