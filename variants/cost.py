"""What a variant costs before it ever runs: bytes, compressed bytes, weights, and FLOPs of one sample.

FLOPs count two per multiply-accumulate of the operators that carry the work: convolutions, matrix products and
recurrent layers, with their quantised counterparts counted alike. Elementwise work, and what lies inside the branches
of If or the bodies of Loop, is not counted; a layer whose shapes cannot be inferred is not either.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx

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


def cost_of(artefact: Path) -> Cost:
    """Measure an ONNX file."""
    model = onnx.load(artefact)
    raw = artefact.read_bytes()
    return Cost(len(raw), len(zlib.compress(raw)), count_weights(model), count_flops(model))


def count_weights(model: onnx.ModelProto) -> int:
    """The stored numbers: elements of all floating-point and 8-bit constants, quantisation scales included."""
    constants = [
        a.t for node in model.graph.node if node.op_type == "Constant" for a in node.attribute if a.name == "value"
    ]
    tensors = [*model.graph.initializer, *constants]
    return sum(math.prod(tensor.dims) for tensor in tensors if tensor.data_type in _WEIGHT_TYPES)


def count_flops(model: onnx.ModelProto) -> int:
    """FLOPs of one sample: every variable dimension counts as 1."""
    shapes = _shapes(model)
    return sum(_node_flops(node, shapes) for node in model.graph.node)


def _shapes(model: onnx.ModelProto) -> dict[str, Shape]:
    """The shapes of all tensors for a batch of one, as far as ONNX can infer them."""
    single = onnx.ModelProto()
    single.CopyFrom(model)
    del single.graph.value_info[:]  # the exporter's own notes speak of the variable batch
    for value in [*single.graph.input, *single.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    try:
        single = onnx.shape_inference.infer_shapes(single, data_prop=True)
    except onnx.shape_inference.InferenceError:  # leaves those shapes that the graph itself states
        single = model
    values = [*single.graph.input, *single.graph.value_info, *single.graph.output]
    shapes = {v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in values}
    return shapes | {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}


def _node_flops(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    counter = _COUNTERS.get(node.op_type)
    inputs = [shapes.get(name, ()) for name in node.input]
    return 2 * counter(node, inputs, shapes.get(node.output[0], ())) if counter else 0


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
        if len(b) == 2 and (a or output):
            return math.prod((output or a)[:-1]) * math.prod(b)
        return math.prod(output) * a[-1] if a and output else 0

    return macs


def _recurrent(node: onnx.NodeProto, inputs: Sequence[Shape], output: Shape) -> int:
    """`gates` x hidden x (inputs + hidden) per step and direction; x is [steps, batch, inputs] unless `layout` is 1."""
    del output
    attributes = {attribute.name: attribute for attribute in node.attribute}
    hidden = attributes["hidden_size"].i if "hidden_size" in attributes else 0
    directions = 2 if "direction" in attributes and attributes["direction"].s == b"bidirectional" else 1
    if not inputs[0]:
        return 0
    steps, batch, width = inputs[0]
    return _GATES[node.op_type] * hidden * (width + hidden) * steps * batch * directions


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
    **dict.fromkeys(_GATES, _recurrent),
}
