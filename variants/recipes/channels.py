"""prune-channels: whole channels go, which makes a model really smaller and faster.

Rules of this file: the layers that produce the outputs keep their width; a pruned module is run, exported and compared
before anyone sees it; what cannot be pruned soundly is rejected with the reason.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from variants.model_config import Section
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training import finetune
from variants.repository import RepositoryError
from variants.source import example_tensors, export_graph, without_library_noise

if TYPE_CHECKING:
    import torch
    from torch import nn

_PRODUCTS = ("Addmm", "Mm", "Bmm", "Baddbmm", "Convolution", "Linear", "Matmul")


class PruneChannels(Section):
    """`sparsity` is the share of each layer's channels that goes; `recover` is how accuracy comes back."""

    sparsity: float = Field(0.5, gt=0, lt=1)
    recover: Literal["finetune", "none"] = "finetune"


def prune_channels(ingredients: Ingredients, parameters: PruneChannels) -> Product:
    """Remove the channels with the smallest L1 norm, with everything that depends on them, then fine-tune.

    Dependencies are followed by Torch-Pruning's graph (Fang et al., DepGraph, CVPR 2023).
    """
    import torch

    source = ingredients.source
    if source.module is None or ingredients.example is None:
        raise RecipeRejected(
            "removing channels needs a torch source (module and safetensors); for ONNX there is `pruned-unstructured`"
        )
    if parameters.recover == "finetune" and ingredients.training is None:
        raise RecipeRejected("recovering from pruning needs training data; add `training:` or say `recover: none`")
    torch.manual_seed(0)
    module = copy.deepcopy(source.module)
    tensors = example_tensors(source.module, ingredients.example.inputs, 2, batched=source.max_batch > 0)
    before = _count(module)
    _remove_channels(module, tensors, parameters.sparsity)
    facts: dict[str, object] = {"weights_before": before, "weights_after": _count(module)}
    if parameters.recover == "finetune":
        facts["finetune_epochs"] = finetune(module, source.module, ingredients)
    target = ingredients.work / "pruned.onnx"
    try:
        export_graph(module.eval(), ingredients.example.inputs, target, batched=source.max_batch > 0)
    except RepositoryError as error:
        raise RecipeRejected(f"the pruned module cannot be exported: {error}") from error
    return Product({"model.onnx": target}, facts=facts, module=module)


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _remove_channels(module: nn.Module, tensors: dict[str, Any], sparsity: float) -> None:
    """Prune in place. Raises RecipeRejected when the result does not run, changes its outputs or is no smaller."""
    import torch

    before, shapes = _count(module), [value.shape for value in _leaves(module(*tensors.values()))]
    ignored = _output_layers(module, tensors)
    try:
        with without_library_noise():
            import torch_pruning

            torch_pruning.pruner.MagnitudePruner(
                module,
                tuple(tensors.values()),
                importance=torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=sparsity,
                ignored_layers=ignored,
            ).step()
        with torch.no_grad():
            pruned_shapes = [value.shape for value in _leaves(module(*tensors.values()))]
    except Exception as error:  # a module that hard-codes its widths fails in its own way
        why = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise RecipeRejected(f"its channels cannot be removed soundly ({why})") from error
    if pruned_shapes != shapes:
        raise RecipeRejected("pruning would change the shape of an output")
    if _count(module) >= before:
        raise RecipeRejected("no channel could be removed")


def _leaves(answer: Any) -> list[torch.Tensor]:
    """The tensors a module returned."""
    if isinstance(answer, dict):
        return list(answer.values())
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]


def _output_layers(module: nn.Module, tensors: dict[str, Any]) -> list[nn.Module]:
    """The layers whose channels are the outputs': the first weighted ones met from each output backwards."""
    owners = {id(p): layer for layer in module.modules() for p in layer.parameters(recurse=False)}
    found: list[nn.Module] = []
    for output in _leaves(module(*tensors.values())):
        found += [owners[id(p)] for p in _nearest_weights(output.grad_fn) if id(p) in owners]
    return list(dict.fromkeys(found))


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
