"""Integer matrix products in standard ONNX operators, with one scale for each row of activations.

A row x is divided by its largest magnitude m, rounded to bytes on the constant scale 1/127, multiplied by the bytes of
the weights, and the result by m again: y = m · (round(127 x / m) / 127) W. What depends on the data depends on one row
only and integers add up exactly, so a row gets the same answer to the bit whoever shares its batch.

Rules of this file: a tensor is quantised once, however many products read it. The pairs of QuantizeLinear and
DequantizeLinear around an ordinary MatMul are what ONNX Runtime and OpenVINO fuse into one integer kernel each. A scale
per row in QuantizeLinear itself would save a division, but OpenVINO 2026.4 reads such a file and answers with nothing;
MatMulNBits in 8 bits is one operator, but slower than fp32 beyond a few rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from variants.runtimes.onnx_signature import nested_graphs

LEAST_OPSET = 18
"""ReduceMax takes its axes as an input from here on."""

_LEVELS, _ZERO_POINT = 127, 128
_TINY = 1e-12  # stands in for the largest magnitude of a row of zeros


def quantise_columns(weight: npt.NDArray[Any], limit: int) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Weights [..., k, n] as bytes within ±limit, and the scale of each column [..., n]."""
    scale = np.maximum(np.abs(weight).max(axis=-2), _TINY) / limit
    integers = np.clip(np.rint(weight / scale[..., None, :]), -limit, limit)
    return integers.astype(np.int8), scale.astype(np.float32)


def unused_prefix(graph: onnx.GraphProto) -> str:
    """How names may begin that are new to a graph, one that was written here before included."""
    names: set[str] = set()
    for inner in nested_graphs(graph):
        names.update(value.name for value in (*inner.input, *inner.initializer))
        names.update(name for node in inner.node for name in (node.name, *node.output))
    prefix = "int8_"
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    return prefix


@dataclass(slots=True)
class RowWise:
    """Writes a graph node by node: `nodes` and `constants` are what it has so far; weights lie within ±`limit`.

    Every name begins with `prefix`.
    """

    limit: int
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    prefix: str = "int8_"
    _scalars: dict[tuple[str, Any], str] = field(default_factory=dict)
    _rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    def inner(self) -> RowWise:
        """A writer of a graph inside this one, such as a loop's body; its constants are kept out here."""
        return RowWise(self.limit, [], self.constants, f"{self.prefix}{len(self.nodes)}_", self._scalars)

    def add(self, operator: str, inputs: list[str], output: str = "", **attributes: Any) -> str:
        """Add a node with one output and return that output's name."""
        return self.add_many(operator, inputs, [output], **attributes)[0]

    def add_many(self, operator: str, inputs: list[str], outputs: list[str], **attributes: Any) -> list[str]:
        """Add a node and return its outputs' names; an empty name in `outputs` asks for one."""
        name = f"{self.prefix}{len(self.nodes)}_{operator}"
        names = [output or (f"{name}_{position}" if position else name) for position, output in enumerate(outputs)]
        self.nodes.append(helper.make_node(operator, inputs, names, name, **attributes))
        return names

    def constant(self, value: Any, dtype: type) -> str:
        """The name of a constant; equal numbers are stored once."""
        array: npt.NDArray[Any] = np.asarray(value, dtype)
        key = (array.dtype.str, array.item()) if array.ndim == 0 else None
        if key in self._scalars:
            return self._scalars[key]
        name = f"{self.prefix}constant_{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(array, name))
        if key is not None:
            self._scalars[key] = name
        return name

    def product(self, activations: str, weight: npt.NDArray[Any], output: str = "") -> str:
        """Activations [..., k] times a constant weight [k, n], both in bytes; the name of the result [..., n]."""
        rows, largest = self._quantised(activations)
        return self.add("Mul", [self.add("MatMul", [rows, self.weight(weight)]), largest], output)

    def weight(self, weight: npt.NDArray[Any]) -> str:
        """A constant [k, n] in bytes with a scale per column, dequantised."""
        integers, scale = quantise_columns(weight, self.limit)
        return self.add(
            "DequantizeLinear", [self.constant(integers, np.int8), self.constant(scale, np.float32)], axis=1
        )

    def in_bytes(self, unit: str) -> str:
        """Values within ±1 on the constant scale 1/127, dequantised; what lies outside is clipped."""
        affine = [self.constant(1 / _LEVELS, np.float32), self.constant(_ZERO_POINT, np.uint8)]
        return self.add("DequantizeLinear", [self.add("QuantizeLinear", [unit, *affine]), *affine])

    def _quantised(self, activations: str) -> tuple[str, str]:
        """Rows scaled to ±1 and through bytes [..., k], and each row's largest magnitude [..., 1]."""
        if activations not in self._rows:
            magnitudes = self.add("Abs", [activations])
            peak = self.add("ReduceMax", [magnitudes, self.constant([-1], np.int64)], keepdims=1)
            largest = self.add("Max", [peak, self.constant(_TINY, np.float32)])
            self._rows[activations] = self.in_bytes(self.add("Div", [activations, largest])), largest
        return self._rows[activations]
