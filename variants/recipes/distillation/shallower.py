"""A shallower student: of the blocks that a network repeats, only some are left.

Rules of this file: blocks are repeated where a Sequential or a ModuleList holds alike ones, one after another or in
alike groups, and each answers in the shape that it is given; a recurrent layer repeats itself `num_layers` times. What
does not run without them, keeps them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    import torch
    from torch import nn


def shallower(module: nn.Module, tensors: dict[str, Any], depth: float) -> nn.Module:
    """A copy with `depth` of each run of repeated blocks, evenly spread, the first always among them.

    Blocks keep their weights. `tensors` are example inputs. Raises RecipeRejected when no block can go.
    """
    changed = module
    removable = list(_removable(module, "", depth, _shapes_through(module, tensors)))
    for path, gone in reversed(removable):  # from the back: removal renumbers what follows
        changed = _without(changed, path, gone, tensors)
    for path, layers in _recurrent(changed, depth):
        changed = _with_layers(changed, path, layers, tensors)
    if changed is module:
        raise RecipeRejected(
            "it has no repeated blocks that could go at this `depth`; for a smaller student say `student: narrower`"
        )
    return changed


Passing = Mapping[str, tuple["torch.Size", "torch.Size"]]
"""What goes in and out of each layer that runs, by its path."""


def _shapes_through(module: nn.Module, tensors: dict[str, Any]) -> Passing:
    """The shapes of each layer's first input and first answer."""
    import torch

    found: dict[str, tuple[torch.Size, torch.Size]] = {}

    def listener(path: str) -> Any:
        def note(_layer: nn.Module, inputs: Any, named: Any, answer: Any) -> None:
            given: Any = next(iter([*inputs, *named.values()]), None)
            gives: Any = next(iter(tensors_of(answer)), None)
            if isinstance(given, torch.Tensor) and isinstance(gives, torch.Tensor):
                found[path] = (given.shape, gives.shape)

        return note

    layers = list(module.named_modules())
    handles = [layer.register_forward_hook(listener(path), with_kwargs=True) for path, layer in layers]
    try:
        with torch.no_grad():
            module(*tensors.values())
    finally:
        for handle in handles:
            handle.remove()
    return found


def _removable(module: nn.Module, path: str, depth: float, passing: Passing) -> Iterator[tuple[str, list[int]]]:
    """The containers by path, with the positions of the children that go; inside a repeated block nothing goes."""
    from torch import nn

    children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
    repeated: set[int] = set()
    gone: list[int] = []
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        for start, period, times in _repeats(_kinds([child for _, child in children])):
            repeated.update(range(start, start + period * times))
            starts = [start + period * i for i in range(times) if i not in _spread(times, depth)]
            shapes = [(passing.get(children[at][0]), passing.get(children[at + period - 1][0])) for at in starts]
            if all(first and last and first[0] == last[1] for first, last in shapes):
                gone += [at + j for at in starts for j in range(period)]
    if gone:
        yield path, gone
    for position, (inner, child) in enumerate(children):
        if position not in repeated:
            yield from _removable(child, inner, depth, passing)


Kind = tuple[str, str, tuple[tuple[int, ...], ...]]


def _kinds(layers: Sequence[nn.Module]) -> list[Kind]:
    """What alike blocks have in common: how they print, their plain attributes, and the shapes of their weights.

    An attribute by which every block knows its own place says nothing: transformers have it for their caches.
    """
    attributes = [_attributes(layer) for layer in layers]
    places = {
        name
        for name in (attributes[0] if len(attributes) > 1 else {})
        if all(type(each.get(name)) is int and each[name] == at for at, each in enumerate(attributes))
    }
    return [
        (
            repr(layer),
            repr([(name, value) for name, value in own.items() if name not in places]),
            tuple(tuple(value.shape) for value in layer.state_dict().values()),
        )
        for layer, own in zip(layers, attributes, strict=True)
    ]


def _attributes(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """The plain attributes of a layer and of those inside it."""
    named = layer.named_modules()
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
    return smaller if _shapes(smaller, tensors) == _shapes(module, tensors) else module


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
    return smaller if _shapes(smaller, tensors) == _shapes(module, tensors) else module


def _shapes(module: nn.Module, tensors: dict[str, Any]) -> list[tuple[int, ...]] | None:
    """The shapes of all answers; None for a module that does not run."""
    import torch

    try:
        with torch.no_grad():
            return [tuple(answer.shape) for answer in tensors_of(module(*tensors.values()))]
    except Exception:  # a module that counts on its blocks fails in its own way
        return None
