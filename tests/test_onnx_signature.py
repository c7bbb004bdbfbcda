"""What an ONNX file says of its inputs, outputs and batch axis, and which files are refused unread."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper
from onnx_files import Shape, load, needs_openvino, save, tensor

from variants.runtimes.runtime import RuntimeUnavailable
from variants.variant import TensorSpec

BATCH_AXES = {
    "one symbol": ([["n", 2]], [["n", 3]], True),
    "two inputs, one symbol": ([["n", 2], ["n", 3]], [["n", 3]], True),
    "named and unnamed": ([["n", 2]], [[None, 3]], True),
    "two symbols": ([["n", 2], ["m", 2]], [["n", 2]], False),
    "fixed input": ([[1, 2]], [["n", 2]], False),
    "fixed output": ([["n", 2]], [[1]], False),
    "scalar output": ([["n", 2]], [[]], False),
    "scalar input": ([["n", 2], []], [["n"]], False),
    "only another dimension varies": ([[1, "n"]], [[1, "n"]], False),
}


@pytest.mark.parametrize(("inputs", "outputs", "expected"), BATCH_AXES.values(), ids=BATCH_AXES.keys())
def test_batch_axis(tmp_path: Path, inputs: list[Shape], outputs: list[Shape], expected: bool) -> None:
    """Dim 0 is a batch exactly if it varies in every input and output under one name."""
    n_in, n_out = range(len(inputs)), range(len(outputs))
    ins = [tensor(f"x{n}", inputs[n]) for n in n_in]
    nodes = [helper.make_node("Sum", [f"x{n}" for n in n_in], ["s"])]
    nodes += [helper.make_node("Reshape", ["s", "shape"], [f"y{n}"]) for n in n_out]
    shape = helper.make_tensor("shape", TensorProto.INT64, [1], [-1])
    path = save(tmp_path / "m.onnx", nodes, ins, [tensor(f"y{n}", outputs[n]) for n in n_out], [shape])
    from variants.runtimes.onnx_signature import read_signature

    assert read_signature(path).batch_axis is expected


def test_a_weight_among_the_inputs_is_no_input(tmp_path: Path) -> None:
    """Old files list their weights among the inputs; a client need not send them."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    node = helper.make_node("Add", ["x", "w"], ["y"])
    ins = [tensor("x", ["n", 2]), tensor("w", [2])]
    session = load(save(tmp_path / "m.onnx", [node], ins, [tensor("y", ["n", 2])], [weight]))
    assert [spec.name for spec in session.inputs] == ["x"]
    assert session.run({"x": np.zeros((1, 2), np.float32)})[0].tolist() == [[1, 2]]


def test_an_output_without_a_shape(tmp_path: Path) -> None:
    """A shape that the file leaves out is inferred where possible, so such a model batches too."""
    node = helper.make_node("Relu", ["x"], ["y"])
    session = load(save(tmp_path / "m.onnx", [node], [tensor("x", ["n", 2])], [tensor("y", None)]))
    assert session.outputs == (TensorSpec("y", "FP32", (-1, 2)),)
    assert session.batch_axis


def external(path: Path, *, inner: bool) -> Path:
    """A model whose weight lies in another file, in the graph itself or in a branch."""
    weight = helper.make_tensor("w", TensorProto.FLOAT, [2], [1, 2])
    weight.ClearField("float_data")
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../secret.bin")
    if not inner:
        add = helper.make_node("Add", ["x", "w"], ["y"])
        return save(path, [add], [tensor("x", ["n", 2])], [tensor("y", ["n", 2])], [weight])
    constant = helper.make_node("Constant", [], ["c"], value=weight)
    branch = helper.make_graph([constant], "branch", [], [tensor("c", [2])])
    node = helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)
    return save(path, [node], [tensor("x", [], TensorProto.BOOL)], [tensor("y", [2])])


def foreign(path: Path) -> Path:
    """A model with an operator of somebody's own domain."""
    node = helper.make_node("Launch", ["x"], ["y"], domain="evil.corp")
    return save(path, [node], [tensor("x", ["n"])], [tensor("y", ["n"])])


def sequence(path: Path) -> Path:
    """A model that answers with a sequence of tensors."""
    output = helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    return save(path, [helper.make_node("SequenceConstruct", ["x"], ["y"])], [tensor("x", ["n"])], [output])


def shapeless(path: Path) -> Path:
    """A model whose input declares no shape."""
    return save(path, [helper.make_node("Relu", ["x"], ["y"])], [tensor("x", None)], [tensor("y", None)])


def complex_numbers(path: Path) -> Path:
    """A model of a type that the protocol lacks."""
    kind = TensorProto.COMPLEX64
    return save(
        path, [helper.make_node("Identity", ["x"], ["y"])], [tensor("x", ["n"], kind)], [tensor("y", ["n"], kind)]
    )


def garbage(path: Path) -> Path:
    """A file that is no model."""
    path.write_bytes(b"\x00\x01garbage")
    return path


def nothing(path: Path) -> Path:
    """An empty file, which parses as an empty model."""
    path.write_bytes(b"")
    return path


def mistaken(path: Path) -> Path:
    """A model that reads a tensor which nobody makes."""
    return save(path, [helper.make_node("Relu", ["nobody"], ["y"])], [tensor("x", ["n"])], [tensor("y", ["n"])])


REFUSALS = [
    (lambda path: external(path, inner=False), "another file"),
    (lambda path: external(path, inner=True), "another file"),
    (foreign, "custom operator"),
    (sequence, "not a tensor"),
    (shapeless, "no shape"),
    (complex_numbers, "COMPLEX64"),
    (garbage, "not a readable ONNX"),
    (nothing, "no ONNX graph"),
    (mistaken, "nobody"),
    (lambda path: path, "not a readable ONNX"),
]


@pytest.mark.parametrize(("make", "why"), REFUSALS)
@pytest.mark.parametrize("runtime", ["onnxruntime", pytest.param("openvino", marks=needs_openvino)])
def test_refused_models(tmp_path: Path, make: Any, why: str, runtime: str, capfd: pytest.CaptureFixture[str]) -> None:
    """A model that we do not run is refused with the reason, and nothing is printed behind our back."""
    with pytest.raises(RuntimeUnavailable, match=why):
        load(make(tmp_path / "model.onnx"), runtime)
    assert "".join(capfd.readouterr()) == ""
