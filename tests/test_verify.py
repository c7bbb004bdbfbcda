"""What a freshly made variant is measured with, and what the verdict says of runtimes that failed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from variants.data import Samples
from variants.hardware import Hardware
from variants.model_config import ModelConfig, RepositoryError
from variants.runtimes.onnxruntime_runtime import OnnxRuntime, OnnxRuntimeSession
from variants.runtimes.runtime import RuntimeUnavailable
from variants.variant import Fidelity, Gate, Verdict
from variants.verify import Verifier

CPU = Hardware(cores=1, cpu="test")


def graph(path: Path, operator: str) -> Path:
    """`x` [batch, 2] to `y` of that shape: itself, or for ReduceMean the mean of all rows of the batch."""
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy"]
    inputs = ["x", "axis"] if operator == "ReduceMean" else ["x"]
    weights = [numpy_helper.from_array(np.array([0], np.int64), "axis")] if operator == "ReduceMean" else []
    nodes = [helper.make_node(operator, inputs, ["mean" if weights else "y"])]
    if weights:
        nodes += [helper.make_node("Shape", ["x"], ["shape"]), helper.make_node("Expand", ["mean", "shape"], ["y"])]
    made = helper.make_graph(nodes, "g", tensors[:1], tensors[1:], weights)
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


class Broken(OnnxRuntime):
    """A runtime that can load nothing."""

    name = "broken"

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OnnxRuntimeSession:
        """It fails."""
        raise RuntimeUnavailable("it is out of order")


@pytest.fixture
def verifier(tmp_path: Path) -> Verifier:
    """A verifier whose reference gives back what it gets, with 100 samples."""
    x = np.random.default_rng(0).normal(size=(100, 2)).astype(np.float32)
    runtimes = {"onnxruntime": OnnxRuntime(), "broken": Broken()}
    reference = graph(tmp_path / "reference.onnx", "Identity")
    return Verifier(ModelConfig(), Samples({"x": x}, None), reference, 8, runtimes, CPU)


def test_what_depends_on_its_batch_is_scored_alone(verifier: Verifier, tmp_path: Path) -> None:
    """The mean over a batch is right for one row only, which is how a server would run it; the card says so."""
    proofs, _ = verifier.verify("v", {"model.onnx": graph(tmp_path / "mean.onnx", "ReduceMean")}, "fp32")
    proof = proofs["onnxruntime"]
    assert (proof.batch_sizes, proof.agreement.value) == ((1,), 1.0)
    assert proof.batch_invariance > 0.1
    same, _ = verifier.verify("w", {"model.onnx": graph(tmp_path / "same.onnx", "Identity")}, "fp32")
    assert same["onnxruntime"].batch_sizes == (8,)


def test_an_output_without_a_row_per_sample_is_refused(verifier: Verifier, tmp_path: Path) -> None:
    """A second output that is one row for the whole batch belongs to no sample, whatever the graph declares.

    The source's mistake stops the build; a variant has nothing proven, and the reason says why.
    """
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 2]) for name in "xy")
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [None, 2])
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    nodes = [helper.make_node("Identity", ["x"], ["y"]), helper.make_node("ReduceMean", ["x", "axis"], ["z"])]
    made = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y, z], [axis]), opset_imports=[helper.make_opsetid("", 18)], ir_version=9
    )
    onnx.save(made, tmp_path / "z.onnx")
    with pytest.raises(RepositoryError, match=r"output 'z' has shape \(1, 2\) for a batch of 8 samples"):
        verifier.verify("fp32", {"model.onnx": tmp_path / "z.onnx"}, "fp32")
    proofs, gate = verifier.verify("v", {"model.onnx": tmp_path / "z.onnx"}, "fp32")
    assert (proofs, gate.verdict) == ({}, Verdict.UNVERIFIED)
    assert "no runtime here could run it: onnxruntime failed: output 'z' of 32 samples has shape [32, 2]" in gate.reason


def test_without_data_nothing_but_the_reference_is_verified(verifier: Verifier) -> None:
    """The verdict says what is missing and how to give it."""
    verifier.evaluation = None
    assert verifier.verify("v", {}, "fp32") == (
        {},
        Gate(Verdict.UNVERIFIED, "there is no evaluation data; add `evaluation:` to model.yaml"),
    )
    assert verifier.verify("fp32", {}, "fp32")[1].verdict is Verdict.PASSED


def test_the_card_describes_how_near_the_answers_are(verifier: Verifier, tmp_path: Path) -> None:
    """The mean over a batch is far from the reference's answers, the same graph is equal, and the reference perfect."""
    files = {"model.onnx": graph(tmp_path / "same.onnx", "Identity")}
    for name in ("v", "fp32"):
        proof = verifier.verify(name, files, "fp32")[0]["onnxruntime"]
        assert proof.fidelity == Fidelity(1, 1, 0, 0, accuracy_drop_rate=0)
    negative = verifier.verify("w", {"model.onnx": graph(tmp_path / "less.onnx", "Neg")}, "fp32")[0]["onnxruntime"]
    assert negative.fidelity is not None
    assert negative.fidelity.least_cosine == pytest.approx(-1)
    assert negative.fidelity.accuracy_drop_rate == 1


def test_answers_of_another_shape_are_not_compared(verifier: Verifier, tmp_path: Path) -> None:
    """A variant with one number where the reference has two has nothing proven, instead of being broadcast."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "n"]) for name in "xy")
    axis = numpy_helper.from_array(np.array([1], np.int64), "axis")
    graph = helper.make_graph([helper.make_node("ReduceMean", ["x", "axis"], ["y"])], "g", [x], [y], [axis])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, tmp_path / "narrow.onnx")
    proofs, gate = verifier.verify("v", {"model.onnx": tmp_path / "narrow.onnx"}, "fp32")
    assert (proofs, gate.verdict) == ({}, Verdict.UNVERIFIED)
    assert "its answers have shape (100, 1), the reference's (100, 2)" in gate.reason


def test_a_failed_runtime_is_named_although_another_works(verifier: Verifier, tmp_path: Path) -> None:
    """The reason keeps what went wrong, for the reference too."""
    for name in ("v", "fp32"):
        _, gate = verifier.verify(name, {"model.onnx": graph(tmp_path / "same.onnx", "Identity")}, "fp32")
        assert gate.reason.endswith("; broken failed: it is out of order")
    assert gate.verdict is Verdict.PASSED
