"""int8-dynamic: constant weights in signed bytes per column, activations in unsigned bytes scaled at run time.

Rules of this file: convolutions are never quantised dynamically (their integer kernels are slower than fp32). In
`int8-dynamic` batch-mates change no answer, to the bit: every row of activations has a scale of its own, and what
cannot have one stays in floating point. `int8-dynamic-per-tensor` is ONNX Runtime's own arithmetic, with one scale for
a whole tensor: faster, but a sample's answer depends on who shares its batch, so it must run within one request.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from variants.data import spread
from variants.quiet import without_library_noise
from variants.recipes.graph import finished, folded, reads
from variants.recipes.int8.calibration import Activations
from variants.recipes.int8.ranges import KnownRanges, Range
from variants.recipes.int8.recurrent import RECURRENT_OPERATORS, Recurrent, read_layer, write_gru, write_lstm
from variants.recipes.int8.rowwise import LEAST_OPSET, RowWise, unused_prefix
from variants.recipes.int8.u8s8 import MATRIX_OPERATORS, Int8, refuse_sixteen_bits
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs

_LEAST_WORK = 100.0
"""Multiply-accumulates per element read or written, k·n / (k + n), from which on a product gets faster (measured)."""

_SHARED_SCALES = ("DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM")
"""What finds one scale for a whole tensor, and so for all samples of a batch."""

_SAMPLES, _QUICK_SAMPLES = 256, 64


class QuantizeDynamic(Int8):
    """Nothing beyond the range of the weights."""


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A MatMul or Gemm of activations with a constant matrix [k, n], `alpha` included."""

    node: onnx.NodeProto
    weight: npt.NDArray[np.float64]

    @property
    def pays(self) -> bool:
        return self.weight.size / sum(self.weight.shape) >= _LEAST_WORK


@dataclass(slots=True)
class _Layers:
    """The layers of a graph by the first tensor they make: those to quantise, and why others keep to floats."""

    chosen: dict[str, _Matrix | Recurrent] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def quantize_dynamic(ingredients: Ingredients, parameters: QuantizeDynamic) -> Product:
    """Quantise products with constant weights, LSTM and GRU; every sample's answer is its own.

    The input of an LSTM needs a range: what makes it says so (another LSTM, a sigmoid, an embedding), or calibration
    data do. Layers too small to gain stay in floating point, unless all are. Raises RecipeRejected.
    """
    refuse_sixteen_bits(ingredients.source.graph)
    reduce_range = parameters.reduces_range(ingredients.hardware)
    graph = folded(ingredients.source.graph, ingredients.work, least_opset=LEAST_OPSET)
    model = onnx.load(graph)
    known = KnownRanges(model.graph)
    layers = _find_layers(model.graph, known)
    seen = _observe(ingredients, graph, layers, known)
    _leave_small(layers)
    if not layers.chosen:
        reasons = "; ".join(f"{name}: {why}" for name, why in layers.left.items())
        raise RecipeRejected(f"nothing to quantise: {reasons or 'no MatMul, Gemm, LSTM or GRU with constant weights'}")
    invariant = not _shares_scales(model.graph)
    _rewrite(model.graph, layers, known, seen, RowWise(63 if reduce_range else 127, prefix=unused_prefix(model.graph)))
    target = finished(ingredients, model, "int8-dynamic.onnx")
    facts = {
        "quantised_layers": len(layers.chosen),
        "float_layers": len(layers.left),
        "batch_invariant": invariant,
        "reduce_range": reduce_range,
    }
    findings = {"float_layers": layers.left, "input_ranges": {name: list(span) for name, span in seen.items()}}
    return Product({"model.onnx": target}, precision="int8", facts=facts, findings=findings)


def quantize_per_tensor(ingredients: Ingredients, parameters: QuantizeDynamic) -> Product:
    """Quantise products with constant weights and LSTM as ONNX Runtime does, with one scale for a whole tensor."""
    refuse_sixteen_bits(ingredients.source.graph)
    reduce_range = parameters.reduces_range(ingredients.hardware)
    target = ingredients.work / "per-tensor.onnx"
    with without_library_noise():
        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

        ort_quantize_dynamic(
            folded(ingredients.source.graph, ingredients.work),
            target,
            op_types_to_quantize=[*MATRIX_OPERATORS, "LSTM"],
            per_channel=True,
            reduce_range=reduce_range,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )
    model = onnx.load(target)
    layers = sum(node.op_type in ("MatMulInteger", "DynamicQuantizeLSTM") for node in model.graph.node)
    if layers == 0:
        raise RecipeRejected("nothing to quantise: no MatMul, Gemm or LSTM with constant weights")
    made = finished(ingredients, model, "int8-dynamic-per-tensor.onnx")
    facts = {"quantised_layers": layers, "batch_invariant": False, "reduce_range": reduce_range}
    return Product({"model.onnx": made}, precision="int8", facts=facts)


def _find_layers(graph: onnx.GraphProto, known: KnownRanges) -> _Layers:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    layers = _Layers()
    for node in graph.node:
        found: _Matrix | Recurrent | str | None = None
        if node.op_type in MATRIX_OPERATORS:
            found = _read_matrix(node, constants)
        elif node.op_type in RECURRENT_OPERATORS:
            found = read_layer(node, constants, known)
        if isinstance(found, str):
            layers.left[_name(node)] = found
        elif found is not None:
            layers.chosen[_name(node)] = found
    return layers


def _shares_scales(graph: onnx.GraphProto) -> bool:
    """Whether a source, its branches and bodies included, already lets batch-mates matter."""
    return any(node.op_type in _SHARED_SCALES for inner in nested_graphs(graph) for node in inner.node)


def _name(node: onnx.NodeProto) -> str:
    return next(str(output) for output in node.output if output)


def _read_matrix(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> _Matrix | str | None:
    """The product of a node, the reason why it stays in floating point, or None where it has no weights."""
    if node.input[1] not in constants:
        return None
    tensor = constants[node.input[1]]
    if len(tensor.dims) != 2 or tensor.data_type != onnx.TensorProto.FLOAT:
        return "its weight is not a matrix of 32-bit floats"
    if _attribute(node, "transA", 0):
        return "its activations are transposed"
    weight = numpy_helper.to_array(tensor).astype(np.float64) * _attribute(node, "alpha", 1.0)
    return _Matrix(node, weight.T if _attribute(node, "transB", 0) else weight)


def _attribute(node: onnx.NodeProto, name: str, default: float) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _observe(ingredients: Ingredients, graph: Path, layers: _Layers, known: KnownRanges) -> Mapping[str, Range]:
    """The ranges of inputs that nothing is known of, from calibration data; layers without stay in floating point."""
    recurrent = {name: layer for name, layer in layers.chosen.items() if isinstance(layer, Recurrent)}
    ranged = {name: layer.input for name, layer in recurrent.items() if layer.needs_range}
    for name in [name for name, tensor in ranged.items() if known.is_zero(tensor)]:
        del layers.chosen[name]
        layers.left[name] = "its input is nothing but zeros"
    unknown = {n: tensor for n, tensor in ranged.items() if n in layers.chosen and known.of(tensor) is None}
    if not unknown:
        return {}
    if ingredients.calibration is None:
        for name in unknown:
            del layers.chosen[name]
            layers.left[name] = "the range of its input is not known; add `calibration:` to model.yaml"
        return {}
    config = ingredients.config.calibration
    most = config.samples if config else _SAMPLES
    samples = spread(ingredients.calibration, min(most, _QUICK_SAMPLES) if ingredients.quick else most)
    names, source = list(unknown.values()), ingredients.source
    activations = Activations(graph, names, samples, source.max_batch, ingredients.hardware.cores)
    observed = activations.observe(histograms=False)
    seen = {name: (float(each.lowest), float(each.highest)) for name, each in observed.items()}
    for name, tensor in unknown.items():
        if tensor not in seen or not seen[tensor][0] < seen[tensor][1]:
            del layers.chosen[name]
            layers.left[name] = "calibration data show no range of its input: nothing but zeros or NaN"
    return seen


def _leave_small(layers: _Layers) -> None:
    """Leave what would not get faster in floating point; if that is all there is, bytes at least take less room."""
    small = [name for name, layer in layers.chosen.items() if not layer.pays]
    if len(small) < len(layers.chosen):
        for name in small:
            del layers.chosen[name]
            layers.left[name] = "too small to gain"


def _rewrite(
    graph: onnx.GraphProto, layers: _Layers, known: KnownRanges, seen: Mapping[str, Range], write: RowWise
) -> None:
    """Put integer products in the place of the chosen layers."""
    for node in graph.node:
        layer = layers.chosen.get(_name(node)) if any(node.output) else None
        if isinstance(layer, _Matrix):
            _write_matrix(write, layer)
        elif layer is None:
            write.nodes.append(node)
        elif layer.needs_range:
            inputs = known.of(layer.input) or seen[layer.input]
            write_lstm(write, layer, inputs, clip=layer.input in seen)
        else:
            write_gru(write, layer)
    del graph.node[:]
    graph.node.extend(write.nodes)
    graph.initializer.extend(write.constants)
    _drop_unused(graph)


def _write_matrix(write: RowWise, layer: _Matrix) -> None:
    """The product, and the bias where there is one."""
    node = layer.node
    bias = node.input[2] if len(node.input) > 2 else ""
    if not bias:
        write.product(node.input[0], layer.weight, node.output[0])
        return
    if (beta := _attribute(node, "beta", 1.0)) != 1.0:
        bias = write.add("Mul", [bias, write.constant(beta, np.float32)])
    write.add("Add", [write.product(node.input[0], layer.weight), bias], node.output[0])


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the nodes and weights that nothing reads any more, and such weights' listing as inputs."""
    used, nodes = {value.name for value in graph.output}, []
    for node in reversed(graph.node):
        if used.intersection(node.output):
            nodes.append(node)
            used |= reads(node)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    unused = {tensor.name for tensor in graph.initializer} - used
    for values in (graph.initializer, graph.input):
        kept = [value for value in values if value.name not in unused]
        del values[:]
        values.extend(kept)
