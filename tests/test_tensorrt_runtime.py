"""TensorRT's own artefact: who may run it, who must not. TensorRT itself has never run these tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from variants.hardware import CudaDevice, Hardware
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.runtimes.openvino_runtime import OpenVino
from variants.runtimes.runtime import Runtime, RuntimeUnavailable
from variants.runtimes.tensorrt_runtime import TensorRt

CPU = Hardware(2, "test", frozenset({"AVX512_VNNI"}))
CUDA = Hardware(2, "test", cuda=(CudaDevice("H200"),))
OURS, PLAIN = Path("model.tensorrt.onnx"), Path("model.onnx")


@pytest.mark.parametrize("runtime", [OnnxRuntime(), OpenVino()])
def test_cpu_runtimes_refuse_the_file_made_for_tensorrt(runtime: Runtime) -> None:
    """Its signed activations would be slow there, and its evidence another's."""
    assert "is for TensorRT" in (runtime.why_not(OURS, "int8", CPU) or "")


def test_tensorrt_runs_only_its_own_file_and_only_on_a_gpu() -> None:
    """Neither the CPU's int8 file nor a host without CUDA is tried."""
    runtime = TensorRt()
    assert runtime.why_not(OURS, "int8", CUDA) is None
    assert runtime.why_not(OURS, "int8", CPU) == "TensorRT needs a CUDA device"
    assert "not model.onnx" in (runtime.why_not(PLAIN, "int8", CUDA) or "")


def test_a_build_without_tensorrt_says_what_to_install(tmp_path: Path) -> None:
    """The ONNX Runtime that is installed here has no such provider, and the reason names the remedy."""
    with pytest.raises(RuntimeUnavailable, match="built without TensorRT; install the extra `gpu`"):
        TensorRt().load(tmp_path / OURS, precision="int8", threads=1, device="cuda")
