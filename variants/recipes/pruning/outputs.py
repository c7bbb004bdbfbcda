"""Which layers of a torch module produce its outputs: their channels are what a client reads, so they must all stay.

Rules of this file: where it cannot be told, nothing is; a layer too many may be named, never one too few.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    from torch import nn

_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Matmul", "Rnn")


def output_layers(module: nn.Module, tensors: Mapping[str, Any]) -> list[nn.Module]:
    """The first layers with weights that are met from each output backwards; a residual sum has several.

    `tensors` are an example of the inputs in the order of `forward`. Frozen weights are met like any other. Raises
    RecipeRejected if there are none on the way to an output, as behind an argmax or without gradients.
    """
    owners = {id(p): layer for layer in module.modules() for p in layer.parameters(recurse=False)}
    mixing = {key for key, layer in owners.items() if isinstance(layer, mixing_layers())}
    found: list[nn.Module] = []
    with _all_learning(module):
        for number, output in enumerate(tensors_of(module(*tensors.values()))):
            layers = [owners[id(p)] for p in _nearest_weights(output.grad_fn, mixing) if id(p) in owners]
            if not layers:
                raise RecipeRejected(
                    f"which layers make output {number} cannot be told: no gradient leads back from it; answer with "
                    "what an argmax is taken of, and without `torch.no_grad`"
                )
            found += layers
    return list(dict.fromkeys(found))


def mixing_layers() -> tuple[type[nn.Module], ...]:
    """The types of layers whose outputs each depend on all inputs, so that channels end there."""
    from torch import nn

    return (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention,
    )  # fmt: skip


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


def _nearest_weights(start: Any, mixing: Collection[int]) -> Iterator[Any]:
    """Walk autograd's graph back from an output, not beyond the first product with a layer's weights on each path."""
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
        weights = [child for child in following if is_product and _leads_to_weight(child, mixing)]
        waiting += weights or following  # attention's products have none: channels pass through


def _leads_to_weight(node: Any, mixing: Collection[int]) -> bool:
    """Whether a product's operand is one of these parameters, at most transposed or expanded on its way."""
    for _ in range(3):
        if node is None or hasattr(node, "variable"):
            return node is not None and id(node.variable) in mixing
        children = [child for child, _ in node.next_functions]
        if len(children) != 1:
            return False
        node = children[0]
    return False
