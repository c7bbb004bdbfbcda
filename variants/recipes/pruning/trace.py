"""Where a channel goes in a network: it is set to NaN, and the NaN shows in whatever depends on it.

Activations, residuals, concatenation, reshapes, gates and attention are simply run: a NaN passes through all of them,
into what is computed from it and nowhere else. Layers are not run but answer what they once answered, so that it ends
in the columns of the layers that take the channel.
"""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from variants.recipes.pruning.layers import Gone, Layer, Slots, describe

Answer = Callable[[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


class Tracer:
    """A module in eval mode and some inputs; `layers` are those it runs, whose slots begin at `first` among all.

    A layer that shares a parameter with another one is not among them, and keeps its width.
    """

    def __init__(self, module: nn.Module, tensors: Sequence[torch.Tensor]) -> None:
        self._module, self._tensors = module, tensors
        known = {name: layer for name, part in module.named_modules() if (layer := describe(part)) is not None}
        self._parts = {n: p for n, p in module.named_modules() if n in known or _keeps_weights(p)}
        self._answers: dict[str, list[Any]] = defaultdict(list)
        with self._answering(self._record):
            self._run()
        shared = {i for i, n in Counter(id(v) for p in self._parts.values() for v in p.parameters()).items() if n > 1}
        self.layers: dict[str, Layer] = {
            name: layer
            for name, layer in known.items()
            if self._answers[name] and not any(id(value) in shared for value in layer.module.parameters())
        }
        ends = np.cumsum([0, *(layer.outs + layer.ins for layer in self.layers.values())])
        self.first = dict(zip(self.layers, ends.tolist(), strict=False))
        self.total = int(ends[-1])

    def follow(self, channels: Mapping[str, Slots]) -> tuple[Gone, list[str]]:
        """The columns [total] that depend on these channels of layers, and what else does, in words."""
        seen, elsewhere = np.zeros(self.total, np.bool_), []
        turns: dict[str, int] = defaultdict(int)

        def answer(name: str, _forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            recorded = _copied(self._answers[name][turns[name]])  # what follows may change it in place
            turns[name] += 1
            layer, inputs = self.layers.get(name), _leaves((args, kwargs))
            if layer is not None and layer.ins:
                start, taken = self.first[name] + layer.outs, inputs.pop(0)
                seen[start : start + layer.ins] |= (
                    taken.isnan().movedim(layer.axis, 0).reshape(layer.ins, -1).any(1).numpy()
                )
            if any(bool(each.isnan().any()) for each in inputs):
                elsewhere.append(f"{type(self._parts[name]).__name__} {name!r}")
            return _poisoned(layer, recorded, channels[name]) if layer is not None and name in channels else recorded

        with self._answering(answer):
            outputs = self._run()
        if any(bool(output.isnan().any()) for output in outputs):
            elsewhere.append("an output")
        return seen, elsewhere

    def _record(self, name: str, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = forward(*args, **kwargs)
        self._answers[name].append(_copied(answer))
        return answer

    def _run(self) -> list[torch.Tensor]:
        with torch.no_grad(), _step_by_step():
            return _leaves(self._module(*(tensor.clone() for tensor in self._tensors)))

    @contextmanager
    def _answering(self, answer: Answer) -> Iterator[None]:
        """Have `answer(name, forward, args, kwargs)` in place of every part's own forward."""
        own = {name: vars(part)["forward"] for name, part in self._parts.items() if "forward" in vars(part)}
        try:
            for name, part in self._parts.items():
                part.forward = _bound(answer, name, part.forward)
            yield
        finally:
            for name, part in self._parts.items():
                vars(part).pop("forward", None)
                vars(part).update({"forward": own[name]} if name in own else {})


@contextmanager
def _step_by_step() -> Iterator[None]:
    """Attention by its definition: torch's fused kernels pass some NaNs over, and layers by."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _bound(answer: Answer, name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args, **kwargs: answer(name, forward, args, kwargs)


def _keeps_weights(part: nn.Module) -> bool:
    """Whether a module computes with weights of its own, which are unknown here: what it takes stays as it is."""
    if isinstance(part, nn.MultiheadAttention):
        return True
    if isinstance(part, nn.PReLU) and part.num_parameters == 1:  # one slope for all channels leaves them apart
        return False
    return not any(True for _ in part.children()) and any(True for _ in part.parameters(recurse=False))


def _leaves(value: Any) -> list[torch.Tensor]:
    """The tensors in what a module took or gave, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [leaf for part in parts for leaf in _leaves(part)]


def _copied(answer: Any) -> Any:
    if isinstance(answer, torch.Tensor):
        return answer.clone()
    if isinstance(answer, tuple):
        parts = map(_copied, answer)
        return type(answer)(*parts) if hasattr(answer, "_fields") else tuple(parts)  # a named one takes its fields
    return copy.deepcopy(answer)


def _poisoned(layer: Layer, answer: Any, channels: Slots) -> Any:
    """What a layer answered, in place with NaN in some channels."""
    if not layer.blocks:
        answer.movedim(layer.axis, -1)[..., torch.from_numpy(channels)] = torch.nan
        return answer
    output, states = answer
    units, last = len(layer.blocks[0]), output.shape[-1]
    for block, unit in zip(*np.divmod(channels, units), strict=True):
        for state in _leaves(states):
            state[block, ..., unit] = torch.nan
        position = (block - len(layer.blocks)) * units + last + unit
        if position >= 0:
            output[..., position] = torch.nan
    return output, states
