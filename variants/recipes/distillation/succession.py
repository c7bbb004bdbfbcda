"""Which layers of a network follow one another, as far as running a copy of it on real samples shows.

Rules of this file: what cannot be shown is not so.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from variants.recipes.training.fit import seeded, tensors_of

if TYPE_CHECKING:
    import torch
    from torch import nn


class Succession:
    """Which layers of a module are links of one chain: each answers in the shape it is given, and the next needs it."""

    def __init__(self, module: nn.Module, tensors: dict[str, Any]) -> None:
        from torch import nn

        self.paths = {layer: path for path, layer in module.named_modules()}
        self._copy, self._tensors = copy.deepcopy(module), tensors
        for layer in self._copy.modules():
            if isinstance(layer, nn.TransformerEncoder):
                layer.use_nested_tensor = False  # nested tensors have no shape
        calls = self._first_calls(self.paths.values())
        self._shapes = {path: (given.shape, gives.shape) for path, (given, gives) in calls.items()}

    def joins(self, groups: Sequence[Sequence[nn.Module]]) -> bool:
        """Whether groups of layers are links of one chain, so that it is whole without some of them."""
        ends = [(self.paths[group[0]], self.paths[group[-1]]) for group in groups]
        shapes = [(self._shapes.get(first), self._shapes.get(last)) for first, last in ends]
        if not all(first and last and first[0] == last[1] for first, last in shapes):
            return False
        return all(last == first or self._needs(first, last) for (_, last), (first, _) in pairwise(ends))

    def _needs(self, layer: str, other: str) -> bool:
        """Whether a layer is given something else once another one's answer is disturbed."""
        usual = self._first_calls([layer])
        handle = self._copy.get_submodule(other).register_forward_hook(lambda *call: _disturbed(call[-1]))
        try:
            disturbed = self._first_calls([layer])
        except Exception:  # someone's own code may check what it is given
            return False
        finally:
            handle.remove()
        return layer in disturbed and not _is_same(usual[layer][0], disturbed[layer][0])

    def _first_calls(self, paths: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """What each layer is given and answers at its first call: of several inputs the one in the answer's form."""
        import torch

        found: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

        def listener(path: str) -> Any:
            def hear(_layer: nn.Module, inputs: Any, named: Any, answer: Any) -> None:
                gives: Any = next(iter(tensors_of(answer)), None)
                given = [value for value in (*inputs, *named.values()) if isinstance(value, torch.Tensor)]
                if isinstance(gives, torch.Tensor) and given and path not in found:
                    fitting = (v for v in given if (v.shape, v.dtype) == (gives.shape, gives.dtype))
                    found[path] = next(fitting, given[0]).clone(), gives

            return hear

        layers = [(self._copy.get_submodule(path), path) for path in paths]
        handles = [layer.register_forward_hook(listener(path), with_kwargs=True) for layer, path in layers]
        try:
            with torch.no_grad(), seeded():
                self._copy(*(tensor.clone() for tensor in self._tensors.values()))
        finally:
            for handle in handles:
                handle.remove()
        return found


def _disturbed(answer: Any) -> Any:
    """An answer of the same form with noise in its floating-point tensors; noise passes where NaN would be replaced."""
    import torch
    from torch.utils import _pytree

    def disturb(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value + torch.randn_like(value) * (1 + value.abs().nan_to_num().amax()) if is_float else value

    with seeded():
        return _pytree.tree_map(disturb, answer)


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one.nan_to_num() == other.nan_to_num()).all())
