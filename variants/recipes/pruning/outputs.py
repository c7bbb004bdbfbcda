"""Which layers of a torch module produce its outputs: their channels are what a client reads, so they must all stay."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    from torch import nn

_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Matmul", "Rnn")


def output_layers(module: nn.Module, tensors: Mapping[str, Any]) -> list[nn.Module]:
    """The first layers with weights that are met from each output backwards; a residual sum has several.

    `tensors` are an example of the inputs in the order of `forward`. Frozen weights are met like any other.
    """
    owners = {id(p): layer for layer in module.modules() for p in layer.parameters(recurse=False)}
    found: list[nn.Module] = []
    with _all_learning(module):
        for output in tensors_of(module(*tensors.values())):
            found += [owners[id(p)] for p in _nearest_weights(output.grad_fn) if id(p) in owners]
    return list(dict.fromkeys(found))


@contextmanager
def _all_learning(module: nn.Module) -> Iterator[None]:
    """While open, autograd follows every weight, since its graph is where layers are looked for."""
    import torch

    frozen = [p for p in module.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _nearest_weights(start: Any) -> Iterator[Any]:
    """Walk autograd's graph back from an output, not beyond the first product on each path."""
    waiting, seen = [start], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
            continue
        following = [child for child, _ in node.next_functions]
        is_product = any(name in node.name() for name in _PRODUCTS)
        waiting += [child for child in following if not is_product or _leads_to_weight(child)]


def _leads_to_weight(node: Any) -> bool:
    """Whether a product's operand is a parameter, at most transposed or expanded on its way."""
    for _ in range(3):
        if node is None or hasattr(node, "variable"):
            return node is not None
        children = [child for child, _ in node.next_functions]
        if len(children) != 1:
            return False
        node = children[0]
    return False
