"""ONNX Runtime: the runtime that is always there, for .onnx on a CPU or a CUDA device.

Rules: one session per variant, shared by all executors (`Run` is stateless and releases the GIL); thread counts are
explicit, since the default starts a thread per core for every session; no custom-operator library is ever loaded.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from variants import datatypes
from variants.hardware import Hardware
from variants.runtimes.onnx_signature import Signature, read_signature
from variants.runtimes.runtime import TENSORRT_SUFFIX, Array, RuntimeUnavailable

_FATAL = 4  # what goes wrong reaches us as an exception; the log would only repeat it on stderr


class OnnxRuntime:
    """Runs fp32 and int8 on a CPU, fp32 and fp16 on CUDA."""

    name = "onnxruntime"
    suffix = ".onnx"

    def why_not(self, artefact: Path, precision: str, hardware: Hardware) -> str | None:
        """The reason not to try, or None; what only the file itself can tell is left to `load`."""
        if artefact.suffix != ".onnx":
            return f"ONNX Runtime reads .onnx files, not {artefact.suffix or artefact.name}"
        if artefact.name.endswith(TENSORRT_SUFFIX):
            return f"{artefact.name} is for TensorRT: its signed activations are slow on a CPU"
        if precision == "bf16":
            return "ONNX Runtime has no bf16 kernels for a CPU"
        if precision == "fp16" and not hardware.cuda:
            return "fp16 needs a CUDA device: on a CPU, ONNX Runtime only casts it to fp32 and back"
        return None

    def load(self, artefact: Path, *, precision: str, threads: int, device: str) -> OnnxRuntimeSession:
        """A session on `device` ("cpu", "cuda", "cuda:N"). Raises RuntimeUnavailable with a reason."""
        import onnxruntime

        signature = read_signature(artefact)
        if device.startswith("cuda") and precision == "int8":
            raise RuntimeUnavailable("ONNX Runtime's CUDA provider has no int8 kernels")
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            session = onnxruntime.InferenceSession(artefact, session_options(threads), providers=providers)
        except Exception as error:  # its exceptions share no narrower base class
            raise RuntimeUnavailable(f"ONNX Runtime cannot load {artefact.name}: {error}") from error
        if session.get_providers()[0] != _provider_name(providers[0]):  # it falls back to the CPU without raising
            raise RuntimeUnavailable(f"ONNX Runtime could not use {device}; is the CUDA runtime installed?")
        return OnnxRuntimeSession(session, signature)


class OnnxRuntimeSession:
    """A loaded ONNX graph; see the `Session` protocol."""

    def __init__(self, session: Any, signature: Signature) -> None:
        self.inputs = signature.inputs
        self.outputs = signature.outputs
        self.batch_axis = signature.batch_axis
        self._session = session
        self._output_names = [spec.name for spec in signature.outputs]
        self._has_bf16 = any(spec.datatype == "BF16" for spec in (*signature.inputs, *signature.outputs))
        if self._has_bf16 and any(spec.datatype == "BYTES" for spec in signature.inputs):
            raise RuntimeUnavailable("ONNX Runtime's Python interface cannot take BYTES beside BF16 tensors")

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """One batch: every input by name, every output in the order of `outputs`."""
        if self._has_bf16:  # the plain call can neither take nor give bf16, since numpy has none
            values = {name: _to_ort_value(array) for name, array in inputs.items()}
            return [_to_array(v) for v in self._session.run_with_ort_values(self._output_names, values)]
        answers: list[np.ndarray[Any, Any]] = self._session.run(self._output_names, dict(inputs))
        return [np.asarray(answer) for answer in answers]  # a scalar string comes as a bare str


def session_options(threads: int) -> Any:
    """Session options: explicit threads, every fusion, nothing that burns cores while idle."""
    from onnxruntime import ExecutionMode, GraphOptimizationLevel, SessionOptions

    options = SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = GraphOptimizationLevel.ORT_ENABLE_ALL  # int8 is only fast once QDQ is fused
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # spinning starves the other threads
    _share_cpu_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.log_severity_level = _FATAL
    return options


@cache
def _share_cpu_memory() -> None:
    """One arena for every session of the process.

    Without one, each batch's intermediate results are mapped and unmapped page by page (measured: 6 % of a CNN's CPU
    time); with one per session, every variant would keep the memory of its largest batch for ever. This one keeps the
    most that all executors together have ever used at once.
    """
    from onnxruntime import OrtAllocatorType, OrtArenaCfg, OrtMemoryInfo, OrtMemType, create_and_register_allocator

    memory = OrtMemoryInfo("Cpu", OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, OrtMemType.DEFAULT)
    default = -1
    create_and_register_allocator(memory, OrtArenaCfg(0, default, default, default))


def can_use_cuda() -> bool:
    """Whether the ONNX Runtime installed here is built for CUDA; not whether there is a GPU."""
    import onnxruntime

    return "CUDAExecutionProvider" in onnxruntime.get_available_providers()


def _providers(device: str, available: list[str]) -> list[str | tuple[str, dict[str, str]]]:
    """The providers of a device, best first. Raises RuntimeUnavailable if this build lacks CUDA."""
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if "CUDAExecutionProvider" not in available:
        raise RuntimeUnavailable("this ONNX Runtime is built without CUDA; install the extra `gpu`")
    return [("CUDAExecutionProvider", {"device_id": device.partition(":")[2] or "0"}), "CPUExecutionProvider"]


def _provider_name(provider: str | tuple[str, dict[str, str]]) -> str:
    return provider if isinstance(provider, str) else provider[0]


def _to_ort_value(array: Array) -> Any:
    """An OrtValue over the array's own memory; the value keeps the array alive."""
    from onnxruntime import OrtValue

    array = np.require(array, requirements="C")
    if array.dtype == ml_dtypes.bfloat16:
        return OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), datatypes.DATATYPES["BF16"].onnx)
    return OrtValue.ortvalue_from_numpy(array)


def _to_array(value: Any) -> np.ndarray[Any, Any]:
    """A numpy copy of an OrtValue on the CPU, bf16 included."""
    if value.data_type() != datatypes.DATATYPES["BF16"].onnxruntime:
        return np.asarray(value.numpy())
    raw = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    return np.frombuffer(bytearray(raw), dtype=ml_dtypes.bfloat16).reshape(value.shape())
