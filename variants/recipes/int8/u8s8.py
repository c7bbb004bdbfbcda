"""What all int8 recipes share: weights are signed bytes per output channel, activations unsigned bytes (U8S8).

Signed activations are never used on a CPU: on x86 their kernels are up to five times slower.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx

from variants.hardware import Hardware, needs_reduced_range
from variants.model_config import Section
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs

MATRIX_OPERATORS = ("MatMul", "Gemm")

_SIXTEEN_BITS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def refuse_sixteen_bits(graph: Path) -> None:
    """Raise RecipeRejected for a source in half precision: a CPU computes it in fp32 and would gain nothing sound."""
    weights = _stored(onnx.load(graph, load_external_data=False).graph)
    if any(weight.data_type in _SIXTEEN_BITS and len(weight.dims) > 1 for weight in weights):
        raise RecipeRejected("the source has 16-bit weights; int8 is made from fp32 ones: give the fp32 model")


def _stored(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """The weights of a graph and of those inside it, and what Constant nodes say that are as large as one."""
    for inner in nested_graphs(graph):
        yield from inner.initializer
        tensors = (a.t for node in inner.node for a in node.attribute if a.type == onnx.AttributeProto.TENSOR)
        yield from (tensor for tensor in tensors if min(tensor.dims, default=1) > 1)


class Int8(Section):
    """`reduce_range` keeps weights to 7 bits; unsaid, it follows `needs_reduced_range`."""

    reduce_range: bool | None = None

    def reduces_range(self, hardware: Hardware) -> bool:
        """Whether weights keep to 7 bits on this host."""
        return needs_reduced_range(hardware) if self.reduce_range is None else self.reduce_range
