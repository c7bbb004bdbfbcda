"""The second artefact of static int8: the same layers and ranges in the form that TensorRT reads.

Rules of this file: as NVIDIA's guide to explicit quantisation asks, zero points are 0 and activations signed; only the
inputs and weights of layers are quantised, each by a pair of its own, and biases never. It is made and checked for
structure on any host; no runtime for a CPU takes it, since signed activations are slow there.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx

from variants.recipes.int8.calibration import Ranges
from variants.recipes.int8.qdq import WEIGHTED, Prepared, insert_qdq, layers_of
from variants.runtimes.runtime import TENSORRT_SUFFIX

TENSORRT_FILE = f"model{TENSORRT_SUFFIX}"
_OPTIONS = {
    "ActivationSymmetric": True,
    "WeightSymmetric": True,
    "AddQDQPairToWeight": True,
    "DedicatedQDQPair": True,
    "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
    "QuantizeBias": False,
}


def tensorrt_layers(prepared: Prepared) -> dict[str, str]:
    """The operators of the nodes that TensorRT computes in 8 bits, by name."""
    return layers_of(onnx.load(prepared.graph).graph, WEIGHTED, prepared.excluded)


def insert_tensorrt_qdq(prepared: Prepared, ranges: Ranges, kept: Collection[str]) -> onnx.ModelProto:
    """The graph in TensorRT's form, with the layers `kept` in floating point."""
    layers = [name for name in tensorrt_layers(prepared) if name not in kept]
    return insert_qdq(prepared.graph, ranges, layers, signed=True, options=_OPTIONS)
