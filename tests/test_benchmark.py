"""What a build measures on its host, of which variants, and when."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import Built
from onnx import TensorProto, helper

from variants.benchmark import _inputs, measure_variants
from variants.build import build
from variants.data import Samples
from variants.factory import Options
from variants.hardware import detect_hardware
from variants.measurements import EAGER, Measurements, read_measurements
from variants.model_config import ModelConfig
from variants.repository import ModelFolder, VersionFolder
from variants.runtimes import available_runtimes
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.source import Source
from variants.variant import REFERENCE
from variants.verify import Verifier


def test_a_build_measures_every_variant_that_runs_here(built_digits: Built) -> None:
    """Latencies at 1, 8 and at most `max_batch_size`, on every proven runtime, beside the source's own module."""
    version = ModelFolder(built_digits.root / "digits").newest()
    found = read_measurements(version.path)
    assert found is not None
    assert (found.cpu, found.host) == (detect_hardware().cpu, detect_hardware().fingerprint)
    for name, card in version.cards().items():
        for runtime, measured in found.variants.get(name, {}).items():
            assert measured.profile.batch_sizes == (1, 8, 16)
            assert runtime in card.runtimes or (name, runtime) == (REFERENCE, EAGER)
    assert {"onnxruntime", EAGER} <= set(found.variants[REFERENCE])
    assert "onnxruntime" in found.variants["int8-static"]


def test_the_fastest_are_looked_at_more_closely(built_digits: Built) -> None:
    """fp32 and each variant have a peak memory and layers, under the names of the graph's nodes or the module's."""
    version = ModelFolder(built_digits.root / "digits").newest()
    found = read_measurements(version.path)
    assert found is not None
    for name, runtimes in found.variants.items():
        peaks = [measured.peak_memory_bytes for measured in runtimes.values() if measured.peak_memory_bytes]
        assert all(version.card(name).size_bytes < peak < 1e9 for peak in peaks)  # type: ignore[union-attr]
        assert 1 <= len(peaks) <= 2
        assert runtimes["onnxruntime"].layers
    reference = onnx.load(version.artefact(REFERENCE, "model.onnx"))
    nodes = {node.name for node in reference.graph.node if node.op_type in ("Conv", "Gemm")}
    assert nodes <= {layer.name for layer in found.variants[REFERENCE]["onnxruntime"].layers}
    assert {"0", "4", "7", "9"} <= {layer.name for layer in found.variants[REFERENCE][EAGER].layers}


@pytest.mark.slow
def test_a_partial_build_measures_all_again_and_an_idle_one_nothing(onnx_digits: Path) -> None:
    """Speeds of one table come from one set of rounds; with nothing to do, the file is not even written."""
    version = onnx_digits / "1"
    assert build(onnx_digits) == 0
    before = read_measurements(version)
    written = (version / "measurements.json").stat().st_mtime_ns
    assert build(onnx_digits) == 0
    assert (version / "measurements.json").stat().st_mtime_ns == written
    assert build(onnx_digits, only=["int8-dynamic"], options=Options(force=True)) == 0
    after = read_measurements(version)
    assert before is not None
    assert after is not None
    assert {"fp32", "int8-dynamic", "pruned-unstructured"} == after.variants.keys() == before.variants.keys()
    for name, runtimes in after.variants.items():
        assert runtimes.keys() == before.variants[name].keys()
        assert runtimes["onnxruntime"].profile != before.variants[name]["onnxruntime"].profile


def measure(version: VersionFolder, max_batch: int, module: torch.nn.Module | None = None) -> Measurements:
    """What a quick build measures of a version without data."""
    graph = version.artefact(REFERENCE, "model.onnx")
    source = Source(graph, read_signature(graph), max_batch, module)
    verifier = Verifier(ModelConfig(), None, graph, max_batch, available_runtimes(), detect_hardware())
    return measure_variants(version, version.cards(), source, None, verifier, quick=True)


def test_quick_measures_latencies_only(repository: Path) -> None:
    """No memory and no layers; batch sizes end at 32; what fails on the inputs is left out."""
    models.add_variant(repository, "m", REFERENCE, models.mlp(8))
    version = models.add_variant(repository, "m", "other", models.picky(8))
    module, threads = torch.nn.Linear(8, 8), torch.get_num_threads()
    found = measure(version, 64, module)
    assert torch.get_num_threads() == threads
    assert set(found.variants) == {REFERENCE, "other"}
    assert set(found.variants[REFERENCE]) == {"onnxruntime"}, "the module's input has another name"
    measured = found.variants[REFERENCE]["onnxruntime"]
    assert measured.profile.batch_sizes == (1, 8, 32)
    assert (measured.peak_memory_bytes, measured.layers) == (None, ())


def test_a_model_without_a_batch_is_measured_once(repository: Path) -> None:
    """There is one batch size, 1, and a variant that fails is no variant that was measured."""
    models.add_variant(repository, "m", REFERENCE, models.matrix())
    version = models.add_variant(repository, "m", "other", models.matrix(5, 5))
    found = measure(version, 0)
    assert set(found.variants) == {REFERENCE}
    assert found.variants[REFERENCE]["onnxruntime"].profile.batch_sizes == (1,)


def test_a_scalar_input_stays_an_array(tmp_path: Path) -> None:
    """A runtime refuses numpy's own scalars, so one sample of a rank-0 input is an array without dimensions."""
    specs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [2]), ("s", []))]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "s"], ["y"])], "g", specs, [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    samples = Samples({"x": np.ones((3, 2), np.float32), "s": np.full(3, 5, np.float32)})
    source = Source(tmp_path / "g.onnx", read_signature(tmp_path / "g.onnx"), max_batch=0)
    session = OnnxRuntime().load(tmp_path / "g.onnx", precision="fp32", threads=1, device="cpu")
    assert session.run(_inputs(source, samples)(1))[0].tolist() == [5, 5]
