"""int8-static: weights and activations in bytes, with the activations' ranges observed on calibration data.

Rules of this file: weights are scaled per channel, because one scale per tensor destroys real models; a transformer's
sums, norms and softmax stay in floating point, because quantising them does too. Intermediate files stay in the
recipe's own folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from pydantic import Field

from variants.data import Samples, spread
from variants.model_config import nearest
from variants.recipes.graph import finished, folded
from variants.recipes.int8 import MATRIX_OPERATORS, Int8
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.source import without_library_noise

_IMAGE_OPERATORS = (
    "Conv", "Gemm", "MatMul", "Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Relu", "Clip",
)  # fmt: skip
_TRANSFORMER_SIGNS = {
    "Softmax",
    "LayerNormalization",
    "SimplifiedLayerNormalization",
    "Attention",
    "MultiHeadAttention",
}
_LEAST_OPSET = 13  # DequantizeLinear takes a scale per channel from here on


class QuantizeStatic(Int8):
    """`exclude` names nodes that stay in floating point."""

    exclude: list[str] = Field(default_factory=list)


def quantize_static(ingredients: Ingredients, parameters: QuantizeStatic) -> Product:
    """Quantise weights and activations with ranges observed on calibration data (min and max), as QDQ.

    Activation scales are constants, so a batch changes no answer. A transformer's sums, norms and softmax stay in
    floating point: quantising them collapses real models.
    """
    calibration = ingredients.calibration
    if calibration is None:
        raise RecipeRejected("static quantisation needs calibration data; add `calibration:` to model.yaml")
    reduce_range = parameters.reduces_range(ingredients.hardware)
    prepared = folded(ingredients.source.graph, ingredients.work, least_opset=_LEAST_OPSET)
    nodes = onnx.load(prepared).graph.node
    operators, names = {node.op_type for node in nodes}, {node.name for node in nodes}
    for unknown in sorted(set(parameters.exclude) - names):
        raise RecipeRejected(f"exclude: there is no node {unknown!r}; {nearest(unknown, names)}")
    is_transformer = bool(operators & _TRANSFORMER_SIGNS)
    quantised = ingredients.work / "quantised.onnx"
    most = min(ingredients.config.calibration.samples if ingredients.config.calibration else 256, len(calibration))
    batches = _CalibrationBatches(spread(calibration, min(most, 64) if ingredients.quick else most), ingredients)
    with without_library_noise():
        from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType
        from onnxruntime.quantization import quantize_static as ort_quantize_static

        ort_quantize_static(
            prepared,
            quantised,
            batches,
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(MATRIX_OPERATORS if is_transformer else _IMAGE_OPERATORS),
            per_channel=True,
            reduce_range=reduce_range,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=parameters.exclude,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": is_transformer},
        )
    model = onnx.load(quantised)
    target = finished(ingredients, model, "int8-static.onnx")
    layers = _quantised_layers(model.graph)
    if layers == 0:
        raise RecipeRejected(f"nothing to quantise statically among {', '.join(sorted(operators))}")
    facts = {"quantised_layers": layers, "calibration_samples": batches.samples, "reduce_range": reduce_range}
    return Product({"model.onnx": target}, precision="int8", facts=facts)


def _quantised_layers(graph: onnx.GraphProto) -> int:
    """How many weight-carrying operators read a dequantised weight."""
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    carriers = ("Conv", *MATRIX_OPERATORS)
    return sum(node.op_type in carriers and node.input[1] in dequantised for node in graph.node)


class _CalibrationBatches:
    """The calibration samples as the quantiser reads them: batch by batch, as the model takes them."""

    def __init__(self, samples: Samples, ingredients: Ingredients) -> None:
        self.samples = len(samples)
        self._iterator = self._batches(samples, min(ingredients.source.max_batch, 32))

    @staticmethod
    def _batches(samples: Samples, batch_size: int) -> Iterator[dict[str, Any]]:
        step = max(1, batch_size)
        for at in range(0, len(samples), step):
            rows = samples.inputs.items()
            yield {name: array[at : at + step] if batch_size else array[at, ...] for name, array in rows}

    def get_next(self) -> dict[str, Any] | None:
        """The next batch, None after the last."""
        return next(self._iterator, None)
