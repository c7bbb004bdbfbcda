"""The table of quantised tensors: scale, zero point, range and error of each, for the card's findings.

Rules of this file: an error is the RMS of what rounding and clipping change, as a share of the tensor's own RMS; a
constant's is exact, an activation's is measured on samples in the graph as it was before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from variants.data import Array
from variants.recipes.int8.float_readers import RENAMED_OUTPUT

Observe = Callable[[Collection[str]], Iterable[Mapping[str, Array]]]
"""Names of activations -> their values, some samples at a time."""

_RENAMED_CONSTANT = "_quantized"


def quantised_layers(graph: onnx.GraphProto, layers: Collection[str]) -> int:
    """How many of the layers read both input and weight from bytes."""
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.name in layers and dequantised.issuperset(node.input[:2]) for node in graph.node)


def quantised_tensors(graph: onnx.GraphProto, before: onnx.GraphProto, observe: Observe) -> list[dict[str, object]]:
    """One row per tensor that has bytes, as plain JSON: constants first, then activations, each in the graph's order.

    `scale` and `zero_point` of a tensor with several are the least and the largest; `low` and `high` are what a
    constant spans, and what an activation's bytes can say; `error` is None for what the graph did not have before.
    """
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in constants]
    activations = [n for n in graph.node if n.op_type == "QuantizeLinear" and n.input[0] not in constants]
    return [*_constants(weights, constants, before), *_activations(activations, constants, before, observe)]


def _constants(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Any], before: onnx.GraphProto
) -> Iterable[dict[str, object]]:
    given = {tensor.name: tensor for tensor in before.initializer}
    for node in nodes:
        integers, name = numpy_helper.to_array(constants[node.input[0]]), node.input[0].removesuffix(_RENAMED_CONSTANT)
        affine, error = _Affine.of(node, constants, integers.ndim), _Error()
        values = affine.values(integers)
        if name in given:
            error.add(numpy_helper.to_array(given[name]).astype(np.float64), values)
        kind = "bias" if integers.dtype == np.int32 else "weight"
        yield _row(name, kind, affine, (values.min(initial=0), values.max(initial=0)), error)


def _activations(
    nodes: list[onnx.NodeProto], constants: Mapping[str, Any], before: onnx.GraphProto, observe: Observe
) -> Iterable[dict[str, object]]:
    affines = {node.input[0].removesuffix(RENAMED_OUTPUT): _Affine.of(node, constants, 0) for node in nodes}
    made = {name for node in before.node for name in node.output} | {value.name for value in before.input}
    errors = {name: _Error() for name in affines}
    for tensors in observe([name for name in affines if name in made]):
        for name, values in tensors.items():
            errors[name].add(values.astype(np.float64), affines[name].rounded(values))
    for name, affine in affines.items():
        yield _row(name, "activation", affine, affine.span, errors[name])


@dataclass(frozen=True, slots=True)
class _Affine:
    """What bytes mean: (byte - zero point) * scale, both in a shape that fits the tensor's."""

    scale: npt.NDArray[np.float64]
    zero_point: npt.NDArray[Any]

    @classmethod
    def of(cls, node: onnx.NodeProto, constants: Mapping[str, Any], rank: int) -> _Affine:
        scale, zero_point = (numpy_helper.to_array(constants[name]) for name in node.input[1:3])
        if scale.size > 1:  # one per channel
            axis = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "axis"), 1) % rank
            shape = [-1 if position == axis else 1 for position in range(rank)]
            scale, zero_point = scale.reshape(shape), zero_point.reshape(shape)
        return cls(scale.astype(np.float64), zero_point)

    @property
    def span(self) -> tuple[Any, Any]:
        """The least and the largest value that its bytes can say."""
        limits = np.iinfo(self.zero_point.dtype)
        low, high = self.values(np.array([limits.min, limits.max]))
        return low, high

    def values(self, integers: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
        found: npt.NDArray[np.float64] = (integers.astype(np.float64) - self.zero_point) * self.scale
        return found

    def rounded(self, values: Array) -> npt.NDArray[np.float64]:
        """The values after a trip through bytes."""
        limits = np.iinfo(self.zero_point.dtype)
        return self.values(np.clip(np.rint(values / self.scale) + self.zero_point, limits.min, limits.max))


@dataclass(slots=True)
class _Error:
    """The relative error of a tensor, summed up over samples."""

    squares: float = 0.0
    wrong: float = 0.0
    values: int = 0

    def add(self, values: npt.NDArray[np.float64], rounded: npt.NDArray[np.float64]) -> None:
        finite = np.isfinite(values)
        self.values += int(finite.sum())
        self.squares += float(np.sum(values[finite] ** 2))
        self.wrong += float(np.sum((values - rounded)[finite] ** 2))

    @property
    def relative(self) -> float | None:
        """The error's RMS over the values'; None where there were none."""
        if self.values == 0:
            return None
        return float(np.sqrt(self.wrong / max(self.squares, 1e-30)))


def _row(tensor: str, kind: str, affine: _Affine, span: tuple[Any, Any], error: _Error) -> dict[str, object]:
    zero_points = [int(end) for end in (affine.zero_point.min(), affine.zero_point.max())]
    scales = [_short(end) for end in (affine.scale.min(), affine.scale.max())]
    return {
        "tensor": tensor,
        "kind": kind,
        "scale": scales if affine.scale.size > 1 else scales[0],
        "zero_point": zero_points[0] if zero_points[0] == zero_points[1] else zero_points,
        "low": _short(span[0]),
        "high": _short(span[1]),
        "error": None if error.relative is None else _short(error.relative),
    }


def _short(value: float) -> float:
    """Six significant digits: the file is read by people."""
    return float(f"{value:.6g}")
