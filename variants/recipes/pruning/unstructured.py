"""prune-unstructured: single weights become zero, which compresses well and makes nothing faster.

Rules of this file: a torch source is masked with `torch.nn.utils.prune` and may recover; an ONNX graph gets the same
zeros without torch. Only weights of products, convolutions and recurrent layers go: no embedding, norm or bias.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import Field

from variants.data import Array
from variants.model_config import Section
from variants.recipes.graph import finished, folded
from variants.recipes.pruning.zeros import Recover, Weight, mask_module, shared_beyond, zero_shares
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs

if TYPE_CHECKING:
    from torch import nn

_WEIGHT_INPUTS = dict.fromkeys(("Conv", "ConvTranspose", "Gemm", "MatMul"), (1,)) | dict.fromkeys(
    ("LSTM", "GRU", "RNN"), (1, 2)
)
_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16)

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
    return mask_module(ingredients, parameters.recover, lambda module, _: _masked(module, parameters))


def _masked(module: nn.Module, parameters: PruneUnstructured) -> list[Weight]:
    """Mask the weights of the known layers; returns them."""
    import torch
    from torch.nn.utils import prune

    torch.manual_seed(0)
    weights = _prunable(module)
    if parameters.method == "global-l1" and weights:
        prune.global_unstructured(weights, prune.L1Unstructured, amount=parameters.sparsity)
        return weights
    mask = prune.l1_unstructured if parameters.method == "l1" else prune.random_unstructured
    for layer, name in weights:
        mask(layer, name, amount=parameters.sparsity)
    return weights


def _prunable(module: nn.Module) -> list[Weight]:
    """The weights of the known layers, those that another kind of layer shares excepted; each is there once."""
    from torch import nn

    layers = (
        nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
        nn.RNNBase, nn.RNNCell, nn.LSTMCell, nn.GRUCell,
    )  # fmt: skip
    known = [layer for layer in module.modules() if isinstance(layer, (*layers, nn.MultiheadAttention))]
    found: dict[int, Weight] = {}
    for layer in known:
        for name, weight in layer.named_parameters(recurse=False):
            attention = isinstance(layer, nn.MultiheadAttention) and name.endswith("proj_weight")
            if attention or (isinstance(layer, layers) and name.startswith("weight")):
                found.setdefault(id(weight), (layer, name))
    shared = shared_beyond(module, known)
    return [weight for key, weight in found.items() if key not in shared]


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
