"""What the last words of a build are measured with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

from variants.data import Samples
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.source import Source
from variants.summary import _inputs


def test_a_scalar_input_stays_an_array(tmp_path: Path) -> None:
    """A runtime refuses numpy's own scalars, so one sample of a rank-0 input is an array without dimensions."""
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2]), ("s", []))]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "s"], ["y"])], "g", specs, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    samples = Samples({"x": np.ones((3, 2), np.float32), "s": np.full(3, 5, np.float32)})
    source = Source(tmp_path / "g.onnx", read_signature(tmp_path / "g.onnx"), max_batch=0)
    session = OnnxRuntime().load(tmp_path / "g.onnx", precision="fp32", threads=1, device="cpu")
    assert session.run(_inputs(source, samples)(1))[0].tolist() == [5, 5]
