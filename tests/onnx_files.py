"""Small ONNX files, and sessions on them."""

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from variants.runtimes import available_runtimes
from variants.runtimes.runtime import Session

needs_openvino = pytest.mark.skipif("openvino" not in available_runtimes(), reason="the extra `openvino` is absent")
Shape = Sequence[str | int | None] | None


def tensor(name: str, shape: Shape, element: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """A graph's input or output."""
    return helper.make_tensor_value_info(name, element, shape)


def save(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
) -> Path:
    """Write a model and return its path."""
    graph = helper.make_graph(nodes, "test", inputs, outputs, list(weights))
    domains = {node.domain for node in nodes} | {""}
    opsets = [helper.make_opsetid(domain, 1 if domain else 17) for domain in domains]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=9).SerializeToString())
    return path


def identity(folder: Path, shape: Shape, element: int = TensorProto.FLOAT) -> Path:
    """A model that answers with its input."""
    node = helper.make_node("Identity", ["x"], ["y"])
    return save(folder / "model.onnx", [node], [tensor("x", shape, element)], [tensor("y", shape, element)])


def load(artefact: Path, runtime: str = "onnxruntime") -> Session:
    """A session on one CPU thread."""
    return available_runtimes(concurrency=2)[runtime].load(artefact, precision="fp32", threads=1, device="cpu")
