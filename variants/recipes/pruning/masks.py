"""prune-masks: whole output channels become zero but stay where they are; `prune-channels` takes them out.

Rules of this file: the layers that produce the outputs keep all their channels, every other layer at least one. A
masked channel still answers with its bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from variants.model_config import Section
from variants.recipes.pruning.outputs import output_layers
from variants.recipes.pruning.zeros import Recover, Weight, mask_module, shared_beyond
from variants.recipes.recipe import Ingredients, Product

if TYPE_CHECKING:
    from torch import nn


class PruneMasks(Section):
    """`sparsity` is the share of each layer's channels that become zero: those with the least L1 or L2 `norm`."""

    sparsity: float = Field(0.5, gt=0, lt=1)
    norm: Literal[1, 2] = 1
    recover: Recover = "finetune"


def prune_masks(ingredients: Ingredients, parameters: PruneMasks) -> Product:
    """Mask whole channels of linear and convolutional layers (`ln_structured`), and keep them so through recovery.

    By L1 norm as in Li et al., "Pruning Filters for Efficient ConvNets" (ICLR 2017). Nothing gets smaller or faster.
    """
    from torch.nn.utils import prune

    axes: dict[nn.Module, int] = {}

    def mask(module: nn.Module, tensors: Mapping[str, Any]) -> list[Weight]:
        axes.update(_channel_axes(module, output_layers(module, tensors)))
        for layer, axis in axes.items():
            channels = layer.get_parameter("weight").shape[axis]
            count = min(round(parameters.sparsity * channels), channels - 1)
            prune.ln_structured(layer, "weight", count, n=parameters.norm, dim=axis)
        return [(layer, "weight") for layer in axes]

    product = mask_module(ingredients, parameters.recover, mask)
    facts = {"zeroed_channel_share": _zeroed_share(axes), **product.facts, "really_smaller_with": "prune-channels"}
    return replace(product, facts=facts)


def _channel_axes(module: nn.Module, outputs: list[nn.Module]) -> dict[nn.Module, int]:
    """The layers that may lose channels, and which dimension of their weights counts output channels."""
    from torch import nn

    transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed)
    hidden = [layer for layer in module.modules() if isinstance(layer, kinds) and layer not in outputs]
    shared = shared_beyond(module, hidden)
    found: dict[int, nn.Module] = {}
    for layer in hidden:
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is not None and id(weight) not in shared:
            found.setdefault(id(weight), layer)  # one that two layers share is masked once
    return {layer: int(isinstance(layer, transposed)) for layer in found.values()}


def _zeroed_share(axes: Mapping[nn.Module, int]) -> float:
    """The share of channels without any weight left, among those that might have been masked."""
    weights = [layer.get_parameter("weight").detach().transpose(0, axis) for layer, axis in axes.items()]
    zeroed = sum(int((weight.flatten(1) == 0).all(1).sum()) for weight in weights)
    return round(zeroed / sum(len(weight) for weight in weights), 4)
