"""Taking units out of a network, with a proof: it answers as the network with the same weights set to zero.

Rules of this file: a group goes soundly, or nothing has changed and the reason is raised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from variants.export import EXPORT_TOLERANCE
from variants.recipes.pruning.layers import Gone, Layer
from variants.recipes.pruning.units import Group, Structure
from variants.recipes.training.fit import tensors_of


class UnsoundRemoval(Exception):
    """The network cannot do without these units as it is written; the message says what happened."""


def remove(
    module: nn.Module, structure: Structure, group: Group, going: Sequence[int], tensors: Sequence[torch.Tensor]
) -> None:
    """Take the units at these positions of a group out of a module in eval mode. Raises UnsoundRemoval.

    Code may know its widths as integers of the module that holds the layers, such as a number of heads: where the
    network fails otherwise, those that equal the old number of units, or an old width, become the new one.
    """
    gone = np.zeros_like(structure.gone)
    gone[np.concatenate([group.units[position] for position in going])] = True
    shares = {name: share for name in structure.layers if (share := gone[structure.share(name)]).any()}
    old = {name: structure.layers[name] for name in shares}
    expected = _with_zeros(module, old, shares, tensors)
    owners = list(dict.fromkeys(module.get_submodule(name.rpartition(".")[0]) for name in shares))
    before = [_state(part) for part in (*(layer.module for layer in old.values()), *owners)]
    new = {name: layer.remove(shares[name]) for name, layer in old.items()}
    reasons = []
    for numbers in _numbers(group, going, old, new):
        _renumber(owners, numbers)
        reason = difference(module, tensors, expected)
        if reason is None:
            structure.layers.update(new)
            structure.gone[gone] = True
            return
        reasons.append(reason)
    _restore(before)
    raise UnsoundRemoval(reasons[0])


def answers(module: nn.Module, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What a module answers; it gets copies, which it may change."""
    with torch.no_grad():
        return tensors_of(module(*(tensor.clone() for tensor in tensors)))


def difference(module: nn.Module, tensors: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> str | None:
    """How the module's answers are not the expected ones; None where they are."""
    try:
        found = answers(module, tensors)
    except Exception as error:  # code that is written for one width fails in its own way
        return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if [value.shape for value in found] != [value.shape for value in expected]:
        return "the shape of an output would change"
    for got, want in zip(found, expected, strict=True):
        apart = (got.double() - want.double()).abs().amax() if got.numel() else torch.zeros(())
        if not apart <= EXPORT_TOLERANCE * max(1.0, float(want.double().abs().max())):  # so that NaN is a difference
            return "the answers depend on how many channels there are"
    return None


def _with_zeros(
    module: nn.Module, layers: Mapping[str, Layer], gone: Mapping[str, Gone], tensors: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """What the module answers with the weights of these slots set to zero."""
    kept = [(value, value.detach().clone()) for layer in layers.values() for value in layer.module.parameters()]
    try:
        for name, layer in layers.items():
            layer.zero(gone[name])
        return answers(module, tensors)
    finally:
        for value, old in kept:
            value.data.copy_(old)


def _numbers(
    group: Group, going: Sequence[int], old: Mapping[str, Layer], new: Mapping[str, Layer]
) -> Iterator[dict[int, int]]:
    """Which integers may have to become which others, more and more: none, the number of units, widths."""
    units = {len(group.units): len(group.units) - len(going)}
    widths = {
        len(slots): len(new[name].sizes[size]) for name, layer in old.items() for size, slots in layer.sizes.items()
    }
    yield from ({}, units, widths | units)


def _renumber(owners: Sequence[nn.Module], numbers: Mapping[int, int]) -> None:
    for owner in owners:
        for name, value in list(vars(owner).items()):
            if type(value) is int and value in numbers:
                setattr(owner, name, numbers[value])


def _state(part: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A module's attributes, so far as removing replaces them."""
    return part, {n: v.copy() if isinstance(v, (dict, list)) else v for n, v in vars(part).items()}


def _restore(states: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, state in states:
        vars(part).clear()
        vars(part).update(state)
