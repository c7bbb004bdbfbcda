"""The ways to execute an artefact; see `runtime.py` for the protocol that each keeps."""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.runtimes.openvino_runtime import OpenVino
from variants.runtimes.runtime import Runtime
from variants.runtimes.tensorrt_runtime import TensorRt
from variants.runtimes.torch_runtime import TorchRuntime

_DISTRIBUTIONS = {  # one runtime may come under several names
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "torch": ("torch",),
}


def available_runtimes(concurrency: int = 1) -> dict[str, Runtime]:
    """The runtimes that are installed, by name; none of them is imported before it loads an artefact.

    `concurrency` is how many executors will call one session at the same time.
    """
    runtimes: list[Runtime] = [OnnxRuntime(), OpenVino(concurrency), TensorRt(), TorchRuntime()]
    return {runtime.name: runtime for runtime in runtimes if importlib.util.find_spec(runtime.name) is not None}


def runtime_version(name: str) -> str:
    """The installed version of a runtime, for profiles and cards. Raises KeyError for a name that is no runtime."""
    for distribution in _DISTRIBUTIONS[name]:
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return "unknown"
