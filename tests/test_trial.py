"""Trials on tuning data: what is set aside for them, and what they foretell."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from recipe_fixtures import product_graph

from variants.data import DataSets, Samples
from variants.model_config import ModelConfig
from variants.trial import Trial, damage


def numbered(count: int) -> Samples:
    """Samples that are their own number."""
    return Samples({"x": np.arange(count, dtype=np.float32)[:, None]}, np.arange(count))


def test_every_eighth_training_sample_is_for_tuning_and_is_not_trained_on() -> None:
    """The two sets are disjoint, together whole, and the tuning set is spread over the file."""
    sets = DataSets(training=numbered(800)).with_tuning()
    assert sets.tuning is not None
    assert sets.training is not None
    tuning, training = set(sets.tuning.target.tolist()), set(sets.training.target.tolist())  # type: ignore[union-attr]
    assert (len(tuning), len(training), tuning & training, tuning | training) == (100, 700, set(), set(range(800)))
    assert {min(tuning), max(tuning)} == {0, 799}


def test_what_is_calibrated_on_is_not_tuned_on() -> None:
    """Calibration samples among the training set are left out of the tuning set; copies are in one set only."""
    twice = numbered(800).take(np.arange(800) // 2)
    sets = DataSets(training=twice, calibration=numbered(100)).with_tuning()
    tuning, training = (set(each.target.tolist()) for each in (sets.tuning, sets.training))  # type: ignore[union-attr]
    assert tuning.isdisjoint(range(100))
    assert tuning.isdisjoint(training)


def test_without_training_data_calibration_data_serve() -> None:
    """An ONNX source has nothing to train on, but choices can still be made."""
    sets = DataSets(calibration=numbered(160)).with_tuning()
    assert (len(sets.tuning or ()), len(sets.calibration or ())) == (20, 140)


def test_given_tuning_data_leave_the_others_whole() -> None:
    """Who gives a tuning set loses no training sample."""
    sets = DataSets(training=numbered(800), tuning=numbered(3)).with_tuning()
    assert (len(sets.tuning or ()), len(sets.training or ())) == (3, 800)


def test_too_few_samples_set_none_aside() -> None:
    """A dozen tuning samples would decide nothing, so none are taken."""
    assert DataSets(training=numbered(100)).with_tuning().tuning is None


def trial(folder: Path, evaluation_samples: int) -> Trial:
    """Three classes, decided by the largest of three inputs; 200 tuning samples."""
    x = np.random.default_rng(0).normal(size=(200, 3)).astype(np.float32)
    config = ModelConfig.model_validate({"task": "classification", "gate": {"max_accuracy_drop": 0.02}})
    graph = product_graph(folder / "reference.onnx", np.eye(3))
    return Trial(graph, Samples({"x": x}, x.argmax(1)), config, 32, evaluation_samples, 1)


def test_a_faultless_candidate_passes_where_the_evaluation_set_could_prove_it(tmp_path: Path) -> None:
    """The forecast is for the size of the evaluation set: no 50 samples can prove 2 %, 5,000 can."""
    twin = product_graph(tmp_path / "twin.onnx", 2 * np.eye(3))
    assert not trial(tmp_path, 50).judge(twin).passes
    tried = trial(tmp_path, 5000).judge(twin)
    assert tried.passes
    assert (tried.drop.value, tried.agreement.value) == (0.0, 1.0)
    assert tried.damage == pytest.approx(1.0)  # twice the answer is as far from it as nothing at all


def test_a_bad_candidate_does_not_pass(tmp_path: Path) -> None:
    """A candidate that swaps two classes is wrong on about two thirds of the samples."""
    swapped = product_graph(tmp_path / "swapped.onnx", np.eye(3)[[1, 0, 2]])
    tried = trial(tmp_path, 5000).judge(swapped)
    assert not tried.passes
    assert 0.5 < tried.drop.value < 0.8


def test_a_candidate_with_other_outputs_is_refused(tmp_path: Path) -> None:
    """Answers of another shape compare with nothing."""
    with pytest.raises(ValueError, match=r"shape \(200, 2\), the reference's \(200, 3\)"):
        trial(tmp_path, 0).judge(product_graph(tmp_path / "narrow.onnx", np.ones((3, 2))))


def test_damage_that_is_not_finite_is_infinite() -> None:
    """NaN answers are the worst there is, not a number that compares as better."""
    assert damage(np.array([[np.nan]]), np.array([[1.0]])) == float("inf")
