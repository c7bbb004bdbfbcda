"""A shallower student: of the blocks that a network repeats, only some are left.

Rules of this file: blocks are repeated where a Sequential or a ModuleList holds alike ones, one after another or in
alike groups; a recurrent layer repeats itself `num_layers` times. What does not run without them, keeps them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    from torch import nn


def shallower(module: nn.Module, tensors: dict[str, Any], depth: float) -> nn.Module:
    """A copy with `depth` of each run of repeated blocks, evenly spread, the first always among them.

    Blocks keep their weights. `tensors` are example inputs. Raises RecipeRejected when no block can go.
    """
    changed = module
    for path, gone in reversed(list(_removable(module, "", depth))):  # from the back: removal renumbers what follows
        changed = _without(changed, path, gone, tensors)
    for path, layers in _recurrent(changed, depth):
        changed = _with_layers(changed, path, layers, tensors)
    if changed is module:
        raise RecipeRejected(
            "it has no repeated blocks that could go at this `depth`; for a smaller student say `student: narrower`"
        )
    return changed


def _removable(module: nn.Module, path: str, depth: float) -> Iterator[tuple[str, list[int]]]:
    """The containers by path, with the positions of the children that go; inside a repeated block nothing goes."""
    from torch import nn

    children = list(module.named_children())
    repeated: set[int] = set()
    gone: list[int] = []
    if isinstance(module, (nn.Sequential, nn.ModuleList)):
        for start, period, times in _repeats([_kind(child) for _, child in children]):
            repeated.update(range(start, start + period * times))
            kept = _spread(times, depth)
            gone += [start + period * i + j for i in range(times) if i not in kept for j in range(period)]
    if gone:
        yield path, gone
    for position, (name, child) in enumerate(children):
        if position not in repeated:
            yield from _removable(child, f"{path}.{name}" if path else name, depth)


def _kind(layer: nn.Module) -> tuple[str, tuple[tuple[int, ...], ...]]:
    """What two alike blocks have in common: all but the weights' values."""
    return repr(layer), tuple(tuple(value.shape) for value in layer.state_dict().values())


def _repeats(kinds: Sequence[tuple[str, tuple[tuple[int, ...], ...]]]) -> Iterator[tuple[int, int, int]]:
    """Runs of alike groups that hold weights: (start, length of a group, how many)."""
    start = 0
    while start < len(kinds):
        for period in range(1, (len(kinds) - start) // 2 + 1):
            group = kinds[start : start + period]
            times = next(i for i in count(1) if kinds[start + i * period : start + (i + 1) * period] != group)
            if times > 1 and any(shapes for _, shapes in group):
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
