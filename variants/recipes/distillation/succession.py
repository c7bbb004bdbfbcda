"""Which layers of a network follow one another, as far as running it on real samples shows.

Rules of this file: nothing is changed; what cannot be shown is not so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class Succession:
    """Which layers of a module are links of one chain: each answers in the shape it is given, and the next needs it."""

    def __init__(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        self.paths = {layer: path for path, layer in module.named_modules()}
        self._module, self._tensors = module, tensors
        self._shapes = self._listened(list(self.paths), _shapes_of)

    def joins(self, groups: Sequence[Sequence[nn.Module]]) -> bool:
        """Whether groups of layers are links of one chain, so that it is whole without some of them."""
        ends = [(self._shapes.get(group[0]), self._shapes.get(group[-1])) for group in groups]
        if not all(first and last and first[0] == last[1] for first, last in ends):
            return False
        handle = groups[0][-1].register_forward_hook(_spoilt)
        try:
            spoilt = self._listened([group[0] for group in groups[1:]], _is_spoilt)
        except Exception:  # someone's own code may check what it is given
            return False
        finally:
            handle.remove()
        return all(spoilt.get(group[0], False) for group in groups[1:])

    def _listened(self, layers: Sequence[nn.Module], note: Callable[[Any, Any], Any]) -> dict[nn.Module, Any]:
        """What `note` says of each layer's first input and first answer, in one run."""
        import torch

        found: dict[nn.Module, Any] = {}

        def hear(layer: nn.Module, inputs: Any, named: Any, answer: Any) -> None:
            given: Any = next(iter([*inputs, *named.values()]), None)
            gives: Any = next(iter(tensors_of(answer)), None)
            if isinstance(given, torch.Tensor) and isinstance(gives, torch.Tensor):
                found[layer] = note(given, gives)

        handles = [layer.register_forward_hook(hear, with_kwargs=True) for layer in layers]
        try:
            with torch.no_grad():
                self._module(*(tensor.clone() for tensor in self._tensors.values()))
        finally:
            for handle in handles:
                handle.remove()
        return found


def _shapes_of(given: torch.Tensor, gives: torch.Tensor) -> tuple[torch.Size, torch.Size]:
    return given.shape, gives.shape


def _is_spoilt(given: torch.Tensor, _gives: torch.Tensor) -> bool:
    return bool(given.isnan().any())


def _spoilt(_layer: nn.Module, _inputs: Any, answer: Any) -> Any:
    """An answer of nothing but NaN, which whatever depends on it shows."""
    import torch

    if isinstance(answer, torch.Tensor):
        return torch.full_like(answer, torch.nan) if answer.is_floating_point() else answer
    return type(answer)(_spoilt(_layer, _inputs, each) for each in answer) if isinstance(answer, tuple) else answer
