"""Taking units out of a network, with a proof: it answers as the network with the same weights set to zero.

Rules of this file: a group goes soundly, or nothing has changed and the reason is raised. What a module knows of its
widths is changed only where it fails otherwise, and as little of it as possible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import nn

from variants.export import EXPORT_TOLERANCE
from variants.recipes.pruning.layers import Gone, Layer
from variants.recipes.pruning.units import Group, Structure
from variants.recipes.training.fit import tensors_of

_LEAST = 1e-12
"""Answers below this count as zero."""
_MOST_NUMBERS = 3
"""How many attributes of a module are tried in every combination, before all of them together."""

Numbers = Mapping[str, int]
"""What attributes become, by their names."""


class UnsoundRemoval(Exception):
    """The network cannot do without these units as it is written; the message says what happened."""


def remove(
    module: nn.Module, structure: Structure, group: Group, going: Sequence[int], tensors: Sequence[torch.Tensor]
) -> None:
    """Take the units at these positions of a group out of a module in eval mode. Raises UnsoundRemoval.

    Code may know its widths as integers of the module that holds the layers, such as a number of heads: where the
    network fails otherwise, the fewest that make it sound become the new ones. Several ways to do so are none.
    """
    gone = np.zeros_like(structure.gone)
    gone[np.concatenate([group.units[position] for position in going])] = True
    shares = {name: share for name in structure.layers if (share := gone[structure.share(name)]).any()}
    old = {name: structure.layers[name] for name in shares}
    expected = _with_zeros(module, old, shares, tensors)
    owners = list(dict.fromkeys(module.get_submodule(name.rpartition(".")[0]) for name in shares))
    before = [_state(part) for part in (*(layer.module for layer in old.values()), *owners)]
    new = {name: layer.remove(shares[name]) for name, layer in old.items()}
    try:
        _make_sound(module, owners, _changes(group, going, old, new), tensors, expected)
    except UnsoundRemoval:
        _restore(before)
        raise
    structure.layers.update(new)
    structure.gone[gone] = True


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
        if not got.numel():
            continue
        allowed = EXPORT_TOLERANCE * max(_LEAST, float(want.double().abs().max())) if want.is_floating_point() else 0
        if not (got.double() - want.double()).abs().amax() <= allowed:  # so that NaN is a difference
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


def _make_sound(
    module: nn.Module,
    owners: Sequence[nn.Module],
    changes: set[tuple[int, int]],
    tensors: Sequence[torch.Tensor],
    expected: Sequence[torch.Tensor],
) -> None:
    """Change the fewest numbers of the owners with which the module answers as expected. Raises UnsoundRemoval."""
    taken, first = [_state(owner) for owner in owners], ""
    for choices in _choices(owners, changes):
        sound = []
        for numbers in choices:
            _renumber(owners, numbers, changes)
            why = difference(module, tensors, expected)
            _restore(taken)
            first = first or why or ""
            sound += [numbers] if why is None else []
        if len(sound) > 1:
            ways = " or ".join(", ".join(f"{name} = {number}" for name, number in each.items()) for each in sound)
            raise UnsoundRemoval(f"it is ambiguous which number of the code has to change: {ways}")
        if sound:
            _renumber(owners, sound[0], changes)
            return
    raise UnsoundRemoval(first)


def _changes(
    group: Group, going: Sequence[int], old: Mapping[str, Layer], new: Mapping[str, Layer]
) -> set[tuple[int, int]]:
    """What became another number, and which: the number of units, and widths of layers."""
    widths = {
        (len(slots), len(new[name].sizes[size])) for name, layer in old.items() for size, slots in layer.sizes.items()
    }
    found = widths | {(len(group.units), len(group.units) - len(going))}
    return {(before, after) for before, after in found if before != after}


def _choices(owners: Sequence[nn.Module], changes: set[tuple[int, int]]) -> Iterator[list[Numbers]]:
    """Which attributes may have to become what: none, then one, and so on; blocks of one kind share their names."""
    known = dict.fromkeys(
        (name, value) for owner in owners for name, value in vars(owner).items() if type(value) is int
    )
    single = dict.fromkeys(
        (name, after) for name, value in known for before, after in sorted(changes) if value == before
    )
    for count in range(min(_MOST_NUMBERS, len(single)) + 1):
        yield [numbers for chosen in combinations(single, count) if len(numbers := dict(chosen)) == count]
    everything = dict(list(single))
    if len(everything) == len(single) > _MOST_NUMBERS:
        yield [everything]


def _renumber(owners: Sequence[nn.Module], numbers: Numbers, changes: set[tuple[int, int]]) -> None:
    for owner in owners:
        for name, number in numbers.items():
            if type(value := vars(owner).get(name)) is int and (value, number) in changes:
                setattr(owner, name, number)


def _state(part: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
    """A module's attributes, so far as removing replaces them."""
    return part, _copied(vars(part))


def _restore(states: Sequence[tuple[nn.Module, dict[str, Any]]]) -> None:
    for part, state in states:
        vars(part).clear()
        vars(part).update(_copied(state))


def _copied(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value.copy() if isinstance(value, (dict, list)) else value for name, value in state.items()}
