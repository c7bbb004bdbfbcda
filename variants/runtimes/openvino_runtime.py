"""OpenVINO: the optional second runtime for .onnx on a CPU, and the one with bf16 (AMX, AVX512-BF16).

Rules: the precision is always explicit, since its default on a CPU with bf16 is bf16 and an fp32 row would lie; the
wheel reports every import to its maker unless told not to, and we tell it; types that its CPU plugin computes in
something narrower (FP64, UINT32, UINT64) are refused, and INT64 is checked, since it is cut to 32 bits silently.
"""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from variants.hardware import Hardware, possible_precision
from variants.runtimes.onnx_signature import Signature, read_signature
from variants.runtimes.runtime import TENSORRT_SUFFIX, Array, RuntimeUnavailable

_REFUSED = frozenset({"BYTES", "BF16", "FP64", "UINT32", "UINT64"})
_INT32 = np.iinfo(np.int32)


class OpenVino:
    """Runs fp32, int8 and bf16 on a CPU.

    `concurrency` is how many calls a session serves at the same time: one compiled stream, with its own buffers and
    threads, belongs to each, and more callers than streams wait for one another.
    """

    name = "openvino"
    suffix = ".onnx"

    def __init__(self, concurrency: int = 1) -> None:
        self._concurrency = concurrency

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """The reason not to try, or None; what only the file itself can tell is left to `load`."""
        if artefact.suffix != ".onnx":
            return f"OpenVINO reads .onnx files here, not {artefact.suffix or artefact.name}"
        if artefact.name.endswith(TENSORRT_SUFFIX):
            return f"{artefact.name} is for TensorRT: its signed activations are slow on a CPU"
        if importlib.util.find_spec("openvino") is None:
            return "OpenVINO is not installed (the extra `openvino`)"
        if precision == "fp16":
            return "fp16 is never faster than fp32 on a CPU"
        if precision == "bf16":
            amp = possible_precision(hardware, "cpu")
            return None if amp.precision == "bf16" else amp.reason
        return None

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OpenVinoSession:
        """Compile for `threads` threads per call. Raises RuntimeUnavailable with a reason."""
        if device != "cpu":
            raise RuntimeUnavailable(f"OpenVINO runs on the CPU here, not on {device}")
        signature = read_signature(artefact)
        for spec in (*signature.inputs, *signature.outputs):
            if spec.datatype in _REFUSED:
                raise RuntimeUnavailable(f"OpenVINO would change the values of {spec.name!r}, which is {spec.datatype}")
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32",
            "NUM_STREAMS": self._concurrency,
            "INFERENCE_NUM_THREADS": threads * self._concurrency,
            "ENABLE_CPU_PINNING": False,  # pinned threads of several sessions would share the first cores
        }
        try:
            core = _core()
            compiled = core.compile_model(core.read_model(artefact), "CPU", options)
        except Exception as error:  # its exceptions share no narrower base class than RuntimeError
            raise RuntimeUnavailable(f"OpenVINO cannot load {artefact.name}: {error}") from error
        return OpenVinoSession(compiled, signature)


class OpenVinoSession:
    """A compiled model; see the `Session` protocol. Every thread gets its own infer request, which none may share."""

    def __init__(self, compiled: Any, signature: Signature) -> None:
        self.inputs = signature.inputs
        self.outputs = signature.outputs
        self.batch_axis = signature.batch_axis
        self._compiled = compiled
        self._mine = threading.local()
        self._int64 = [spec.name for spec in signature.inputs if spec.datatype == "INT64"]

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """One batch: every input by name, every output in the order of `outputs`.

        Raises OverflowError for INT64 values beyond 32 bits, which OpenVINO would silently cut.
        """
        for name in self._int64:
            array = inputs[name]
            if array.size and not _INT32.min <= int(array.min()) <= int(array.max()) <= _INT32.max:
                raise OverflowError(f"OpenVINO computes {name!r} in 32 bits and a value needs more")
        request = getattr(self._mine, "request", None)
        if request is None:
            request = self._mine.request = self._compiled.create_infer_request()
        feed = {spec.name: inputs[spec.name] for spec in self.inputs}
        answers = request.infer(feed, share_inputs=True, share_outputs=False)
        return [answers[index] for index in range(len(self.outputs))]


@lru_cache(maxsize=1)
def _core() -> Any:
    """The one `Core` of the process, which is never let go.

    Its CPU plugin gives the thread that loads it another signal stack and unmaps that with the last `Core`; the next
    signal to that thread, SIGTERM for one, would then crash the process.
    """
    return _openvino().Core()


def _openvino() -> Any:
    """The package, imported with its telemetry out of reach: without that module it uses its own silent stub."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
