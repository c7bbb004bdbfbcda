"""prune-unstructured: single weights become zero, which compresses well and makes nothing faster.

Rules of this file: zeros save nothing in dense kernels, so the card speaks of sparsity and compressed size only.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper
from pydantic import Field

from variants.model_config import Section
from variants.recipes.graph import finished, folded
from variants.recipes.recipe import Ingredients, Product, RecipeRejected

_WEIGHTED_OPERATORS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


class PruneUnstructured(Section):
    """`sparsity` is the share of all weights, the smallest ones, that become zero."""

    sparsity: float = Field(0.5, gt=0, lt=1)


def prune_unstructured(ingredients: Ingredients, parameters: PruneUnstructured) -> Product:
    """Set the weights that are smallest over the whole model to zero. The artefact keeps its size and speed."""
    model = onnx.load(folded(ingredients.source.graph, ingredients.work))
    named = {tensor.name: tensor for tensor in model.graph.initializer}
    names = {
        node.input[1] for node in model.graph.node if node.op_type in _WEIGHTED_OPERATORS and node.input[1] in named
    }
    weights = {name: numpy_helper.to_array(named[name]) for name in sorted(names) if len(named[name].dims) > 1}
    if not weights:
        raise RecipeRejected("no constant weights to prune")
    magnitudes = np.concatenate([np.abs(weight).reshape(-1) for weight in weights.values()])
    rank = int(parameters.sparsity * len(magnitudes))
    threshold = np.partition(magnitudes, rank)[rank]
    zeros = 0
    for name, weight in weights.items():
        kept = np.where(np.abs(weight) < threshold, np.zeros_like(weight), weight)
        zeros += int(np.sum(kept == 0))
        named[name].CopyFrom(numpy_helper.from_array(kept, name))
    target = finished(ingredients, model, "pruned-unstructured.onnx")
    facts = {"zero_share": round(zeros / len(magnitudes), 4), "faster_or_smaller_file": False}
    return Product({"model.onnx": target}, facts=facts)
