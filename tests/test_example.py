"""What a model is measured with, and that measurements are remembered for just that."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
import pytest

from server.example import example_inputs
from server.loading import Host, load_model
from server.wire.inference import Signature
from variants.repository import ModelFolder, RepositoryError
from variants.runtimes.onnx_signature import read_signature
from variants.source import open_source
from variants.variant import State


def test_profiles_are_remembered(repository: Path, host: Host, caplog: pytest.LogCaptureFixture) -> None:
    """The second load measures nothing and has the very same profiles; another thread count is measured anew."""
    caplog.set_level(logging.INFO)
    models.add_ladder(repository)
    first = load_model(ModelFolder(repository / "ladder"), host)
    assert "measuring fp32 on onnxruntime, int8-static on onnxruntime" in caplog.text
    caplog.clear()
    again = load_model(ModelFolder(repository / "ladder"), host)
    assert "measuring" not in caplog.text
    assert [v.profile for v in again.variants] == [v.profile for v in first.variants]
    for other in (replace(host, threads=2), replace(host, executors=2)):
        load_model(ModelFolder(repository / "ladder"), other)
        assert "measuring" in caplog.text
        caplog.clear()


def test_a_profile_of_short_inputs_is_not_reused_for_long_ones(repository: Path, host: Host) -> None:
    """Data that shows longer sequences than the invented ones have the model measured anew."""
    folder = models.add(repository, "tokens", models.tokens())
    short = load_model(ModelFolder(folder), host).variants[0].profile
    (folder / "model.yaml").write_text("evaluation: {data: evaluation.npz}")
    np.savez(folder / "1" / "evaluation.npz", ids=np.ones((2, 20000), np.int64), mask=np.ones((2, 20000), np.float32))
    long = load_model(ModelFolder(folder), host).variants[0].profile
    assert short is not None
    assert long is not None
    assert long.latency_ns(32) > 2 * short.latency_ns(32)


def test_data_changed_since_the_build_is_not_measured_with(
    repository: Path, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """A built version's evaluation data are read only if they are the manifest's."""
    (repository / "ladder").mkdir()
    (repository / "ladder" / "model.yaml").write_text("evaluation: {data: evaluation.npz}")
    version = models.add_ladder(repository)
    np.savez(version.path / "evaluation.npz", x=np.ones((3, 256), np.float32))
    load_model(ModelFolder(repository / "ladder"), host)
    assert "'evaluation.npz' is not in the manifest" in caplog.text


def test_real_data_is_measured_with_where_there_is_any(repository: Path, host: Host) -> None:
    """A model that fails on invented inputs loads once evaluation data shows it real ones, of a wider type too."""
    folder = models.add(repository, "picky", models.picky(7))
    with pytest.raises(RepositoryError, match="picky fails on the inputs it is measured with"):
        load_model(ModelFolder(folder), host)
    (folder / "model.yaml").write_text("task: classification\nevaluation: {data: evaluation.npz, target: label}")
    np.savez(folder / "1" / "evaluation.npz", x=np.ones((3, 7)), label=np.zeros(3))
    assert load_model(ModelFolder(folder), host).variants[0].state is State.ELIGIBLE


def test_data_that_does_not_fit_is_reported_and_replaced(
    repository: Path, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    """Evaluation data of another shape is no reason not to serve: the model is measured with synthetic inputs."""
    folder = models.add(repository, "m", models.mlp(16), yaml="evaluation: {data: evaluation.npz}")
    np.savez(folder / "1" / "evaluation.npz", x=np.ones((3, 5), np.float32))
    assert load_model(ModelFolder(folder), host).variants[0].state is State.ELIGIBLE
    assert "profiling with synthetic inputs" in caplog.text


@pytest.mark.parametrize(("most", "shape"), [(32, (512, 4)), (0, (1, 512, 4))])
def test_a_fixed_batch_of_one_is_measured_with_its_real_sample(
    repository: Path, caplog: pytest.LogCaptureFixture, most: int, shape: tuple[int, ...]
) -> None:
    """`x` [1, length, 4] takes the very samples that `build` takes, and sees their length."""
    yaml = f"evaluation: {{data: evaluation.npz}}\nbatching: {{max_batch_size: {most}}}"
    folder = ModelFolder(models.add(repository, "m", models.identity("FP32", (1, "length", 4)), yaml=yaml))
    np.savez(folder.path / "1/evaluation.npz", x=np.full((3, *shape), 7, np.float32))
    version = folder.newest()
    assert open_source(version, None, repository).sample_specs[0].shape == (*shape[:-2], -1, 4)
    graph = read_signature(folder.path / "1/model.onnx")
    example = example_inputs(version, Signature(graph.inputs, graph.outputs, 0))
    assert callable(example)
    assert (example(1)["x"].shape, example(1)["x"].max()) == ((1, 512, 4), 7)
    assert not caplog.records
