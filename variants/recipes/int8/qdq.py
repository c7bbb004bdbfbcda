"""QDQ graphs: which nodes of a graph become 8-bit, and the QuantizeLinear and DequantizeLinear pairs that say so.

Rules of this file: layers, which multiply by constant weights, are quantised in any network. What lies between them is
too, but never in one with attention or layer normalisation: its sums, norms and softmax collapse in 8 bits. Whatever
stays in floating point reads floating point, wherever that costs an integer kernel nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from variants.model_config import nearest
from variants.quiet import without_library_noise
from variants.recipes.graph import folded, put_in_order
from variants.recipes.int8.calibration import Ranges
from variants.recipes.int8.float_readers import read_floats
from variants.recipes.int8.u8s8 import MATRIX_OPERATORS, refuse_sixteen_bits
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs

LAYERS = ("Conv", *MATRIX_OPERATORS)
WEIGHTED = (*LAYERS, "ConvTranspose")
"""What multiplies by constant weights; a CPU has no integer kernel for the last."""

_SHAPING = ("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
_BETWEEN = ("Add", "MaxPool", "AveragePool", "GlobalAveragePool", "Concat", "Relu", "Clip")
_TRANSFORMER_SIGNS = frozenset(
    {"LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization", "Attention", "MultiHeadAttention"}
)
_LEAST_OPSET = 13  # DequantizeLinear takes a scale per channel from here on


@dataclass(frozen=True, slots=True)
class Prepared:
    """A graph to quantise, every node of it named, and its layers: operators by node name, in the graph's order.

    `excluded` stay in floating point whatever is tried; `layers_only` where nothing between layers is quantised.
    """

    graph: Path
    layers: Mapping[str, str]
    excluded: frozenset[str]
    layers_only: bool

    def nodes(self, layers: Collection[str]) -> list[str]:
        """What is quantised along with these layers, themselves included."""
        graph = onnx.load(self.graph, load_external_data=False).graph
        return list(layers) if self.layers_only else _with_between(graph, layers, self.excluded)

    def tensors(self, nodes: Collection[str]) -> list[str]:
        """The activations that these nodes read and write."""
        graph = onnx.load(self.graph).graph
        constants = {tensor.name for tensor in graph.initializer}
        touched = (name for node in graph.node if node.name in nodes for name in (*node.input, *node.output))
        return [name for name in dict.fromkeys(touched) if name and name not in constants]


def prepare(ingredients: Ingredients, exclude: Collection[str]) -> Prepared:
    """Fold the source and find its layers. Raises RecipeRejected where there are none, or already in bytes."""
    refuse_sixteen_bits(ingredients.source.graph)
    target = ingredients.work / "prepared.onnx"
    model = onnx.load(folded(ingredients.source.graph, ingredients.work, least_opset=_LEAST_OPSET))
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph.node):
        raise RecipeRejected("the graph is quantised already; give the floating-point graph as the source")
    _name_nodes(model.graph)
    _fold_biases(model.graph)
    _unshare_weights(model.graph)
    onnx.save(model, target)
    names = {node.name for node in model.graph.node}
    for unknown in sorted(set(exclude) - names):
        raise RecipeRejected(f"exclude: there is no node {unknown!r}; {nearest(unknown, names)}")
    layers = layers_of(model.graph, LAYERS, exclude)
    if not layers:
        operators = sorted({node.op_type for node in model.graph.node})
        raise RecipeRejected(f"nothing to quantise statically among {', '.join(operators)}")
    return Prepared(target, layers, frozenset(exclude), _is_transformer(model.graph))


def layers_of(graph: onnx.GraphProto, operators: Collection[str], exclude: Collection[str]) -> dict[str, str]:
    """The operators of nodes that multiply activations by constant weights, by node name."""
    constants = {tensor.name: tensor for tensor in graph.initializer}

    def is_layer(node: onnx.NodeProto) -> bool:
        if node.op_type not in operators or node.name in exclude:
            return False
        if node.input[0] in constants or node.input[1] not in constants:
            return False
        weight = constants[node.input[1]]
        bias = constants.get(node.input[2]) if node.op_type == "Gemm" and len(node.input) > 2 else None
        if bias is not None and list(bias.dims) != [_width(node, weight)]:
            return False  # a bias per row has no integer form
        is_matrix = len(weight.dims) == 2 or node.op_type not in MATRIX_OPERATORS
        return is_matrix and weight.data_type == onnx.TensorProto.FLOAT

    return {node.name: node.op_type for node in graph.node if is_layer(node)}


def insert_qdq(
    graph: Path,
    ranges: Ranges,
    nodes: Collection[str],
    *,
    reduce_range: bool = False,
    signed: bool = False,
    options: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """The graph with these nodes in QDQ form: weights signed and per channel, activations unsigned unless `signed`."""
    model, chosen = onnx.load(graph), set(nodes)
    operators = {node.op_type for node in model.graph.node if node.name in chosen}
    with without_library_noise():
        from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData

        observed = {
            n: TensorData(lowest=np.asarray(low), highest=np.asarray(high)) for n, (low, high) in ranges.items()
        }
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=reduce_range,
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QInt8 if signed else QuantType.QUInt8,
            tensors_range=TensorsData(CalibrationMethod.MinMax, observed),
            nodes_to_quantize=list(chosen),
            nodes_to_exclude=[],
            op_types_to_quantize=list(operators),
            extra_options=dict(options or {}),
        )
        made: onnx.ModelProto = quantizer.quantize_model()
        writes_floats = operators if signed else MATRIX_OPERATORS
        read_floats(made.graph, onnx.load(graph).graph, chosen, writes_floats=writes_floats)
        quantizer.model.clean_initializers()
        put_in_order(made.graph)  # it appends its nodes wherever they arise
    return made


def _name_nodes(graph: onnx.GraphProto) -> None:
    """Give each node a name of its own, since nodes are chosen by name."""
    taken, seen = {node.name for node in graph.node}, set[str]()
    for index, node in enumerate(graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
            while node.name in taken:
                node.name += "_"
            taken.add(node.name)
        seen.add(node.name)


def _width(gemm: onnx.NodeProto, weight: onnx.TensorProto) -> int:
    """How many columns a Gemm gives."""
    is_transposed = any(attribute.name == "transB" and attribute.i for attribute in gemm.attribute)
    return int(weight.dims[0 if is_transposed else -1])


def _fold_biases(graph: onnx.GraphProto) -> None:
    """Make constant biases of Gemm one row [n] where they are, times beta: ONNX Runtime's quantiser knows no other."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[2] not in constants:
            continue
        bias = row = numpy_helper.to_array(constants[node.input[2]])
        if node.input[1] in constants and all(size == 1 for size in bias.shape[:-1]):
            row = np.broadcast_to(bias.reshape(-1), _width(node, constants[node.input[1]]))
        betas = [attribute for attribute in node.attribute if attribute.name == "beta" and attribute.f != 1]
        for beta in betas:
            row = (row * beta.f).astype(bias.dtype)
            beta.f = 1.0
        if betas or row.shape != bias.shape:
            node.input[2] = f"{node.input[2]}/{node.name}"
            graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(row), node.input[2]))


def _unshare_weights(graph: onnx.GraphProto) -> None:
    """Give each layer a weight of its own, so that what one reads as bytes no other has to."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type in WEIGHTED and node.input[1] in constants and readers[node.input[1]] > 1:
            readers[node.input[1]] -= 1
            own = graph.initializer.add()
            own.CopyFrom(constants[node.input[1]])
            own.name = node.input[1] = f"{node.input[1]}/{node.name}"


def _is_transformer(graph: onnx.GraphProto) -> bool:
    """Whether there is attention or layer normalisation; a softmax at the very end is a classifier's."""
    read = {name for node in graph.node for name in node.input}
    attends = any(node.op_type == "Softmax" and node.output[0] in read for node in graph.node)
    return attends or any(node.op_type in _TRANSFORMER_SIGNS for node in graph.node)


def _with_between(graph: onnx.GraphProto, layers: Collection[str], excluded: Collection[str]) -> list[str]:
    """The layers, and what lies between them or has nothing but a layer's bytes to read."""
    feeds: set[str] = set()  # tensors that a layer reads, be it through what may lie between
    for node in reversed(graph.node):
        if node.name in layers:
            feeds.add(node.input[0])
        elif node.op_type in _BETWEEN + _SHAPING and not feeds.isdisjoint(node.output):
            feeds.update(node.input)
    floats = {*excluded, *_never_bytes(graph)}
    results, in_bytes = set[str](), set[str]()  # what comes of a layer, and what of that is only there as bytes
    nodes = []
    for node in graph.node:
        reads = results.intersection(node.input)
        reads_bytes = not reads.isdisjoint(in_bytes)
        is_layer, is_shaping = node.name in layers, node.op_type in _SHAPING
        joins = node.op_type in _BETWEEN and node.name not in floats and bool(reads)
        joins &= reads_bytes or not feeds.isdisjoint(node.output)
        if is_layer or joins:
            nodes.append(node.name)
        if is_layer or joins or (is_shaping and reads):
            results.update(node.output)
        if joins or (is_layer and node.op_type not in MATRIX_OPERATORS) or (is_shaping and reads_bytes):
            in_bytes.update(node.output)
    return nodes


def _never_bytes(graph: onnx.GraphProto) -> Iterator[str]:
    """The Relu and Clip nodes that the range of bytes cannot stand for.

    ONNX Runtime's quantiser removes them and lets the range of their producer's bytes clip. That range always reaches
    over zero, and clips the tensor before them for whoever else reads it: a caller, a branch or a loop's body.
    """
    constants, outputs = {tensor.name: tensor for tensor in graph.initializer}, {value.name for value in graph.output}
    _, *inner = nested_graphs(graph)
    outputs |= {name for each in inner for node in each.node for name in node.input}
    outputs |= {value.name for each in inner for value in each.output}

    def bound(node: onnx.NodeProto, index: int, absent: float) -> float:
        name = node.input[index] if len(node.input) > index else ""
        if not name:
            return absent
        return float(numpy_helper.to_array(constants[name]).item()) if name in constants else float("nan")

    for node in graph.node:
        clips = node.op_type == "Clip"
        passes_zero = not clips or bound(node, 1, -np.inf) <= 0 <= bound(node, 2, np.inf)
        is_read = not outputs.isdisjoint((node.input[0], *(node.output if inner else ())))
        if (clips or node.op_type == "Relu") and (is_read or not passes_zero):
            yield node.name
