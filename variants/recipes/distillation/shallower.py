"""A shallower student: of the blocks that a network repeats, only some are left.

Rules of this file: blocks are repeated where a Sequential or a ModuleList holds alike ones, one after another or in
alike groups, each answers in the shape that it is given, and the next one needs its answer; a recurrent layer repeats
itself `num_layers` times. What does not run without them, keeps them.
"""

from __future__ import annotations

import copy
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from variants.recipes.distillation.succession import Succession
from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    from torch import nn


def shallower(module: nn.Module, tensors: dict[str, Any], depth: float) -> nn.Module:
    """A copy with `depth` of each run of repeated blocks, evenly spread, the first always among them.

    Blocks keep their weights. `tensors` are example inputs. Raises RecipeRejected when no block can go.
    """
    changed = module
    removable = dict(_removable(module, Succession(module, tensors), depth))
    for path, gone in reversed(removable.items()):  # from the back: removal renumbers what follows
        changed = _without(changed, path, gone, tensors)
    for path, layers in _recurrent(changed, depth):
        changed = _with_layers(changed, path, layers, tensors)
    if changed is module:
        raise RecipeRejected(
            "it has no repeated blocks that could go at this `depth`; for a smaller student say `student: narrower`"
        )
    return changed


def _removable(module: nn.Module, succession: Succession, depth: float) -> Iterator[tuple[str, list[int]]]:
    """The containers by path, with the positions of the children that go; inside a repeated block nothing goes."""
    from torch import nn

    is_container = isinstance(module, (nn.Sequential, nn.ModuleList))
    inside: Any = module if is_container else module.children()
    children: list[nn.Module | None] = list(inside)  # a container counts one that it holds twice, and gaps
    repeated: set[int] = set()
    gone: list[int] = []
    for start, period, times in _repeats(_kinds(children)) if is_container else ():
        groups = [range(at, at + period) for at in range(start, start + period * times, period)]
        blocks = [[block for at in group if (block := children[at]) is not None] for group in groups]
        if all(blocks) and succession.joins(blocks):
            repeated.update(range(start, start + period * times))
            kept = _spread(times, depth)
            gone += [at for number, group in enumerate(groups) if number not in kept for at in group]
    if gone:
        yield succession.paths[module], gone
    for position, child in enumerate(children):
        if child is not None and position not in repeated:
            yield from _removable(child, succession, depth)


_PLACE = re.compile("(idx|index|number|position|layer|block|(^|_)id)$")
"""The names of attributes by which a block may know its place."""

Kind = tuple[str, str, tuple[tuple[int, ...], ...]]


def _kinds(layers: Sequence[nn.Module | None]) -> list[Kind]:
    """What alike blocks have in common: how they print, their plain attributes, and the shapes of their weights.

    A number that says so by its name and rises by one from block to block says nothing: transformers have it for their
    caches.
    """
    attributes = [_attributes(layer) for layer in layers]
    numbered: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for at, own in enumerate(attributes):
        for name, value in own.items():
            is_place = type(value) is int and _PLACE.search(name[1])
            numbered[name].append(value - at if is_place else None)
    places = {
        name for name, starts in numbered.items() if len(starts) > 1 and None not in starts and len({*starts}) == 1
    }
    return [
        (
            repr(layer),
            repr([(name, value) for name, value in own.items() if name not in places]),
            tuple(tuple(value.shape) for value in layer.state_dict().values()) if layer is not None else (),
        )
        for layer, own in zip(layers, attributes, strict=True)
    ]


def _attributes(layer: nn.Module | None) -> dict[tuple[str, str], Any]:
    """The plain attributes of a layer and of those inside it."""
    named = layer.named_modules() if layer is not None else ()
    return {(path, name): value for path, each in named for name, value in vars(each).items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    """Whether it is a number, a truth value, a text, or a sequence of such."""
    return isinstance(value, (int, float, str)) or (isinstance(value, (tuple, list)) and all(map(_is_plain, value)))


def _repeats(kinds: Sequence[Kind]) -> Iterator[tuple[int, int, int]]:
    """Runs of alike groups that hold weights: (start, length of a group, how many)."""
    start = 0
    while start < len(kinds):
        for period in range(1, (len(kinds) - start) // 2 + 1):
            group = kinds[start : start + period]
            times = next(i for i in count(1) if kinds[start + i * period : start + (i + 1) * period] != group)
            if times > 1 and any(shapes for *_, shapes in group):
                yield start, period, times
                start += period * times - 1
                break
        start += 1


def _spread(times: int, depth: float) -> set[int]:
    """Which of `times` blocks stay: at least one, the first of each stretch of equal length."""
    kept = max(1, math.ceil(times * depth))
    return {index * times // kept for index in range(kept)}


def _without(module: nn.Module, path: str, gone: Sequence[int], tensors: dict[str, Any]) -> nn.Module:
    """A copy without these children of a container, or the module itself when the rest would not answer alike."""
    smaller = copy.deepcopy(module)
    container: Any = smaller.get_submodule(path)
    for position in sorted(gone, reverse=True):
        del container[position]
    return smaller if _answers_alike(smaller, module, tensors) else module


def _recurrent(module: nn.Module, depth: float) -> list[tuple[str, int]]:
    """The LSTM, GRU and RNN layers within a module that can lose depth, with the depth they keep."""
    from torch import nn

    layers = [(path, layer) for path, layer in module.named_modules() if path and isinstance(layer, nn.RNNBase)]
    kept = [(path, max(1, math.ceil(layer.num_layers * depth)), layer.num_layers) for path, layer in layers]
    return [(path, left) for path, left, before in kept if left < before]


def _with_layers(module: nn.Module, path: str, layers: int, tensors: dict[str, Any]) -> nn.Module:
    """A copy whose recurrent layer at `path` has its first `layers` layers only; the module itself if that fails."""
    from torch import nn

    smaller = copy.deepcopy(module)
    old: Any = smaller.get_submodule(path)
    options = {name: getattr(old, name) for name in ("bias", "batch_first", "bidirectional")}
    options["dropout"] = old.dropout if layers > 1 else 0.0  # torch warns of dropout between layers that are not there
    if isinstance(old, nn.LSTM):
        new: Any = nn.LSTM(old.input_size, old.hidden_size, layers, proj_size=old.proj_size, **options)
    elif isinstance(old, nn.GRU):
        new = nn.GRU(old.input_size, old.hidden_size, layers, **options)
    else:
        new = nn.RNN(old.input_size, old.hidden_size, layers, nonlinearity=old.nonlinearity, **options)
    own = new.state_dict()
    new.load_state_dict({name: value for name, value in old.state_dict().items() if name in own})
    smaller.set_submodule(path, new.train(old.training))
    return smaller if _answers_alike(smaller, module, tensors) else module


def _answers_alike(smaller: nn.Module, module: nn.Module, tensors: dict[str, Any]) -> bool:
    """Whether the smaller module runs and gives answers of the same shapes."""
    shapes = _shapes(smaller, tensors)
    return shapes is not None and shapes == _shapes(module, tensors)


def _shapes(module: nn.Module, tensors: dict[str, Any]) -> list[tuple[int, ...]] | None:
    """The shapes of all answers; None for a module that does not run."""
    import torch

    try:
        with torch.no_grad():
            answers = tensors_of(module(*(tensor.clone() for tensor in tensors.values())))
            return [tuple(answer.shape) for answer in answers]
    except Exception:  # a module that counts on its blocks fails in its own way
        return None
