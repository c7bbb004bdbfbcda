"""What all int8 recipes share: weights are signed bytes per output channel, activations unsigned bytes (U8S8).

Signed activations are never used on a CPU: on x86 their kernels are up to five times slower.
"""

from __future__ import annotations

from variants.hardware import Hardware, needs_reduced_range
from variants.model_config import Section

MATRIX_OPERATORS = ("MatMul", "Gemm")


class Int8(Section):
    """`reduce_range` keeps weights to 7 bits; unsaid, it follows `needs_reduced_range`."""

    reduce_range: bool | None = None

    def reduces_range(self, hardware: Hardware) -> bool:
        """Whether weights keep to 7 bits on this host."""
        return needs_reduced_range(hardware) if self.reduce_range is None else self.reduce_range
