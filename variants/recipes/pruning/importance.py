"""Which channels a network can miss most easily: a value for every slot, of which a unit's add up to its score.

Rules of this file: nothing is changed; data are read in a fixed order, so that the same channels go every time.

L1 and L2: Li et al., "Pruning Filters for Efficient ConvNets", 2017, over all weights that go (Fang et al., "DepGraph",
2023). Taylor: Molchanov et al., "Importance Estimation for Neural Network Pruning", 2019. Batch normalisation's scale:
Liu et al., "Network Slimming", 2017. Activation: the mean magnitude of what the next layers take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from variants.data import spread
from variants.export import example_tensors
from variants.recipes.pruning.layers import Layer
from variants.recipes.pruning.parameters import Importance
from variants.recipes.pruning.units import Structure, Values
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.fit import tensors_of

_SAMPLES, _BATCH, _TAYLOR_BATCH = 512, 64, 16


def values_of(
    importance: Importance, ingredients: Ingredients, module: nn.Module, structure: Structure
) -> list[Values]:
    """Values [rows, total] by slot, and those to fall back on: L1 ranks what the others say nothing about.

    Raises RecipeRejected for what an importance needs and is not there: samples, or batch normalisation.
    """
    measures: Mapping[Importance, Callable[[], Values]] = {
        "l1": partial(norms, structure, 1),
        "l2": partial(norms, structure, 2),
        "activation": partial(_activations, module, structure, ingredients),
        "taylor": partial(_answer_changes, module, structure, ingredients),
        "batchnorm": partial(_scales, structure),
    }
    return [measures[importance](), measures["l1"]()]


def _by_slot(structure: Structure, value: Callable[[Layer], np.ndarray]) -> np.ndarray:
    """One row: a value [outs + ins] per layer, in the numbering of all."""
    return np.concatenate([value(layer) for layer in structure.layers.values()])


def norms(structure: Structure, power: int) -> Values:
    """What the weights in a slot add up to, each to the power: the L2 norm's root changes no order."""

    def sums(layer: Layer) -> np.ndarray:
        return layer.sums({name: weight.detach().abs() ** power for name, weight in layer.weights.items()})

    return _by_slot(structure, sums)[None]


def _scales(structure: Structure) -> Values:
    """The magnitude of batch normalisation's scales."""
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    if not any(isinstance(layer.module, kinds) and layer.weights for layer in structure.layers.values()):
        raise RecipeRejected("importance `batchnorm` needs batch normalisation with scales; take `l1` or `taylor`")

    def sums(layer: Layer) -> np.ndarray:
        weights = layer.weights if isinstance(layer.module, kinds) else {}
        return layer.sums({name: weight.detach().abs() for name, weight in weights.items()})

    return _by_slot(structure, sums)[None]


def _answer_changes(module: nn.Module, structure: Structure, ingredients: Ingredients) -> Values:
    """Gradient times weight, a row per batch: how the answers would change, to first order, were the weights zero.

    Each row is of another random sum of the answers, so that the mean magnitude over the rows is in proportion to the
    distance from the teacher's answers. A trained network's own loss has next to no gradient, and ranked worse.
    """
    generator = torch.Generator().manual_seed(0)
    rows = []
    with _learning(module):
        for inputs, _ in _chunks(module, ingredients, _TAYLOR_BATCH):
            answers = [each for each in tensors_of(module(*inputs)) if each.requires_grad]
            if not answers:
                raise RecipeRejected(
                    "importance `taylor` needs answers with gradients, which it has none of; take `l1`"
                )
            module.zero_grad(set_to_none=True)
            sums = [(each * torch.randn(each.shape, generator=generator)).sum() for each in answers]
            torch.stack(sums).sum().backward()
            rows.append(_by_slot(structure, _gradient_times_weight))
    return np.stack(rows)


@contextmanager
def _learning(module: nn.Module) -> Iterator[None]:
    """While open, all weights have gradients, frozen ones too; afterwards none has."""
    frozen = [value for value in module.parameters() if not value.requires_grad and value.is_floating_point()]
    try:
        for value in frozen:
            value.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        module.zero_grad(set_to_none=True)
        for value in frozen:
            value.requires_grad_(False)


def _gradient_times_weight(layer: Layer) -> np.ndarray:
    return layer.sums({n: (w * w.grad).detach() for n, w in layer.weights.items() if w.grad is not None})


def _activations(module: nn.Module, structure: Structure, ingredients: Ingredients) -> Values:
    """The mean magnitude of every column that a layer takes, and of a recurrent layer's last states."""
    total, samples = np.zeros(len(structure.fixed)), 0
    means = np.zeros_like(total)
    hooks = [
        layer.module.register_forward_hook(
            partial(_add_magnitudes, layer, means[structure.share(name)]), with_kwargs=True
        )
        for name, layer in structure.layers.items()
        if not layer.is_channelwise
    ]
    try:
        with torch.no_grad():
            for inputs, count in _chunks(module, ingredients, _BATCH):
                means[:] = 0
                module(*inputs)
                total += count * means  # the last chunk may be smaller than the others
                samples += count
    finally:
        for hook in hooks:
            hook.remove()
    return total[None] / samples


def _add_magnitudes(layer: Layer, total: Values, _module: nn.Module, *call: Any) -> None:
    """Add what a layer takes, and for a recurrent one its last states, to its slots' sums [outs + ins]."""
    args, kwargs, made = call
    if len(layer.columns):
        taken = args[0] if args else next(iter(kwargs.values()))
        magnitudes = taken.abs().movedim(layer.axis, 0)
        total[layer.columns] += magnitudes.reshape(len(layer.columns), -1).mean(1).numpy()
    if layer.blocks:
        states = made[1][0] if isinstance(made[1], tuple) else made[1]  # [layers x directions, (batch), units]
        magnitudes = states.abs().reshape(len(states), -1, states.shape[-1]).mean(1)
        total[np.concatenate(layer.blocks)] += magnitudes.flatten().numpy()


def _chunks(module: nn.Module, ingredients: Ingredients, size: int) -> Iterator[tuple[list[torch.Tensor], int]]:
    """Samples as inputs in the order of `forward`, `size` at a time, and how many. Raises RecipeRejected."""
    samples = ingredients.training or ingredients.calibration  # never what accuracy is measured on
    if samples is None:
        raise RecipeRejected("this importance needs samples; add `calibration:` or `training:` data, or take `l1`")
    samples, batched = spread(samples, _SAMPLES), ingredients.source.max_batch > 0
    size = size if batched else 1
    for start in range(0, len(samples), size):
        part = samples.take(slice(start, start + size))
        yield list(example_tensors(module, part.inputs, len(part), batched=batched).values()), len(part)
