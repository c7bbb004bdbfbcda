"""prune-unstructured: single weights become zero, which compresses well and makes nothing faster.

Rules of this file: a torch source is masked with `torch.nn.utils.prune` and may recover; an ONNX graph gets the same
zeros without torch. Only weights of products, convolutions and recurrent layers go: no embedding, norm or bias, and no
weight that a module computes from others, where zeros would be none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import Field

from variants.data import Array
from variants.model_config import Section
from variants.recipes.graph import finished, folded
from variants.recipes.pruning.outputs import mixing_layers
from variants.recipes.pruning.zeros import Recover, Weight, mask_module, shared_beyond, zero_shares
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import seeded
from variants.runtimes.onnx_signature import nested_graphs

if TYPE_CHECKING:
    from torch import nn

_WEIGHT_INPUTS = dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (1,)) | dict.fromkeys(
    ("LSTM", "GRU", "RNN"), (1, 2)
)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)

_PLAIN = re.compile(r"weight(_(ih|hh|hr)(_l\d+(_reverse)?)?)?|(in|q|k|v)_proj_weight")
"""What torch's layers call the weights that they multiply with."""

Method = Literal["global-l1", "l1", "random"]


class PruneUnstructured(Section):
    """`sparsity` is the share of weights that become zero.

    `method` chooses them: the smallest of the whole model, the smallest of each layer, or any of each layer (seeded).
    """

    sparsity: float = Field(0.5, gt=0, lt=1)
    method: Method = "global-l1"
    recover: Recover = "none"


def prune_unstructured(ingredients: Ingredients, parameters: PruneUnstructured) -> Product:
    """Set single weights to zero, and keep them so through recovery. The artefact keeps its size and speed.

    Global magnitudes over the whole model prune large layers harder than small ones (Han et al., NeurIPS 2015).
    """
    if ingredients.source.module is None and parameters.recover == "none":
        return _prune_graph(ingredients, parameters)
    product = mask_module(ingredients, parameters.recover, lambda module, _: _masked(module, parameters))
    computed = _computed(ingredients.source.module)
    return replace(product, findings={**product.findings, "computed_weights_kept": computed}) if computed else product


def _masked(module: nn.Module, parameters: PruneUnstructured) -> list[Weight]:
    """Mask the weights of the known layers; returns them. Raises RecipeRejected if all are computed from others."""
    from torch.nn.utils import prune

    weights, computed = prunable(module), _computed(module)
    if computed and not weights:
        raise RecipeRejected(
            f"the weights of {', '.join(computed[:5])} are computed from others, as by weight_norm, and there are no "
            "plain ones; make them plain first (`parametrize.remove_parametrizations`)"
        )
    if parameters.method == "global-l1" and weights:
        prune.global_unstructured(weights, prune.L1Unstructured, amount=parameters.sparsity)
        return weights
    mask = prune.l1_unstructured if parameters.method == "l1" else prune.random_unstructured
    with seeded():
        for layer, name in weights:
            mask(layer, name, amount=parameters.sparsity)
    return weights


def prunable(module: nn.Module) -> list[Weight]:
    """The weights of the known layers, those that another kind of layer shares excepted; each is there once."""
    known = [layer for layer in module.modules() if isinstance(layer, mixing_layers())]
    found: dict[int, Weight] = {}
    for layer in known:
        for name, weight in layer.named_parameters(recurse=False):
            if _PLAIN.fullmatch(name):
                found.setdefault(id(weight), (layer, name))
    shared = shared_beyond(module, known)
    return [weight for key, weight in found.items() if key not in shared]


def _computed(module: nn.Module | None) -> list[str]:
    """The names of the known layers whose weights, or some of them, are computed from other parameters."""
    known = {} if module is None else {n: p for n, p in module.named_modules() if isinstance(p, mixing_layers())}
    names = {name: [own for own, _ in layer.named_parameters(recurse=False)] for name, layer in known.items()}
    return [
        name
        for name, layer in known.items()
        if any("weight" in own and not _PLAIN.fullmatch(own) for own in names[name])
        or any(_PLAIN.fullmatch(own) for own in getattr(layer, "parametrizations", {}))
    ]


def _prune_graph(ingredients: Ingredients, parameters: PruneUnstructured) -> Product:
    model = onnx.load(folded(ingredients.source.graph, ingredients.work))
    named = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type in _FLOATS}
    names = sorted(_weight_names(model.graph) & set(named))
    weights = {name: numpy_helper.to_array(named[name]) for name in names if named[name].dims[1:]}
    if not weights:
        raise RecipeRejected("no constant weights to prune")
    kept = {name: np.where(zero, 0, weights[name]) for name, zero in _chosen(weights, parameters).items()}
    for name, weight in kept.items():
        named[name].CopyFrom(numpy_helper.from_array(weight.astype(weights[name].dtype), name))
    target = finished(ingredients, model, "pruned-unstructured.onnx")
    facts, findings = zero_shares(kept)
    return Product({"model.onnx": target}, facts=facts, findings=findings)


def _weight_names(graph: onnx.GraphProto) -> set[str]:
    """What layers read as their weights and nothing reads as anything else, such as an embedding."""
    weights, others = set[str](), {value.name for value in graph.output}
    for inner in nested_graphs(graph):
        for node in inner.node:
            slots = _WEIGHT_INPUTS.get(node.op_type, ())
            for at, name in enumerate(node.input):
                (weights if at in slots else others).add(name)
    return weights - others


def _chosen(weights: Mapping[str, Array], parameters: PruneUnstructured) -> dict[str, Array]:
    """By name, where a weight becomes zero."""
    generator = np.random.default_rng(0)
    is_random = parameters.method == "random"
    ranks = {name: generator.random(w.shape) if is_random else np.abs(w) for name, w in weights.items()}
    if parameters.method != "global-l1":
        return {name: _least(rank.reshape(-1), parameters.sparsity).reshape(rank.shape) for name, rank in ranks.items()}
    least = _least(np.concatenate([rank.reshape(-1) for rank in ranks.values()]), parameters.sparsity)
    ends = np.cumsum([rank.size for rank in ranks.values()])[:-1]
    parts = zip(ranks.items(), np.split(least, ends), strict=True)
    return {name: part.reshape(rank.shape) for (name, rank), part in parts}


def _least(ranks: Array, share: float) -> Array:
    """Which ones are the smallest `share` of all, to the nearest whole number; of equal ones, any."""
    count = round(share * len(ranks))
    least = np.zeros(len(ranks), np.bool_)
    if count:
        least[np.argpartition(ranks, count - 1)[:count]] = True
    return least
