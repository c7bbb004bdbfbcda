"""Where models run when nobody says so, and what is refused when somebody does."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest

from server.app import StartError, _device, _host
from server.settings import Settings
from variants.hardware import CudaDevice, Hardware

Gpus = tuple[CudaDevice, ...]
GPU = (CudaDevice("NVIDIA L4"),)


@pytest.mark.parametrize(
    ("cuda", "provider", "why"),
    [
        ((), "CUDAExecutionProvider", "no CUDA device here that CUDA_VISIBLE_DEVICES lets us see"),
        (GPU, "CPUExecutionProvider", "ONNX Runtime installed here cannot use NVIDIA L4"),
        (GPU, "CUDAExecutionProvider", ""),
    ],
)
def test_cuda_needs_a_device_and_a_runtime_for_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cuda: Gpus,
    provider: str,
    why: str,
) -> None:
    """`auto` means CUDA only where both are there, and else logs one line with the reason; `cuda` refuses with it."""
    caplog.set_level("INFO")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "" if not cuda else "0")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [provider])
    hardware = Hardware(cores=2, cpu="test", cuda=cuda)
    assert _host(Settings(models=tmp_path), hardware, 1, 1).device == ("cpu" if why else "cuda")
    assert [why in record.message for record in caplog.records] == ([True] if why else [])
    explicit = Settings(models=tmp_path, device="cuda")
    if not why:
        assert _device(explicit, hardware) == "cuda"
        return
    with pytest.raises(StartError, match=f"--device cuda: .*{why}"):
        _device(explicit, hardware)


def test_a_host_without_gpus_has_nothing_to_explain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nobody could expect CUDA, the CPU is no news."""
    caplog.set_level("INFO")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert _host(Settings(models=tmp_path), Hardware(cores=2, cpu="test"), 1, 1).device == "cpu"
    assert not caplog.records
