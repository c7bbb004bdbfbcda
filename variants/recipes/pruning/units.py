"""Which channels can only go together, and which must stay.

A unit is a set of channels and columns that touch: a channel of a residual stream with all that is added to it and all
that takes it, or a whole attention head, whose values depend on all its queries and keys. Units of the same layers are
a group, ranked against one another.

Rules of this file: what reaches an output of the network, or a layer whose channels are unknown here (a LayerNorm
needs all of them), stays. Nothing is changed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from variants.recipes.pruning.layers import Gone, Layer, Slots
from variants.recipes.pruning.trace import Tracer

Scores = npt.NDArray[np.float64]
Values = npt.NDArray[np.float64]
"""[rows, total] by slot; each row is one look at the network."""
Pairs = npt.NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Structure:
    """The slots of all layers in one numbering: those of a layer begin at `first`.

    `pairs` [n, 2] go together, `fixed` ones [total] stay, and `reasons` says of some layers why; `layers` and `gone`
    follow what is removed.
    """

    layers: dict[str, Layer]
    first: Mapping[str, int]
    pairs: Pairs
    fixed: Gone
    gone: Gone
    reasons: Mapping[str, str]

    def share(self, name: str) -> slice:
        """Where a layer's slots are."""
        layer = self.layers[name]
        return slice(self.first[name], self.first[name] + layer.outs + layer.ins)


@dataclass(frozen=True, slots=True)
class Group:
    """The layers whose channels go together, and the units, each with the slots it has anywhere.

    `width` is how many channels of one layer a unit holds: 1, or an attention head's.
    """

    layers: tuple[str, ...]
    units: Sequence[Slots]
    width: int


def find_structure(module: nn.Module, tensors: Sequence[torch.Tensor]) -> Structure:
    """Follow every channel of a module in eval mode, run on `tensors`."""
    tracer = Tracer(module, tensors)
    reach: dict[str, Gone] = {}
    reasons: dict[str, str] = {}
    for name, layer in tracer.layers.items():
        seen, elsewhere = tracer.follow({name: np.arange(layer.outs)})
        if elsewhere:
            reasons[name] = f"its channels reach {elsewhere[0]}"
        elif layer.outs == 1:
            reasons[name] = "it has one channel only"
        elif not seen.any():
            reasons[name] = "no layer was seen to take its channels"
        else:
            reach[name] = seen
    found = [pairs for names in _apart(reach) for pairs in _followed(tracer, names, reach)]
    fixed = np.zeros(tracer.total, np.bool_)
    for name, layer in tracer.layers.items():
        start = tracer.first[name]
        found.append(start + np.array(layer.ties, np.intp).reshape(-1, 2))
        fixed[start : start + layer.outs] = name in reasons
    pairs = np.concatenate([np.empty((0, 2), np.intp), *found])
    return Structure(tracer.layers, tracer.first, pairs, fixed, np.zeros_like(fixed), reasons)


def _apart(reach: Mapping[str, Gone]) -> Iterator[list[str]]:
    """The layers in sets that no column sees two of: all layers of a set can be followed at once."""
    waiting = list(reach)
    while waiting:
        chosen: list[str] = []
        covered = np.zeros_like(reach[waiting[0]])
        for name in waiting:
            if not (covered & reach[name]).any():
                chosen.append(name)
                covered |= reach[name]
        waiting = [name for name in waiting if name not in chosen]
        yield chosen


def _followed(tracer: Tracer, names: Sequence[str], reach: Mapping[str, Gone]) -> Iterator[Pairs]:
    """What must go together: channels and columns, wherever a column depends on a channel, or may.

    All channels with the same digit in their number are followed at once, for every digit and place: a column's one
    channel has all the digits that it sees. Where it depends on several, those that have such digits only are meant,
    which may be too many: then numbers are read another way, and at last channels are followed one by one.
    """
    left = list(names)
    for parts in (1, 3, 2):  # queries, keys and values, or values and gates, of one layer
        digits = {n: _digits(outs, parts) for n in left if (outs := tracer.layers[n].outs) % parts == 0}
        seen = _seen_by_digit(tracer, digits)
        for name, own in digits.items():
            columns = np.flatnonzero(reach[name])
            found = _meant(own, [[each[columns] for each in place] for place in seen])
            if found is not None:
                left.remove(name)
                first, (kinds, kind_of) = tracer.first[name], found
                yield np.stack([first + kinds.argmax(axis=1)[kind_of], columns], axis=1)
                for channels in map(np.flatnonzero, kinds):
                    yield first + np.stack([np.full_like(channels, channels[0]), channels], axis=1)
    for channel in range(max((tracer.layers[name].outs for name in left), default=0)):
        taking_part = [name for name in left if channel < tracer.layers[name].outs]
        sees, _ = tracer.follow({name: np.array([channel]) for name in taking_part})
        for name in taking_part:
            columns, own = np.flatnonzero(sees & reach[name]), tracer.first[name] + channel
            yield np.stack([np.full_like(columns, own), columns], axis=1)
            if len(columns) == reach[name].sum():  # whatever a column takes is joined: one unit, as under a softmax
                left.remove(name)
                channels = tracer.first[name] + np.arange(tracer.layers[name].outs)
                yield np.stack([np.full_like(channels, own), channels], axis=1)


def _seen_by_digit(tracer: Tracer, digits: Mapping[str, Sequence[Slots]]) -> list[list[Gone]]:
    """By place and digit: the slots that see the channels of these layers whose number has that digit there."""
    seen = []
    for place in range(max(map(len, digits.values()), default=0)):
        here = {name: own[place] for name, own in digits.items() if place < len(own)}
        values = range(max(int(own.max()) + 1 for own in here.values()))
        chosen = [{name: np.flatnonzero(own == value) for name, own in here.items()} for value in values]
        seen.append([tracer.follow(channels)[0] for channels in chosen])
    return seen


def _digits(count: int, parts: int) -> list[Slots]:
    """The part that each number below `count` is in, of so many, and the binary digits of its place in it."""
    part, rest = np.divmod(np.arange(count), count // parts)
    binary = [rest >> place & 1 for place in range((count // parts - 1).bit_length())]
    return [part, *binary] if parts > 1 else binary


def _meant(digits: Sequence[Slots], seen: Sequence[Sequence[Gone]]) -> tuple[npt.NDArray[np.bool_], Slots] | None:
    """Which channels a column may depend on: by kind of column and channel, and the kind of every column.

    `seen` says by place and digit which columns see it. None where that says too little: where columns of different
    kinds have a channel in common.
    """
    flags = np.stack([sees for place in seen for sees in place])
    codes = (flags << np.arange(len(flags))[:, None]).sum(axis=0)
    _, examples, kind_of = np.unique(codes, return_index=True, return_inverse=True)
    kinds = np.ones((len(examples), len(digits[0])), np.bool_)
    for own, place in zip(digits, seen, strict=False):
        kinds &= np.stack(place, axis=1)[examples][:, own]
    return (kinds, kind_of) if len(kinds) > 1 and (kinds.sum(axis=0) <= 1).all() else None


def find_groups(structure: Structure, values: Sequence[Values]) -> list[Group]:
    """The groups of what may go; `values` (see `rank`) pair up the units of recurrent layers.

    All layers and directions of a recurrent layer must lose alike many units. So the lowest of each go together, and
    so on up: the order of units has no meaning of its own.
    """
    parts = _parts(structure.pairs, len(structure.fixed))
    pairs = [structure.pairs]
    for name, layer in structure.layers.items():
        blocks = [structure.first[name] + block for block in layer.blocks]
        ranked = [block[np.argsort(rank(values, [parts[slot] for slot in block]), kind="stable")] for block in blocks]
        pairs += [np.stack([ranked[0], each], axis=1) for each in ranked[1:]]
    owners = {
        slot: name
        for name, layer in structure.layers.items()
        for slot in range(structure.first[name], structure.first[name] + layer.outs)
    }
    stays = structure.fixed | structure.gone
    groups: dict[tuple[str, ...], list[Slots]] = defaultdict(list)
    for lowest, unit in enumerate(_parts(np.concatenate(pairs), len(structure.fixed))):
        layers = tuple(dict.fromkeys(owners[slot] for slot in unit.tolist() if slot in owners))
        if unit[0] == lowest and layers and not stays[unit].any():
            groups[layers].append(unit)
    return [Group(layers, units, _width(structure, layers[0], units[0])) for layers, units in groups.items()]


def _width(structure: Structure, name: str, unit: Slots) -> int:
    """How many of a layer's channels a unit holds, in each of its blocks."""
    layer, first = structure.layers[name], structure.first[name]
    return int(((unit >= first) & (unit < first + layer.outs)).sum()) // max(1, len(layer.blocks))


def rank(values: Sequence[Values], units: Sequence[Slots]) -> Scores:
    """A score per unit, the lowest of which goes first: what its slots' values add up to, on average over the rows.

    Of several values [rows, total] the first counts that says something about any of these units.
    """
    for each in values:
        scores: Scores = np.abs(np.stack([each[:, unit].sum(axis=1) for unit in units])).mean(axis=1)
        if scores.any():
            return scores
    return np.zeros(len(units))


def _parts(pairs: Pairs, total: int) -> list[Slots]:
    """By slot: all slots that a chain of pairs joins it with, in order."""
    labels = np.arange(total)
    while True:
        lowest = labels[pairs].min(axis=1)
        joined = labels.copy()
        for side in (0, 1):
            np.minimum.at(joined, labels[pairs[:, side]], lowest)
            np.minimum.at(joined, pairs[:, side], lowest)
        joined = joined[joined]
        if np.array_equal(joined, labels):
            break
        labels = joined
    if total == 0:
        return []
    order = np.argsort(labels, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)
    by_lowest = {int(part[0]): part for part in parts}
    return [by_lowest[label] for label in labels.tolist()]
