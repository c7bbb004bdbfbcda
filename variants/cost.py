"""What a variant costs before it ever runs: bytes, compressed bytes, weights, and FLOPs of one sample.

FLOPs count two per multiply-accumulate of the operators that carry the work: convolutions, matrix products, attention
and recurrent layers, with their quantised counterparts counted alike. The body of a Scan counts once per step, that of
a Loop as often as its constant trip count says (else once), an If as its dearer branch. Elementwise work is not
counted, nor is a layer whose shapes cannot be inferred.
"""

from __future__ import annotations

import math
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
from onnx import helper, numpy_helper

from variants.runtimes.onnx_signature import nested_graphs

Shape = tuple[int, ...]

_WEIGHT_TYPES = {
    onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE,
    onnx.TensorProto.INT8, onnx.TensorProto.UINT8,
}  # fmt: skip
_GATES = {"LSTM": 4, "DynamicQuantizeLSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True, slots=True)
class Cost:
    """The static cost of an ONNX artefact. `compressed_bytes` is the file through zlib, which is where zeros show."""

    size_bytes: int
    compressed_bytes: int
    weights: int
    flops: int


_MOST_STEPS = 2**31
"""More are no number of steps: exporters write a `while` as a loop of the largest count there is."""


def cost_of(artefact: Path) -> Cost:
    """Measure an ONNX file."""
    model = onnx.load(artefact)
    raw = artefact.read_bytes()
    return Cost(len(raw), len(zlib.compress(raw)), count_weights(model), count_flops(model))


def count_weights(model: onnx.ModelProto) -> int:
    """The stored numbers: elements of all floating-point and 8-bit constants, quantisation scales included."""
    graphs = list(nested_graphs(model.graph))
    tensors = [tensor for graph in graphs for tensor in (*graph.initializer, *_constants(graph).values())]
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type in _WEIGHT_TYPES)


def count_flops(model: onnx.ModelProto) -> int:
    """FLOPs of one sample: every variable dimension counts as 1."""
    return 2 * _macs_of_graph(_inferred(model).graph, {}, {})


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """The tensors of Constant nodes, by output."""
    return {
        node.output[0]: attribute.t
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    }


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model for a batch of one, with the shapes of its tensors as far as ONNX can infer them."""
    single = onnx.ModelProto()
    single.CopyFrom(onnx.inliner.inline_local_functions(model) if model.functions else model)
    for graph in nested_graphs(single.graph):
        del graph.value_info[:]  # the exporter's own notes speak of the variable batch
        for value in graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if not dim.HasField("dim_value"):
                    dim.dim_value = 1
        for value in graph.output:  # what an exporter could not name follows from the inputs
            value.type.tensor_type.ClearField("shape")
    folded = _folded(single)
    for graph in nested_graphs(folded.graph):
        for node in graph.node:
            if node.domain == "com.microsoft":
                _standardise(node, folded.graph)
    try:
        return onnx.shape_inference.infer_shapes(folded, data_prop=True)
    except onnx.shape_inference.InferenceError:  # leaves those shapes that the graph itself states
        return folded


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with its constants computed: exporters leave shapes to arithmetic that ONNX's inference cannot follow.

    As it is where ONNX Runtime cannot load it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    with tempfile.TemporaryDirectory(prefix="gearshift-cost-") as folder:
        options.optimized_model_filepath = f"{folder}/folded.onnx"
        try:
            onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
            return onnx.load(options.optimized_model_filepath)
        except Exception:  # its exceptions share no narrower base class
            return model


def _standardise(node: onnx.NodeProto, graph: onnx.GraphProto) -> None:
    """Put a standard operator of equal shapes and work in the place of one that ONNX cannot infer shapes through."""
    operator, inputs = {
        "DynamicQuantizeLSTM": ("LSTM", 8),
        "DynamicQuantizeMatMul": ("MatMul", 2),
        "MatMulNBits": ("MatMul", 1),
        **dict.fromkeys(("BiasGelu", "FastGelu", "Gelu", "QuickGelu"), ("Identity", 1)),
    }.get(node.op_type, ("", 0))
    if not operator:
        return
    del node.input[inputs:]
    if node.op_type == "MatMulNBits":  # its weight is packed: say what shape it stands for
        packed = f"{node.output[0]} weight"
        shape = [_attribute(node, "K", 0), _attribute(node, "N", 0)]
        graph.input.append(helper.make_tensor_value_info(packed, onnx.TensorProto.FLOAT, shape))
        node.input.append(packed)
    node.op_type, node.domain = operator, ""


def _macs_of_graph(graph: onnx.GraphProto, outer: Mapping[str, Shape], counts: Mapping[str, int]) -> int:
    """Multiply-accumulates of a graph that sees the shapes, and the whole numbers, of the graphs around it."""
    values = [*graph.input, *graph.value_info, *graph.output]
    shapes = dict(outer) | {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    tensors = {tensor.name: tensor for tensor in graph.initializer} | _constants(graph)
    counts = dict(counts) | {
        name: int(numpy_helper.to_array(tensor).item())
        for name, tensor in tensors.items()
        if tensor.data_type == onnx.TensorProto.INT64 and math.prod(tensor.dims) == 1
    }
    return sum(_macs_of_node(node, shapes, counts) for node in graph.node)


def _macs_of_node(node: onnx.NodeProto, shapes: Mapping[str, Shape], counts: Mapping[str, int]) -> int:
    inner = [_macs_of_graph(a.g, shapes, counts) for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    if inner:
        return _times(node, shapes, counts) * max(inner)
    counter = _COUNTERS.get(node.op_type)
    inputs = [shapes.get(name, ()) for name in node.input]
    return counter(node, inputs, shapes.get(node.output[0], ())) if counter else 0


def _times(node: onnx.NodeProto, shapes: Mapping[str, Shape], counts: Mapping[str, int]) -> int:
    """How often a node's inner graph runs, 1 where that is not known."""
    if node.op_type == "Loop":
        steps = counts.get(node.input[0], 1)
        return steps if steps <= _MOST_STEPS else 1
    if node.op_type != "Scan":
        return 1
    scanned = _attribute(node, "num_scan_inputs", 1)
    axis = _attribute(node, "scan_input_axes", [0])[0]
    shape = shapes.get(node.input[len(node.input) - scanned], ())
    return shape[axis] if -len(shape) <= axis < len(shape) else 1


def _attribute(node: onnx.NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _convolution(weight_at: int) -> Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]:
    """Each output element sums over one filter: weights [out, in / groups, *kernel]."""

    def macs(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
        del node
        return math.prod(output) * math.prod(inputs[weight_at][1:]) if output and inputs[weight_at] else 0

    return macs


def _transposed_convolution(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Each input element spreads over one filter: weights [in, out / groups, *kernel]."""
    del node, output
    return math.prod(inputs[0]) * math.prod(inputs[1][1:]) if inputs[0] and inputs[1] else 0


def _product(left: int, right: int) -> Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]:
    """[..., m, k] x [..., k, n]: k per output element; a weight [k, n], transposed or not, meets every row once."""

    def macs(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
        del node
        a, b = inputs[left], inputs[right]
        rows = next((shape for shape in (output, a) if shape and all(shape)), ())
        if len(b) == 2 and rows:
            return math.prod(rows[:-1]) * math.prod(b)
        return math.prod(output) * a[-1] if a and output else 0

    return macs


def _recurrent(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """`gates` x hidden x (inputs + hidden) per step and direction; x is [steps, batch, inputs] unless `layout` is 1."""
    del output
    hidden = _attribute(node, "hidden_size", 0)
    weights = _GATES[node.op_type] * hidden * hidden + math.prod(inputs[1][1:])  # of one direction; by state, by input
    directions = 2 if _attribute(node, "direction", b"forward") == b"bidirectional" else 1
    return math.prod(inputs[0][:2]) * weights * directions if inputs[0] and inputs[1] else 0


def _einsum(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """One product per combination of all indices, for each operand beyond the first."""
    del output
    terms = _attribute(node, "equation", b"").decode().replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, inputs, strict=True):
        before, dots, after = term.partition("...")
        if len(before + after) > len(shape) or not (dots or len(before) == len(shape)):
            return 0  # a shape that could not be inferred
        between = len(shape) - len(before + after)
        names = [*before, *(f"...{number}" for number in range(between, 0, -1)), *after]
        for name, size in zip(names, shape, strict=True):
            sizes[name] = max(sizes.get(name, 1), size)
    return math.prod(sizes.values()) * (len(terms) - 1)


def _attention(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """Each query meets each key, and each value once more; [batch, heads, length, width] or heads side by side."""
    del output
    query, key, value = inputs[:3]
    if node.domain not in ("", "ai.onnx") or not (query and key and value):
        return 0
    if len(query) == 4:
        batch, heads, length, width = query
        return batch * heads * length * key[2] * (width + value[3])
    shared = _attribute(node, "q_num_heads", 1) // _attribute(node, "kv_num_heads", 1)
    return int(query[0] * query[1] * key[1] * (query[2] + shared * value[2]))


def _multi_head_attention(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """ONNX Runtime's attention: queries [batch, length, hidden], or all as [batch, length, heads, 3, width].

    Keys lie like queries, with values as [batch, keys, heads, 2, width], or by head as [batch, heads, keys, width].
    """
    del node, output
    query, key, value, past = (inputs[at] if at < len(inputs) else () for at in (0, 1, 2, 6))
    if len(query) == 5:
        batch, length, heads, _, width = query
        return batch * length * length * heads * 2 * width
    if len(query) != 3 or len(key) not in (3, 4, 5) or (len(key) < 5 and len(value) != len(key)):
        return 0
    keys = key[2] if len(key) == 4 else key[1]
    keys += past[2] if len(past) == 4 else 0
    valued = {3: lambda: value[2], 4: lambda: value[1] * value[3], 5: lambda: key[2] * key[4]}[len(key)]()
    return query[0] * query[1] * keys * (query[2] + valued)


_COUNTERS: dict[str, Callable[[onnx.NodeProto, Sequence[Shape], Shape], int]] = {
    "Conv": _convolution(1),
    "FusedConv": _convolution(1),
    "ConvInteger": _convolution(1),
    "QLinearConv": _convolution(3),
    "ConvTranspose": _transposed_convolution,
    "MatMul": _product(0, 1),
    "Gemm": _product(0, 1),
    "FusedMatMul": _product(0, 1),
    "MatMulInteger": _product(0, 1),
    "MatMulIntegerToFloat": _product(0, 1),
    "DynamicQuantizeMatMul": _product(0, 1),
    "QLinearMatMul": _product(0, 3),
    "QGemm": _product(0, 3),
    "Einsum": _einsum,
    "Attention": _attention,
    "MultiHeadAttention": _multi_head_attention,
    **dict.fromkeys(_GATES, _recurrent),
}
