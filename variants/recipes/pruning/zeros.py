"""Zeros that stay: what the recipes share that mask a module's weights with `torch.nn.utils.prune`.

Rules of this file: a masked weight is zero in every forward pass of its recovery and in the artefact; zeros save
nothing in dense kernels, so no speed is claimed, and what the card says of them is counted in what was made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from variants.data import Array
from variants.export import example_tensors, export_graph
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import Losses, as_finding, finetune
from variants.repository import RepositoryError

if TYPE_CHECKING:
    import torch
    from torch import nn

Recover = Literal["none", "finetune", "distill"]
"""How accuracy comes back: not at all, from the training data's targets, or from fp32's answers too."""

Weight = tuple["nn.Module", str]
"""A layer and the name of one of its weights."""

Mask = Callable[["nn.Module", Mapping[str, "torch.Tensor"]], list[Weight]]
"""Puts torch's masks into a module, of which it gets example inputs too; returns what it masked."""


def mask_module(ingredients: Ingredients, recover: Recover, mask: Mask) -> Product:
    """Mask a copy of the source's module for good, let it recover under its masks, and export it.

    Raises RecipeRejected without a module, without data to recover with, or where nothing was masked.
    """
    source, example = ingredients.source, ingredients.example
    if source.module is None or example is None:
        raise RecipeRejected(
            "masking channels and recovering need a torch source (module and safetensors); for ONNX there is "
            "`prune-unstructured` with `recover: none`"
        )
    if recover != "none" and ingredients.training is None:
        raise RecipeRejected("recovering from pruning needs training data; add `training:` or say `recover: none`")
    module, batched = copy.deepcopy(source.module), source.max_batch > 0
    masks = _made_permanent(mask(module, example_tensors(module, example.inputs, 2, batched=batched)))
    if not masks:
        raise RecipeRejected("it has no layer of a known type with weights to mask")
    facts: dict[str, object] = {}
    losses: Losses = []
    if recover != "none":
        teacher = source.module if ingredients.teacher is None else ingredients.teacher
        with _held(module, masks):
            losses = finetune(module, teacher, ingredients, recover=recover)
        facts["epochs"] = len(losses)
    target = ingredients.work / "masked.onnx"
    try:
        export_graph(module.eval(), example.inputs, target, batched=batched, axes=source.axes)
    except RepositoryError as error:
        raise RecipeRejected(f"the masked module cannot be exported: {error}") from error
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    shares, findings = zero_shares({names[id(weight)]: weight.detach().numpy() for weight, _ in masks})
    findings |= as_finding(losses) if losses else {}
    return Product({"model.onnx": target}, facts=facts | shares, findings=findings, module=module)


def shared_beyond(module: nn.Module, layers: Collection[nn.Module]) -> set[int]:
    """The ids of parameters that a layer other than these holds too: an embedding tied to the layer of the outputs."""
    others = [layer for layer in module.modules() if layer not in layers]
    return {id(weight) for layer in others for weight in layer.parameters(recurse=False)}


def zero_shares(weights: Mapping[str, Array]) -> tuple[dict[str, object], dict[str, object]]:
    """Facts and findings: the share of zeros among all of these weights, and in each one by its name."""
    zeros = {name: int(np.sum(weight == 0)) for name, weight in weights.items()}
    share = sum(zeros.values()) / sum(weight.size for weight in weights.values())
    by_layer = {name: round(count / weights[name].size, 4) for name, count in zeros.items()}
    facts: dict[str, object] = {"zero_share": round(share, 4), "faster_or_smaller_file": False}
    return facts, {"zero_share_by_layer": by_layer}


def _made_permanent(masked: list[Weight]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Turn torch's masks into plain zeros; returns the parameters, which are their layers' own again, with masks."""
    from torch.nn.utils import prune

    masks = []
    for layer, name in masked:
        mask = layer.get_buffer(f"{name}_mask")
        prune.remove(layer, name)
        masks.append((layer.get_parameter(name), mask))
    return masks


@contextmanager
def _held(module: nn.Module, masks: list[tuple[nn.Parameter, torch.Tensor]]) -> Iterator[None]:
    """Set masked weights back to zero before every forward pass and at the end.

    Torch's own masks would do so only in layers that are called: attention reads its output projection's weight without
    a call. And recurrent layers want their weights to be parameters.
    """
    import torch

    def set_to_zero(*_: Any) -> None:
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask.to(weight.device))

    handle = module.register_forward_pre_hook(set_to_zero)
    try:
        yield
    finally:
        handle.remove()
        set_to_zero()
