"""Who reads a tensor in floating point, and not what its bytes say: whatever stays in floats, and the caller.

Rules of this file: only where that costs an integer kernel nothing, and never where bytes do the work of a ReLU.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import Any

import onnx

RENAMED_OUTPUT = "_QuantizeLinear_Input"
"""What ONNX Runtime appends to the name of a graph output that it quantises."""


def read_floats(
    graph: onnx.GraphProto, before: onnx.GraphProto, nodes: Collection[str], *, writes_floats: Collection[str]
) -> None:
    """Let what stays in floating point, and the caller, read a tensor itself and not what its bytes say.

    Not where the producer's integer kernel only writes bytes, nor where the bytes do the work of a ReLU.
    """
    constants, outputs = ({value.name for value in each} for each in (graph.initializer, graph.output))
    maker_before = {output: node.name for node in before.node for output in node.output}
    makers = {output: node for node in graph.node for output in node.output}
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in set(node.input):
            readers[name].append(node)

    def stays_bytes(tensor: str) -> bool:
        maker = makers.get(tensor)
        if maker is None or maker.name not in nodes:
            return tensor in constants
        did_more = maker_before.get(tensor.removesuffix(RENAMED_OUTPUT)) != maker.name
        return did_more or maker.op_type not in writes_floats

    for quantize in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        if stays_bytes(quantize.input[0]):
            continue
        (dequantize,) = readers[quantize.output[0]]
        if dequantize.output[0] in outputs:
            _give_back_name(graph, quantize, dequantize, readers)
        floats = [reader for reader in readers[dequantize.output[0]] if reader.name not in nodes]
        for reader in floats:
            _rename(reader.input, dequantize.output[0], quantize.input[0])
        if len(floats) == len(readers[dequantize.output[0]]):
            graph.node.remove(quantize)
            graph.node.remove(dequantize)


def _give_back_name(
    graph: onnx.GraphProto,
    quantize: onnx.NodeProto,
    dequantize: onnx.NodeProto,
    readers: dict[str, list[onnx.NodeProto]],
) -> None:
    """A graph output is the tensor before its pair again, and the pair's result gets a name of its own."""
    tensor, output = quantize.input[0], dequantize.output[0]
    after = f"{output}_DequantizeLinear_Output"
    for node in graph.node:
        _rename(node.input, output, after)
        _rename(node.input, tensor, output)
        _rename(node.output, output, after)
        _rename(node.output, tensor, output)
    readers[after], readers[output] = readers.pop(output, []), readers.pop(tensor)


def _rename(names: Any, old: str, new: str) -> None:
    for index, name in enumerate(names):
        if name == old:
            names[index] = new
