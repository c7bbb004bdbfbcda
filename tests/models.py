"""Small ONNX models that tests serve: one per thing that a client may send, and one whose work a request decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from variants.repository import ManifestEntry, ModelFolder, VersionFolder, file_sha256
from variants.variant import REFERENCE, Card, Evidence, Gate, Interval, Verdict

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}
"""V2 datatype -> ONNX element type: every one that the protocol has."""

Shape = Sequence[int | str]


def add(repository: Path, name: str, model: onnx.ModelProto, *, version: int = 1, yaml: str = "") -> Path:
    """Drop a model into a repository as a bare `NAME/VERSION/model.onnx`; returns the model's folder."""
    folder = repository / name
    (folder / str(version)).mkdir(parents=True, exist_ok=True)
    onnx.save(model, folder / str(version) / "model.onnx")
    if yaml:
        (folder / "model.yaml").write_text(yaml)
    return folder


def identity(datatype: str, shape: Shape = ("batch", "n")) -> onnx.ModelProto:
    """`x` comes back as `y`."""
    element = ONNX_TYPES[datatype]
    return _model(
        [helper.make_node("Identity", ["x"], ["y"])],
        [helper.make_tensor_value_info("x", element, shape)],
        [helper.make_tensor_value_info("y", element, shape)],
    )


def mlp(width: int = 16, layers: int = 2, seed: int = 0) -> onnx.ModelProto:
    """`x` [batch, width] to `y` of the same shape through dense layers: work that grows with the batch."""
    generator = np.random.default_rng(seed)
    nodes, weights, value = [], [], "x"
    for layer in range(layers):
        matrix = (generator.standard_normal((width, width)) / width**0.5).astype(np.float32)
        weights.append(numpy_helper.from_array(matrix, f"w{layer}"))
        output = "y" if layer == layers - 1 else f"h{layer}"
        nodes.append(helper.make_node("MatMul", [value, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Tanh", [f"m{layer}"], [output]))
        value = output
    return _model(nodes, [_float("x", ("batch", width))], [_float("y", ("batch", width))], weights)


def tokens() -> onnx.ModelProto:
    """`ids` INT64 and `mask` FP32 [batch, length] to their product `masked` and its `sum` [batch, 1]."""
    shape = ("batch", "length")
    nodes = [
        helper.make_node("Cast", ["ids"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "mask"], ["masked"]),
        helper.make_node("ReduceSum", ["masked", "axis"], ["sum"], keepdims=1),
    ]
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, shape), _float("mask", shape)]
    outputs = [_float("masked", shape), _float("sum", ("batch", 1))]
    return _model(nodes, inputs, outputs, [numpy_helper.from_array(np.array([1], np.int64), "axis")])


def matrix(rows: int = 2, columns: int = 3) -> onnx.ModelProto:
    """No batch dimension: `x` [rows, columns] doubled as `y`."""
    nodes = [helper.make_node("Add", ["x", "x"], ["y"])]
    return _model(nodes, [_float("x", (rows, columns))], [_float("y", (rows, columns))])


def turns() -> onnx.ModelProto:
    """Runs as many turns of a loop as `turns` INT64 [1] says, some microseconds each: work that a test can choose."""
    scalar: tuple[int, ...] = ()
    body = helper.make_graph(
        [helper.make_node("Mul", ["value", "factor"], ["grown"]), helper.make_node("Identity", ["go"], ["on"])],
        "turn",
        [
            helper.make_tensor_value_info("index", TensorProto.INT64, scalar),
            helper.make_tensor_value_info("go", TensorProto.BOOL, scalar),
            _float("value", (1,)),
        ],
        [helper.make_tensor_value_info("on", TensorProto.BOOL, scalar), _float("grown", (1,))],
        [numpy_helper.from_array(np.array([1.0000001], np.float32), "factor")],
    )
    nodes = [
        helper.make_node("Squeeze", ["turns"], ["count"]),
        helper.make_node("Loop", ["count", "", "one"], ["y"], body=body),
    ]
    inputs = [helper.make_tensor_value_info("turns", TensorProto.INT64, (1,))]
    return _model(nodes, inputs, [_float("y", (1,))], [numpy_helper.from_array(np.ones(1, np.float32), "one")])


def picky(size: int = 7) -> onnx.ModelProto:
    """Fails at run time unless `x` [batch, n] has n = `size`, which its signature does not say."""
    weights = numpy_helper.from_array(np.ones((size, 2), np.float32), "w")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    return _model(nodes, [_float("x", ("batch", "n"))], [_float("y", ("batch", 2))], [weights])


def _float(name: str, shape: Shape) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def _model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    weights: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "graph", list(inputs), list(outputs), list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def add_variant(
    repository: Path,
    name: str,
    variant: str,
    model: onnx.ModelProto,
    *,
    score: float = 1.0,
    drop: float = 0.0,
    verdict: Verdict = Verdict.PASSED,
    batch_invariance: float = 0.0,
    requirements: Mapping[str, object] = MappingProxyType({}),
    parameters: Mapping[str, object] = MappingProxyType({}),
) -> VersionFolder:
    """Write a variant as `build` would, with this evidence for ONNX Runtime; the reference comes first."""
    folder = repository / name / "1"
    (folder / "variants").mkdir(parents=True, exist_ok=True)
    version = ModelFolder(repository / name).newest()
    made = folder / f"{variant}.onnx"
    onnx.save(model, made)
    sha256 = file_sha256(made)
    parent = None if variant == REFERENCE else REFERENCE
    evidence = Evidence(
        Interval(score, score, score), Interval(1, 1, 1), Interval(drop, drop, drop), 1000, (1, 8), batch_invariance
    )
    card = Card(
        variant=variant,
        recipe=variant,
        parameters=dict(parameters),
        artefact="model.onnx",
        sha256=sha256,
        parent=parent,
        requirements=dict(requirements),
        size_bytes=made.stat().st_size,
        compressed_bytes=0,
        weights=0,
        flops=0,
        runtimes={} if verdict is Verdict.UNVERIFIED else {"onnxruntime": evidence},
        gate=Gate(verdict, f"the gate says {verdict}"),
        artefacts={"model.onnx": sha256},
    )
    parent_sha256 = version.cards()[REFERENCE].sha256 if parent else None
    version.write_variant(card, {"model.onnx": made}, ManifestEntry(parent_sha256=parent_sha256))
    made.unlink()
    return version


def add_ladder(repository: Path, name: str = "ladder") -> VersionFolder:
    """A slow reference and a faster, less accurate `int8-static`."""
    add_variant(repository, name, REFERENCE, mlp(256, 24), score=0.99)
    return add_variant(repository, name, "int8-static", mlp(256, 2), score=0.95, drop=0.009)
