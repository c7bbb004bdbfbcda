"""Between which values a tensor of a graph always lies, as far as the operators that make it say.

Rules of this file: a range holds for every input that the graph will ever get; None means that nothing is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import helper, numpy_helper

Range = tuple[float, float]

_BOUNDED = {
    "Tanh": (-1.0, 1.0), "Softsign": (-1.0, 1.0), "Sin": (-1.0, 1.0), "Cos": (-1.0, 1.0),
    "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Softmax": (0.0, 1.0),
}  # fmt: skip
_MOVING = (
    "Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Tile", "Slice", "Split",
    "Gather", "GatherElements", "GatherND", "ReverseSequence", "MaxPool", "Dropout",
)  # fmt: skip
_RECURRENT = {"LSTM": ("Sigmoid", "Tanh", "Tanh"), "GRU": ("Sigmoid", "Tanh")}


@dataclass(slots=True)
class KnownRanges:
    """The ranges of one graph's tensors."""

    graph: onnx.GraphProto
    _makers: dict[str, onnx.NodeProto] = field(init=False)
    _known: dict[str, Range | None] = field(init=False)

    def __post_init__(self) -> None:
        self._makers = {name: node for node in self.graph.node for name in node.output}
        self._known = {}
        for tensor in self.graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                array = numpy_helper.to_array(tensor)
                is_sound = array.size and np.isfinite(array).all()
                self._known[tensor.name] = (float(array.min()), float(array.max())) if is_sound else None

    def of(self, tensor: str) -> Range | None:
        """The lowest and the highest value that a tensor can have, None where that is not known."""
        if tensor not in self._known:
            self._known[tensor] = self._made_by(self._makers[tensor], tensor) if tensor in self._makers else None
        return self._known[tensor]

    def is_zero(self, tensor: str) -> bool:
        """Whether a tensor is known to be nothing but zeros; an absent one is."""
        return not tensor or self.of(tensor) == (0.0, 0.0)

    def _made_by(self, node: onnx.NodeProto, tensor: str) -> Range | None:
        if node.op_type in _BOUNDED:
            return _BOUNDED[node.op_type]
        if node.op_type in _MOVING:
            return self.of(node.input[0])
        if node.op_type == "Concat":
            parts = [self.of(name) for name in node.input]
            known = [part for part in parts if part is not None]
            is_known = len(known) == len(parts)
            return (min(low for low, _ in known), max(high for _, high in known)) if is_known else None
        if node.op_type == "ConstantOfShape":
            return _filled_with(node)
        if node.op_type in _RECURRENT:
            return self._of_recurrent(node, tensor)
        return None

    def _of_recurrent(self, node: onnx.NodeProto, tensor: str) -> Range | None:
        """Hidden states lie within ±1: an LSTM's are products of two such, a GRU's are means of such and the first."""
        is_cell_state = list(node.output).index(tensor) == 2
        begins_at_zero = len(node.input) < 6 or self.is_zero(node.input[5])
        is_bounded = not is_cell_state and (node.op_type == "LSTM" or begins_at_zero)
        return (-1.0, 1.0) if is_bounded and has_usual_activations(node) else None


def _filled_with(node: onnx.NodeProto) -> Range:
    values = [float(numpy_helper.to_array(a.t).item()) for a in node.attribute if a.name == "value"]
    return (values[0], values[0]) if values else (0.0, 0.0)


def has_usual_activations(node: onnx.NodeProto) -> bool:
    """Whether an LSTM or GRU computes with sigmoid and tanh where everybody does."""
    usual = _RECURRENT[node.op_type]
    said: list[bytes] = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "activations"), [])
    names = [name.decode().lower() for name in said]
    return names in ([], *([name.lower() for name in usual * directions] for directions in (1, 2)))
