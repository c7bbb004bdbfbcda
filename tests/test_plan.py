"""What makes a variant due for another build, and what does not."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import variants.plan
from variants.hardware import Hardware
from variants.plan import plan
from variants.repository import ModelFolder

CPU = Hardware(cores=1, cpu="test")


def fingerprint(model: Path, yaml: str = "", module: str = "network:make") -> str:
    """The reference's fingerprint of a torch source."""
    (model / "1").mkdir(parents=True, exist_ok=True)
    (model / "1" / "weights.safetensors").write_bytes(b"w")
    (model / "model.yaml").write_text(f'source: {{module: "{module}", weights: weights.safetensors}}\n{yaml}')
    return plan(ModelFolder(model).newest(), CPU, quick=False)[0].fingerprint


def test_files_of_one_name_all_count(tmp_path: Path) -> None:
    """Each of two modules with the same file name changes the fingerprint when it changes."""
    model = tmp_path / "m"
    for folder in ("a", "b"):
        (model / folder).mkdir(parents=True)
        (model / folder / "layers.py").write_text("one = 1")
    found = {fingerprint(model)}
    for folder in ("a", "b"):
        (model / folder / "layers.py").write_text("two = 2")
        found.add(fingerprint(model))
    assert len(found) == 3


def test_an_installed_package_counts_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module deep inside an installed package is code of the source as much as its `__init__`."""
    package = tmp_path / "site" / "gearshift_installed_example"
    (package / "inner").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "inner" / "layers.py").write_text("one = 1")
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path / "site")])
    before = fingerprint(tmp_path / "m", module=f"{package.name}:make")
    (package / "inner" / "layers.py").write_text("two = 2")
    assert fingerprint(tmp_path / "m", module=f"{package.name}:make") != before


def test_a_stranger_in_the_current_folder_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the same name counts only where the model's folder has none, as when it is imported."""
    model, here = tmp_path / "m", tmp_path / "here"
    model.mkdir()
    here.mkdir()
    monkeypatch.chdir(here)
    (model / "network.py").write_text("one = 1")
    before = fingerprint(model)
    (here / "network.py").write_text("another = 1")
    assert fingerprint(model) == before
    (model / "network.py").unlink()
    borrowed = fingerprint(model)
    (here / "network.py").write_text("another = 2")
    assert fingerprint(model) != borrowed


def test_the_code_that_runs_variants_counts() -> None:
    """Evidence is what a runtime answered, so a change of the runtimes' code is a change."""
    assert "runtimes/onnxruntime_runtime.py" in variants.plan._hashes_of(variants.plan._JUDGING)


def test_what_only_serving_reads_rebuilds_nothing(tmp_path: Path) -> None:
    """The queue delay and the SLO leave every variant as it is; the maximum batch size does not."""
    plain = fingerprint(tmp_path / "m")
    assert fingerprint(tmp_path / "m", "batching: {max_queue_delay_ms: 7}\nslo: {latency_ms: 9}") == plain
    assert fingerprint(tmp_path / "m", "batching: {max_batch_size: 7}") != plain


def test_a_recipe_asked_for_twice_has_both_parameters(tmp_path: Path) -> None:
    """Whether such a chain was made or rejected, its card says what was asked of each step."""
    steps = "[{recipe: prune-unstructured, sparsity: 0.3}, {recipe: prune-unstructured, sparsity: 0.6}]"
    fingerprint(tmp_path, f"variants: [fp32, {{name: twice, recipe: {steps}}}]")
    twice = plan(ModelFolder(tmp_path).newest(), CPU, quick=False)[1].parameters
    asked = {name: given["sparsity"] for name, given in twice.items() if isinstance(given, dict)}
    assert asked == {"prune-unstructured": 0.3, "prune-unstructured 2": 0.6}


def test_other_shapes_to_trace_with_make_another_graph(tmp_path: Path) -> None:
    """Evaluation data only judge, but their shapes and types are in the graph that a module is traced into."""
    model, yaml = tmp_path / "m", "evaluation: {data: evaluation.npz}"

    def made(array: np.ndarray) -> str:
        (model / "1").mkdir(parents=True, exist_ok=True)
        np.savez(model / "1/evaluation.npz", x=array)
        fingerprint(model, yaml)
        return plan(ModelFolder(model).newest(), CPU, quick=False)[0].made

    before = made(np.zeros((4, 6), np.float32))
    assert made(np.ones((9, 6), np.float32)) == before
    assert made(np.zeros((4, 7), np.float32)) != before
    assert made(np.zeros((4, 6), np.int64)) != before
