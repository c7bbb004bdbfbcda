"""Peak memory is measured in a process of its own, follows what a variant really needs, and is never guessed."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import onnx
import pytest

from variants import memory
from variants.memory import measure_peak_memory

MB = 1_000_000


def saved(model: onnx.ModelProto, path: Path) -> Path:
    """A model as a file."""
    onnx.save(model, path)
    return path


def noise(*shape: int) -> dict[str, Any]:
    """Inputs for `models.mlp`."""
    return {"x": np.ones(shape, np.float32)}


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_weights_and_batches_take_memory(tmp_path: Path, runtime: str) -> None:
    """16 MB of weights and a batch of 16 MB in and 16 MB out take at least that much more than next to nothing."""
    pytest.importorskip(runtime)
    small, large = saved(models.mlp(8), tmp_path / "s.onnx"), saved(models.mlp(2048, 1), tmp_path / "l.onnx")
    little = measure_peak_memory(small, runtime, "fp32", noise(1, 8))
    much = measure_peak_memory(large, runtime, "fp32", noise(2048, 2048))
    assert little is not None
    assert much is not None
    assert little > 0
    assert much > little + 16 * MB + 32 * MB


def test_every_kind_of_input_reaches_the_process(tmp_path: Path) -> None:
    """bf16 and text arrive in their own types."""
    for datatype, array in (("BF16", np.ones((2, 3), ml_dtypes.bfloat16)), ("BYTES", np.array([["a", "bc"]], object))):
        path = saved(models.identity(datatype), tmp_path / f"{datatype}.onnx")
        assert measure_peak_memory(path, "onnxruntime", "fp32", {"x": array}) is not None


def test_names_collide_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input may be called `file`, and an `onnx.py` in the current folder is not taken for the library."""
    renamed = models.identity("FP32")
    renamed.graph.input[0].name = renamed.graph.node[0].input[0] = "file"
    path = saved(renamed, tmp_path / "file.onnx")
    (tmp_path / "onnx.py").write_text("raise SystemExit('a stranger')")
    monkeypatch.chdir(tmp_path)
    assert measure_peak_memory(path, "onnxruntime", "fp32", {"file": np.ones((2, 3), np.float32)}) is not None


def test_what_goes_wrong_is_not_measured(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Inputs that do not fit, and a process that takes too long: None, and nothing on the terminal."""
    path = saved(models.mlp(8), tmp_path / "m.onnx")
    assert measure_peak_memory(path, "onnxruntime", "fp32", noise(1, 9)) is None
    assert measure_peak_memory(path, "onnxruntime", "fp32", noise(1, 8), seconds=0.01) is None
    assert tuple(capfd.readouterr()) == ("", "")


def test_elsewhere_than_on_linux_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no such files, no process is even started: the artefact is not there either."""
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    monkeypatch.setattr(subprocess, "run", None)
    assert memory.measure_peak_memory(tmp_path / "none.onnx", "onnxruntime", "fp32", noise(1, 8)) is None
