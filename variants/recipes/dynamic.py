"""int8-dynamic: constant weights in signed bytes per column, activations in unsigned bytes scaled at run time.

Rules of this file: every row of activations has its own scale, so that batch-mates change no answer; convolutions are
never quantised dynamically (their integer kernels are slower than fp32). Files stay in the recipe's folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from variants.recipes.graph import at_least_opset, finished, folded
from variants.recipes.int8 import MATRIX_OPERATORS, Int8
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs
from variants.source import without_library_noise

_RECURRENT = ("LSTM",)
_LEAST_OPSET = 18  # ReduceMax takes its axes as an input from here on


class QuantizeDynamic(Int8):
    """Nothing beyond the range of the weights."""


def quantize_dynamic(ingredients: Ingredients, parameters: QuantizeDynamic) -> Product:
    """Quantise products with constant weights; every row of activations gets its own scale, at run time.

    A scale per row, unlike ONNX Runtime's one per tensor, keeps a sample's answer the same to the bit whoever shares
    its batch. LSTM layers use ONNX Runtime's operator, which has one scale per tensor: the card says so.
    """
    reduce_range = parameters.reduces_range(ingredients.hardware)
    graph, recurrent = _quantise_recurrent(ingredients, reduce_range=reduce_range)
    model = at_least_opset(onnx.load(graph), _LEAST_OPSET)
    products = _rewrite_products(model.graph, 63 if reduce_range else 127)
    if products + recurrent == 0:
        raise RecipeRejected("nothing to quantise: no MatMul, Gemm or LSTM with constant weights")
    target = finished(ingredients, model, "int8-dynamic.onnx")
    facts = {
        "quantised_layers": products + recurrent,
        "batch_invariant": recurrent == 0,
        "reduce_range": reduce_range,
    }
    return Product({"model.onnx": target}, precision="int8", facts=facts)


def _rewrite_products(graph: onnx.GraphProto, limit: int) -> int:
    """Replace every MatMul and Gemm that has a constant matrix; returns how many."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[onnx.NodeProto] = []
    count = 0
    for node in graph.node:
        replacement = list(_integer_product(graph, node, constants, limit, count)) if _fits(node, constants) else [node]
        count += replacement[0] is not node
        nodes.extend(replacement)
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused_weights(graph)
    return count


def _drop_unused_weights(graph: onnx.GraphProto) -> None:
    """Remove the weights that nothing reads any more, a branch or loop body included, and their listing as inputs."""
    inner = list(nested_graphs(graph))
    used = {name for each in inner for node in each.node for name in node.input}
    used |= {value.name for each in inner for value in each.output}
    unused = {tensor.name for tensor in graph.initializer} - used
    for field in (graph.initializer, graph.input):
        kept = [value for value in field if value.name not in unused]
        del field[:]
        field.extend(kept)


def _fits(node: onnx.NodeProto, constants: dict[str, Any]) -> bool:
    """Whether the node is a plain product of activations [..., k] with a constant float matrix."""
    if node.op_type not in MATRIX_OPERATORS or node.input[1] not in constants or node.input[0] in constants:
        return False
    weight = constants[node.input[1]]
    is_float_matrix = len(weight.dims) == 2 and weight.data_type == onnx.TensorProto.FLOAT
    return is_float_matrix and not _attribute(node, "transA", 0)


def _attribute(node: onnx.NodeProto, name: str, default: float) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _integer_product(
    graph: onnx.GraphProto, node: onnx.NodeProto, constants: dict[str, Any], limit: int, index: int
) -> Iterator[onnx.NodeProto]:
    """The nodes of one product: row scales, U8 activations, MatMulInteger, both scales back, bias."""
    weight = numpy_helper.to_array(constants[node.input[1]]).astype(np.float64) * _attribute(node, "alpha", 1.0)
    weight = weight.T if _attribute(node, "transB", 0) else weight
    column_scale = np.maximum(np.abs(weight).max(axis=0), 1e-12) / limit
    stem = f"int8_{index}"

    def constant(name: str, value: Any, dtype: type) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value, dtype), f"{stem}_{name}"))
        return f"{stem}_{name}"

    def step(operator: str, inputs: list[str], name: str, **attributes: int) -> onnx.NodeProto:
        return helper.make_node(operator, inputs, [f"{stem}_{name}"], f"{stem}_{name}", **attributes)

    x, zero_point = node.input[0], constant("zero_point", 128, np.uint8)
    yield step("Abs", [x], "magnitude")
    yield step("ReduceMax", [f"{stem}_magnitude", constant("last_axis", [-1], np.int64)], "largest", keepdims=1)
    yield step("Div", [f"{stem}_largest", constant("levels", 127, np.float32)], "rough_scale")
    yield step("Max", [f"{stem}_rough_scale", constant("tiny", 1e-12, np.float32)], "row_scale")  # a row of zeros
    yield step("Div", [x, f"{stem}_row_scale"], "unit")
    yield step("QuantizeLinear", [f"{stem}_unit", constant("one", 1.0, np.float32), zero_point], "bytes")
    integers = constant("weight", np.clip(np.rint(weight / column_scale), -limit, limit), np.int8)
    yield step("MatMulInteger", [f"{stem}_bytes", integers, zero_point], "sums")
    yield step("Cast", [f"{stem}_sums"], "product", to=onnx.TensorProto.FLOAT)
    yield step("Mul", [f"{stem}_product", f"{stem}_row_scale"], "by_row")
    scales = constant("column_scale", column_scale, np.float32)
    bias = node.input[2] if len(node.input) > 2 and node.input[2] else None
    if bias is None:
        yield helper.make_node("Mul", [f"{stem}_by_row", scales], [node.output[0]], stem)
        return
    yield step("Mul", [f"{stem}_by_row", scales], "by_column")
    if (beta := _attribute(node, "beta", 1.0)) != 1.0:
        yield step("Mul", [bias, constant("beta", beta, np.float32)], "bias")
        bias = f"{stem}_bias"
    yield helper.make_node("Add", [f"{stem}_by_column", bias], [node.output[0]], stem)


def _quantise_recurrent(ingredients: Ingredients, *, reduce_range: bool) -> tuple[Path, int]:
    """The folded graph with its LSTM layers in ONNX Runtime's own dynamic quantisation, and how many there are."""
    graph = folded(ingredients.source.graph, ingredients.work)
    if not any(node.op_type in _RECURRENT for node in onnx.load(graph).graph.node):
        return graph, 0
    target = ingredients.work / "recurrent.onnx"
    with without_library_noise():
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

        ort_quantize_dynamic(
            graph,
            target,
            op_types_to_quantize=list(_RECURRENT),
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
        )
    layers = sum(node.op_type == "DynamicQuantizeLSTM" for node in onnx.load(target).graph.node)
    return (target, layers) if layers else (graph, 0)
