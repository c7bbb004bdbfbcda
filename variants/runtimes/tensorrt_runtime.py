"""TensorRT: int8 on an NVIDIA GPU, through ONNX Runtime's provider for it.

Rules: it runs only the files made for it, whose QDQ pairs say exactly what is 8-bit, so no calibration table is read.
ONNX Runtime falls back to another provider in silence; a session that did is refused, since the evidence would be that
provider's. An engine is built for the batch sizes that come, so the first batches of a new size are slow: profiling at
load takes that cost.
"""

from __future__ import annotations

from pathlib import Path

from variants.hardware import Hardware
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.onnxruntime_runtime import OnnxRuntimeSession, session_options
from variants.runtimes.runtime import TENSORRT_SUFFIX, RuntimeUnavailable

_PROVIDER = "TensorrtExecutionProvider"


class TensorRt:
    """Runs int8 on a CUDA device."""

    name = "tensorrt"
    suffix = ".onnx"

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """The reason not to try, or None; whether the provider loads is left to `load`."""
        if not artefact.name.endswith(TENSORRT_SUFFIX) or precision != "int8":
            return f"TensorRT runs the int8 files made for it here (*{TENSORRT_SUFFIX}), not {artefact.name}"
        return None if hardware.cuda else "TensorRT needs a CUDA device"

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OnnxRuntimeSession:  # noqa: ARG002
        """A session on a CUDA device. Raises RuntimeUnavailable with a reason."""
        import onnxruntime

        if not device.startswith("cuda"):
            raise RuntimeUnavailable(f"TensorRT runs on a CUDA device, not on {device}")
        if _PROVIDER not in onnxruntime.get_available_providers():
            raise RuntimeUnavailable("this ONNX Runtime is built without TensorRT; install the extra `gpu`")
        signature, index = read_signature(artefact), device.partition(":")[2] or "0"
        providers = [
            (_PROVIDER, {"device_id": index, "trt_int8_enable": "1"}),
            ("CUDAExecutionProvider", {"device_id": index}),
            "CPUExecutionProvider",
        ]
        try:
            session = onnxruntime.InferenceSession(artefact, session_options(threads), providers=providers)
        except Exception as error:  # its exceptions share no narrower base class
            raise RuntimeUnavailable(f"TensorRT cannot load {artefact.name}: {error}") from error
        if session.get_providers()[0] != _PROVIDER:
            raise RuntimeUnavailable("ONNX Runtime could not use TensorRT; are its libraries installed?")
        return OnnxRuntimeSession(session, signature)
