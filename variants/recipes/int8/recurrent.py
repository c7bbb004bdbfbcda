"""LSTM and GRU layers in int8 whose answers do not depend on the batch.

ONNX Runtime's DynamicQuantizeLSTM takes one scale for its whole input and, at each step, one for the hidden states of
the whole batch, from the extremes that it finds there. Here it always finds the same ones, so every scale is a
constant. The input is clipped to its range, and two columns with weights of zero hold the range's ends. Two further
hidden units, pinned by their biases, hold the largest and the smallest state that a unit can have after so many steps:
all their gates are open, so |h| is tanh t after t steps, which no other unit exceeds.

There is no such operator for GRU. It becomes a Scan over its steps: one row-wise product with the inputs of all steps,
and at each step a product with the hidden state, which lies within ±1, on the constant scale of that.

Rules of this file: layouts are ONNX's, inputs [steps, batch, width], weights [directions, gates * hidden, width]. What
is rare (other activations, coupled gates, initial states other than zero) stays as it is, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from variants.recipes.int8.ranges import KnownRanges, Range, has_usual_activations
from variants.recipes.int8.rowwise import RowWise, quantise_columns

RECURRENT_OPERATORS = ("LSTM", "GRU", "RNN")

_LEAST_HIDDEN = {"LSTM": 128, "GRU": 256}
_PINS, _SATURATED = 2, 100.0
_CANDIDATE = 3  # an LSTM's gates are input, output, forget and candidate

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Recurrent:
    """An LSTM or GRU layer that can be quantised.

    Weights [directions, gates * hidden, width], recurrence [directions, gates * hidden, hidden] and biases
    [directions, 2 * gates * hidden], those of the input first.
    """

    node: onnx.NodeProto
    weights: Floats
    recurrence: Floats
    biases: Floats

    @property
    def hidden(self) -> int:
        """How many units a direction has."""
        return int(self.recurrence.shape[2])

    @property
    def input(self) -> str:
        """The tensor [steps, batch, width] that it reads."""
        return str(self.node.input[0])

    @property
    def pays(self) -> bool:
        """Whether it gets faster: in narrower layers elementwise work and the overhead of steps outweigh (measured)."""
        return self.hidden >= _LEAST_HIDDEN[self.node.op_type]

    @property
    def needs_range(self) -> bool:
        """Whether the range of its input must be known; a GRU's is scaled row by row."""
        return str(self.node.op_type) == "LSTM"

    @property
    def backwards(self) -> list[bool]:
        """For each direction, whether it begins at the last step."""
        if len(self.weights) == 2:
            return [False, True]
        return [_attributes(self.node).get("direction") == b"reverse"]


def read_layer(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto], known: KnownRanges) -> Recurrent | str:
    """The layer of a node, or the reason why it stays in floating point."""
    given: list[str] = [*node.input, *[""] * (8 - len(node.input))]
    _, weights, recurrence, biases, lengths, hidden, cell, peepholes = given
    attributes = _attributes(node)
    if node.op_type not in _LEAST_HIDDEN:
        return f"{node.op_type} has no int8 form"
    needed = [name for name in (weights, recurrence, biases) if name]
    if any(name not in constants or constants[name].data_type != TensorProto.FLOAT for name in needed):
        return "its weights are not constant floats of 32 bits"
    if not has_usual_activations(node) or attributes.get("input_forget") or attributes.get("layout") or peepholes:
        return "its activations, gates or layout are not the usual ones"
    if not known.is_zero(hidden) or not known.is_zero(cell):
        return "its initial state is not known to be zero"
    if node.op_type == "GRU" and (lengths or "clip" in attributes or not attributes.get("linear_before_reset")):
        return "its sequences differ in length, it clips, or its reset gate comes before the product"
    arrays = [numpy_helper.to_array(constants[name]) for name in needed]
    if not biases:
        arrays.append(np.zeros((len(arrays[0]), 2 * arrays[0].shape[1]), np.float32))
    return Recurrent(node, *arrays)


def write_lstm(write: RowWise, layer: Recurrent, inputs: Range, *, clip: bool) -> None:
    """Write an LSTM with constant scales; `clip` where its input may leave the range."""
    node, hidden, x = layer.node, layer.hidden, layer.input
    low, high = min(inputs[0], 0.0), max(inputs[1], 0.0)  # the operator lets zero be in every range
    if clip:
        x = write.add("Clip", [x, write.constant(low, np.float32), write.constant(high, np.float32)])
    ends = write.add("Expand", [write.constant([low, high], np.float32), _sizes(write, x, 0, _PINS)])
    biases = _with_pins(layer.biases, hidden).reshape(len(layer.biases), 2, -1, hidden + _PINS)
    biases[:, 0, :, hidden:] = _SATURATED
    biases[:, 0, _CANDIDATE, -1] = -_SATURATED
    weights, *weight_scales = _integers(write, _with_pins(layer.weights, hidden, columns=_PINS))
    recurrence, *recurrence_scales = _integers(write, _with_pins(layer.recurrence, hidden, columns=_PINS))
    given = [write.add("Concat", [x, ends], axis=2), weights, recurrence]
    given += [write.constant(biases.reshape(len(biases), -1), np.float32), node.input[4] if len(node.input) > 4 else ""]
    kept = {name: value for name, value in _attributes(node).items() if name in ("direction", "clip")}
    padded = [name and f"{name}_with_pins" for name in node.output]
    write.add_many(
        "DynamicQuantizeLSTM",
        [*given, "", "", "", *weight_scales, *recurrence_scales],
        padded,
        domain="com.microsoft",
        hidden_size=hidden + _PINS,
        **kept,
    )
    window = [write.constant([value], np.int64) for value in (0, hidden, -1)]
    for name, output in zip(padded, node.output, strict=True):
        if output:
            write.add("Slice", [name, *window], output)


def write_gru(write: RowWise, layer: Recurrent) -> None:
    """Write a GRU whose reset gate follows the product: a Scan for each direction."""
    states, steps = zip(*(_scan(write, layer, direction) for direction in range(len(layer.weights))), strict=True)
    for output, parts, axis in zip(layer.node.output, (steps, states), (1, 0), strict=False):
        if output:
            at = write.constant([axis], np.int64)
            write.add("Concat", [write.add("Unsqueeze", [part, at]) for part in parts], output, axis=axis)


def _scan(write: RowWise, layer: Recurrent, direction: int) -> list[str]:
    """One direction: the last state [batch, hidden] and the states after all steps [steps, batch, hidden]."""
    hidden = layer.hidden
    of_input, of_state = np.split(layer.biases[direction], 2)
    merged = of_input + np.where(np.arange(3 * hidden) < 2 * hidden, of_state, 0)
    products = write.product(layer.input, layer.weights[direction].T)
    inputs = _split(write, write.add("Add", [products, write.constant(merged, np.float32)]), [2 * hidden, hidden])
    zeros = write.add("Expand", [write.constant([0.0], np.float32), _sizes(write, layer.input, 1, hidden)])
    body = _step(write.inner(), layer.recurrence[direction], of_state[2 * hidden :])
    way = [int(layer.backwards[direction])]
    return write.add_many(
        "Scan", [zeros, *inputs], ["", ""], body=body, num_scan_inputs=2,
        scan_input_directions=2 * way, scan_output_directions=way,
    )  # fmt: skip


def _step(write: RowWise, recurrence: Floats, bias: Floats) -> onnx.GraphProto:
    """One step: h becomes (1 - z) tanh(x + r (R h + b)) + z h, with z and r the sigmoids of x + R h."""
    hidden = len(bias)
    state, of_gates, of_candidate = (f"{write.prefix}{name}" for name in ("state", "gates", "candidate"))
    product = write.add("MatMul", [write.in_bytes(state), write.weight(recurrence.T)])
    gates, candidate = _split(write, product, [2 * hidden, hidden])
    z, r = _split(write, write.add("Sigmoid", [write.add("Add", [gates, of_gates])]), [hidden, hidden])
    reset = write.add("Mul", [r, write.add("Add", [candidate, write.constant(bias, np.float32)])])
    fresh = write.add("Tanh", [write.add("Add", [reset, of_candidate])])
    after = write.add("Add", [fresh, write.add("Mul", [z, write.add("Sub", [state, fresh])])])
    kept = write.add("Identity", [after])
    given = [_rows(state, hidden), _rows(of_gates, 2 * hidden), _rows(of_candidate, hidden)]
    return helper.make_graph(write.nodes, f"{write.prefix}step", given, [_rows(after, hidden), _rows(kept, hidden)])


def _with_pins(array: Floats, hidden: int, columns: int = 0) -> Floats:
    """[directions, parts * hidden, ...] with the pinned units added to each part, and columns at the end, all zero."""
    parts = array.reshape(len(array), -1, hidden, *array.shape[2:])
    padded = np.pad(parts, [(0, 0), (0, 0), (0, _PINS), *[(0, columns)] * (array.ndim - 2)])
    return padded.reshape(len(array), -1, *padded.shape[3:])


def _integers(write: RowWise, weights: Floats) -> list[str]:
    """Weights [directions, rows, width] as DynamicQuantizeLSTM wants them: transposed, with scales and zero points."""
    integers, scales = quantise_columns(weights.transpose(0, 2, 1), write.limit)
    zeros = np.zeros(scales.shape, np.int8)
    return [write.constant(integers, np.int8), write.constant(scales, np.float32), write.constant(zeros, np.int8)]


def _sizes(write: RowWise, tensor: str, start: int, width: int) -> str:
    """The sizes of [steps, batch, width] from the axis `start` on, with another width."""
    return write.add(
        "Concat", [write.add("Shape", [tensor], start=start, end=2), write.constant([width], np.int64)], axis=0
    )


def _split(write: RowWise, tensor: str, widths: list[int]) -> list[str]:
    """The parts of a tensor's last axis."""
    return write.add_many("Split", [tensor, write.constant(widths, np.int64)], [""] * len(widths), axis=-1)


def _rows(name: str, width: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, width])


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {each.name: helper.get_attribute_value(each) for each in node.attribute}
