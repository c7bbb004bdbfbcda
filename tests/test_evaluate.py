"""Scores, the gate and batch invariance, against values computed by hand or by another library."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from sklearn.metrics import f1_score, r2_score

from variants import scores
from variants.evaluate import (
    Comparison,
    against_itself,
    batch_invariance,
    compare,
    explain,
    run_samples,
)
from variants.intervals import PairedDrop, Proportion, Z
from variants.model_config import GateConfig, RepositoryError
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.scores import macro_f1, r2
from variants.variant import Interval, TensorSpec, Verdict

GATE = GateConfig(max_accuracy_drop=0.01, min_agreement=0.98)


def one_hot(classes: list[int], count: int = 3) -> np.ndarray[Any, Any]:
    """Outputs whose largest entry is the given class."""
    return np.eye(count, dtype=np.float32)[classes]


def test_macro_f1_by_hand_and_by_scikit_learn() -> None:
    """Two classes by hand (2/3 and 4/5), many by scikit-learn."""
    assert macro_f1(np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])) == pytest.approx((2 / 3 + 4 / 5) / 2)
    generator = np.random.default_rng(0)
    truth, guess = generator.integers(0, 7, 200), generator.integers(0, 7, 200)
    assert macro_f1(truth, guess) == pytest.approx(f1_score(truth, guess, average="macro"))


def test_r2_by_scikit_learn_and_clipped() -> None:
    """As scikit-learn weights outputs by variance; worse than the mean is 0, not negative."""
    generator = np.random.default_rng(0)
    truth = generator.normal(size=(50, 3))
    guess = truth + generator.normal(size=(50, 3)) / 3
    assert r2(truth, guess) == pytest.approx(r2_score(truth, guess, multioutput="variance_weighted"))
    assert r2(truth, -truth) == 0.0


def test_top1_is_paired_with_the_reference() -> None:
    """Reference right 3 of 4, variant right 2 of 4, discordant both ways: drop 1/4 from 2 lost and 1 won."""
    target = np.array([0, 1, 2, 0])
    reference, answers = one_hot([0, 1, 2, 1]), one_hot([1, 0, 2, 0])
    found = compare(answers, reference, target, "top1", "classification")
    assert found.drop == PairedDrop(2, 1, 4)
    assert found.score == Proportion(2, 4)
    assert found.agreement == Proportion(1, 4)


def test_without_a_target_the_reference_is_the_truth() -> None:
    """Fidelity: the score is the share of answers like fp32's, and every difference is a loss."""
    found = compare(one_hot([0, 1, 1, 1]), one_hot([0, 1, 2, 1]), None, "top1", "classification")
    assert found.score.interval().value == 0.75
    assert found.drop == PairedDrop(1, 0, 4)


def test_the_reference_drops_by_nothing() -> None:
    """fp32 against itself: drop exactly 0 and agreement exactly 1, its own score with an honest interval."""
    own = against_itself(one_hot([0, 1, 2, 1]), np.array([0, 1, 2, 0]), "top1", "classification")
    assert own.drop.interval() == Interval(0, 0, 0)
    assert own.agreement.interval() == Interval(1, 1, 1)
    assert own.score.interval() == Proportion(3, 4).interval()


def test_macro_f1_of_equal_predictions_still_has_width() -> None:
    """Identical predictions on 20 samples must not prove a drop of exactly zero."""
    answers = one_hot([0, 1, 2, 1, 0] * 4)
    drop = compare(answers, answers, np.array([0, 1, 2, 1, 0] * 4), "macro_f1", "classification").drop.interval()
    assert drop.value == 0
    assert drop.high == pytest.approx(Z * Z / (4 + Z * Z) / 3)  # the rarest of three classes has four samples


def test_cosine_of_embeddings() -> None:
    """Cosine 0.6 by hand; it disagrees with fp32, an equal direction of any length agrees."""
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    found = compare(np.array([[0.6, 0.8], [0.0, 5.0]], np.float32), reference, None, "cosine", "embedding")
    assert found.score.interval().value == pytest.approx(0.8)
    assert found.drop.interval().value == pytest.approx(0.2)
    assert found.agreement == Proportion(1, 2)


def test_an_embedding_of_zeros_is_like_itself() -> None:
    """It has no direction, and yet an equal answer agrees; one of the same length elsewhere does not."""
    zeros, ones = np.zeros((2, 3), np.float32), np.ones((2, 3), np.float32)
    assert compare(zeros, zeros, None, "cosine", "embedding").agreement == Proportion(2, 2)
    assert compare(zeros, ones, None, "cosine", "embedding").agreement == Proportion(0, 2)
    assert scores.cosines(ones, ones / 0.5).tolist() == pytest.approx([1, 1])
    endless = np.full((2, 3), np.inf)
    assert scores.cosines(endless, endless).tolist() == [0, 0], "what is not finite points nowhere"


def test_answers_that_are_not_numbers_are_wrong() -> None:
    """A variant that answers NaN gets no score for it."""
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    broken = compare(np.full((2, 2), np.nan, np.float32), reference, None, "cosine", "embedding")
    assert broken.score.interval().value == 0.0
    assert broken.agreement == Proportion(0, 2)


class BatchMean:
    """A session whose answers depend on who shares the batch, as with one activation scale per tensor."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs: tuple[TensorSpec, ...] = inputs
    batch_axis = True

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [inputs["x"] - inputs["x"].mean()]


class Doubler:
    """A session that treats every sample alone, with or without a batch dimension."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs: tuple[TensorSpec, ...] = inputs
    batch_axis = True

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [inputs["x"] * 2]


def test_batch_invariance_sees_batch_mates() -> None:
    """A sample's answer that changes in company is measured; one that does not is exactly 0."""
    x = {"x": np.array([[0, 0], [4, 4]], np.float32)}
    assert batch_invariance(BatchMean(), x, 2) == 2.0
    assert batch_invariance(Doubler(), x, 2) == 0.0


class Summing(Doubler):
    """A session whose second output is one row for the whole batch."""

    outputs: tuple[TensorSpec, ...] = (*Doubler.outputs, TensorSpec("sum", "FP32", (-1, 2)))

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [inputs["x"], inputs["x"].sum(axis=0, keepdims=True)]


def test_an_output_of_another_shape_in_a_batch_is_no_difference_but_an_error() -> None:
    """It is not broadcast into a number: no answer of it belongs to a sample, and the output is named."""
    wanted = r"output 'sum' of 6 samples has shape \[6, 2\] one by one and \[2, 2\] in batches of 4"
    with pytest.raises(ValueError, match=wanted):
        batch_invariance(Summing(), {"x": np.ones((6, 2), np.float32)}, 4)


@pytest.mark.parametrize("batch", [0, 1, 3, 32])
def test_all_samples_are_run_once_in_order(batch: int) -> None:
    """Whatever the batch size, the last smaller batch included, and without a batch dimension."""
    x = np.arange(14, dtype=np.float32).reshape(7, 2)
    assert np.array_equal(run_samples(Doubler(), {"x": x}, batch)[0], x * 2)


@pytest.mark.parametrize("metric", ["top1", "macro_f1", "agreement"])
def test_a_row_that_is_not_finite_is_never_right(metric: Any) -> None:
    """A NaN or infinite row counts neither as class 0, which is the truth here, nor as fp32's own such row."""
    reference, labels = one_hot([0, 0, 0, 0]), np.zeros(4, np.int64)
    broken = reference.copy()
    broken[0, 1], broken[1, 0] = np.nan, np.inf
    found = compare(broken, reference, labels, metric, "classification")
    assert found.agreement.interval().value == 0.5
    assert found.drop.interval().value > 0.3
    assert compare(broken, broken, None, metric, "classification").agreement.interval().value == 0.5


def test_a_regression_with_one_nan_has_no_r2_and_does_not_agree_there() -> None:
    """The sample disagrees and the variant's r2 is 0: its error has no bound."""
    reference = np.arange(8, dtype=np.float32).reshape(4, 2)
    broken = reference.copy()
    broken[2, 0] = np.nan
    found = compare(broken, reference, None, "r2", "regression")
    assert (found.score.interval().value, found.agreement.interval().value) == (0.0, 0.75)


@pytest.mark.parametrize(("metric", "task"), [("cosine", "embedding"), ("r2", "regression")])
def test_few_samples_prove_little_by_any_metric(metric: Any, task: Any) -> None:
    """Two perfect answers leave the drop as wide as Tango's interval would: no bootstrap of equals is certain."""
    answers = np.array([[1.0, 2.0], [3.0, 5.0]], np.float32)
    drop = compare(answers, answers, None, metric, task).drop.interval()
    assert drop.high == pytest.approx(Z * Z / (2 + Z * Z))


RARE = np.repeat([0, 1], [990, 10])


def with_lost(lost: int) -> Comparison:
    """Two classes, 990 and 10 samples; the variant misses `lost` of the rare one, the reference nothing."""
    guess = RARE.copy()
    guess[990 : 990 + lost] = 0
    return compare(one_hot(guess.tolist(), 2), one_hot(RARE.tolist(), 2), RARE, "macro_f1", "classification")


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.3])
def test_a_rare_class_widens_macro_f1(rate: float) -> None:
    """Whatever share of a class with 10 of 1000 samples is lost, the interval holds the truth 19 times in 20."""
    true = 1 - (2 * 0.99 / (2 * 0.99 + 0.01 * rate) + 2 * (1 - rate) / (2 - rate)) / 2
    covered = 0.0
    for lost in range(9):  # more has no probability worth counting
        drop = with_lost(lost).drop.interval()
        probability = math.comb(10, lost) * rate**lost * (1 - rate) ** (10 - lost)
        covered += probability * (drop.low <= true <= drop.high)
    assert covered > 0.95


def test_ten_samples_of_a_class_prove_no_gate_and_reject_nobody() -> None:
    """Neither no error nor one among the ten settles a gate of 1 %: more samples would, and the reason says so."""
    none, one = (explain(with_lost(lost), GATE) for lost in (0, 1))
    assert (none.verdict, one.verdict) == (Verdict.INCONCLUSIVE, Verdict.INCONCLUSIVE)
    assert "would suffice" in none.reason
    assert "are needed to judge" in one.reason


@pytest.mark.parametrize("lost", [0, 1, 3, 5, 10, 20])
def test_balanced_macro_f1_is_bounded_like_top1(lost: int) -> None:
    """With balanced classes both count errors, and both bound the drop of the same answers alike."""
    truth = np.repeat([0, 1], 500)
    guess = truth.copy()
    guess[500 - lost // 2 : 500 - lost // 2 + lost] ^= 1
    by_class, by_sample = (
        compare(one_hot(guess.tolist(), 2), one_hot(truth.tolist(), 2), truth, metric, "classification").drop.interval()
        for metric in ("macro_f1", "top1")
    )
    assert by_class.high == pytest.approx(by_sample.high, rel=0.15)


def test_a_class_number_beside_the_right_one_is_wrong() -> None:
    """Whole numbers have no distance: 500 answers that are off by one of 1000 agree nowhere."""
    reference = np.random.default_rng(0).integers(1, 1000, 500)
    assert compare(reference - 1, reference, None, "agreement", "generic").agreement == Proportion(0, 500)
    assert compare(reference, reference, None, "agreement", "generic").agreement == Proportion(500, 500)


def test_texts_agree_when_the_whole_row_does() -> None:
    """One other word in a row is another answer; a metric that needs numbers says so."""
    reference = np.array([["a", "b"], ["c", "d"]], object)
    answers = np.array([["a", "b"], ["c", "x"]], object)
    assert compare(answers, reference, None, "agreement", "generic").agreement == Proportion(1, 2)
    with pytest.raises(RepositoryError, match="texts have no distance"):
        compare(answers, reference, None, "r2", "generic")


class Flattener:
    """A session whose output has another number of rows than its input."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs: tuple[TensorSpec, ...] = inputs
    batch_axis = True

    def run(self, inputs: Mapping[str, np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        return [inputs["x"].reshape(-1)]


def test_output_rows_are_no_samples() -> None:
    """Seven samples that answer in fourteen rows would count as fourteen: refused with the shape."""
    with pytest.raises(ValueError, match=r"one row per sample; 4 gave \[8\]"):
        run_samples(Flattener(), {"x": np.ones((7, 2), np.float32)}, 4)


def test_a_sample_may_be_a_single_number(tmp_path: Path) -> None:
    """Without a batch, an input without dimensions reaches the runtime as an array."""
    x, s = (helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in (("x", [4]), ("s", [])))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    graph = helper.make_graph([helper.make_node("Mul", ["x", "s"], ["y"])], "g", [x, s], [y])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, tmp_path / "g.onnx")
    session = OnnxRuntime().load(tmp_path / "g.onnx", precision="fp32", threads=1, device="cpu")
    inputs = {"x": np.ones((3, 4), np.float32), "s": np.array([1, 2, 3], np.float32)}
    assert run_samples(session, inputs, 0)[0][:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize(("name", "width"), [("r2_of", 3), ("r2_of", 100), ("macro_f1_of", 1)])
def test_a_weighed_resample_scores_like_its_copy(name: str, width: int) -> None:
    """Counting a sample twice gives what a copy of it would, for outputs wider than there are samples too."""
    generator = np.random.default_rng(0)
    counts = np.bincount(generator.integers(0, 40, 40), minlength=40)
    truth: Any = generator.integers(0, 5, 40)
    guess: Any = generator.integers(-1, 5, 40)
    plain: Any = macro_f1
    if name == "r2_of":
        plain, truth = r2, generator.normal(size=(40, width)) + 5
        guess = truth + generator.normal(size=(40, width)) / 3
        guess[counts.argmin()] = np.nan  # never drawn
    copied = plain(np.repeat(truth, counts, axis=0), np.repeat(guess, counts, axis=0))
    assert getattr(scores, name)(truth, guess)(counts[None].astype(float))[0] == pytest.approx(copied)


@pytest.mark.parametrize("shape", [(64, 100_000), (2500, 2500)])
def test_wide_answers_are_never_all_in_double_precision(shape: tuple[int, int]) -> None:
    """Comparing takes less memory than one copy of the answers as doubles would, be they wide or wide and long."""
    truth = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    guess = truth + np.float32(0.01)
    tracemalloc.start()
    score = scores.r2_of(truth, guess)(np.ones((1, shape[0])))[0]
    agrees = compare(guess, truth, None, "agreement", "regression").agreement
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert score == pytest.approx(1 - 0.01**2, abs=1e-3)
    assert agrees == Proportion(shape[0], shape[0])
    assert peak < truth.size * 8
