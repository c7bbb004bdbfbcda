"""Whether models can run on CUDA here: what `--device auto` decides by, and why `--device cuda` may be refused."""

from __future__ import annotations

from variants.hardware import Hardware
from variants.runtimes.onnxruntime_runtime import can_use_cuda


def why_not_cuda(hardware: Hardware) -> str | None:
    """Why models cannot run on CUDA here, or None. The reference runs on ONNX Runtime, so what that cannot is out."""
    if not hardware.cuda:
        return "there is no CUDA device here that CUDA_VISIBLE_DEVICES lets us see"

    if not can_use_cuda():
        return f"the ONNX Runtime installed here cannot use {hardware.cuda[0].name}; install the extra `gpu`"
    return None
