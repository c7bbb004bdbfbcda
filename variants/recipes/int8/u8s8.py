"""What all int8 recipes share: weights are signed bytes per output channel, activations unsigned bytes (U8S8).

Signed activations are never used on a CPU: on x86 their kernels are up to five times slower.
"""

from __future__ import annotations

from pathlib import Path

import onnx

from variants.hardware import Hardware, needs_reduced_range
from variants.model_config import Section
from variants.recipes.recipe import RecipeRejected

MATRIX_OPERATORS = ("MatMul", "Gemm")


_SIXTEEN_BITS = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


def refuse_sixteen_bits(graph: Path) -> None:
    """Raise RecipeRejected for a source in half precision: a CPU computes it in fp32 and would gain nothing sound."""
    weights = onnx.load(graph, load_external_data=False).graph.initializer
    if any(weight.data_type in _SIXTEEN_BITS and len(weight.dims) > 1 for weight in weights):
        raise RecipeRejected("the source has 16-bit weights; int8 is made from fp32 ones: give the fp32 model")


class Int8(Section):
    """`reduce_range` keeps weights to 7 bits; unsaid, it follows `needs_reduced_range`."""

    reduce_range: bool | None = None

    def reduces_range(self, hardware: Hardware) -> bool:
        """Whether weights keep to 7 bits on this host."""
        return needs_reduced_range(hardware) if self.reduce_range is None else self.reduce_range
