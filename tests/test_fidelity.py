"""Every measure of fidelity against a value computed by hand or by another library."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from factory_fixtures import Built
from pydantic import TypeAdapter
from sklearn.metrics import f1_score

from variants.evaluate import compare
from variants.fidelity import divergence, fidelity, mcnemar, worst_class
from variants.intervals import PairedDrop
from variants.model_config import Metric, Task
from variants.repository import ModelFolder
from variants.variant import Evidence, Fidelity, WorstClass

Array = np.ndarray[Any, Any]


def of(answers: Array, reference: Array, target: Array | None, metric: Metric, task: Task) -> Fidelity:
    """The fidelity of answers, compared as a build would."""
    found = fidelity(compare(answers, reference, target, metric, task), answers, reference, target, metric, task)
    assert all(math.isfinite(value) for value in asdict(found).values() if isinstance(value, float)), "JSON"
    return found


def test_distances_by_hand() -> None:
    """Cosine 0.6 and 1, squared differences 0.16+0.64 and 9 over four numbers, the largest difference 3."""
    reference = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    found = of(np.array([[0.6, 0.8], [0.0, 5.0]], np.float32), reference, None, "cosine", "embedding")
    assert [found.cosine, found.least_cosine] == pytest.approx([0.8, 0.6])
    assert found.mse == pytest.approx((0.16 + 0.64 + 9) / 4)
    assert (found.max_abs_difference, found.not_finite) == (3, 0)
    assert found.accuracy_drop_rate == pytest.approx(0.2)
    assert (found.kl, found.top1, found.macro_f1, found.mcnemar_p, found.worst_class) == (None,) * 5


def test_equal_answers_are_perfect_even_where_they_are_zero() -> None:
    """An answer of zeros has no direction, and yet is as near as can be to itself; a tiny one keeps its direction."""
    answers = np.array([[0, 0], [1e-30, 2e-30], [3, 4]], np.float32)
    found = of(answers, answers, None, "agreement", "embedding")
    assert (found.cosine, found.least_cosine, found.mse, found.max_abs_difference) == (1, 1, 0, 0)
    turned = of(answers, answers[:, ::-1], None, "agreement", "embedding")
    assert turned.least_cosine == pytest.approx(0.8)


LOGITS = np.array([[2.0, 0.0, -1.0], [0.5, 0.4, 0.3]])
OTHERS = np.array([[1.0, 0.5, -1.5], [0.5, 0.4, 0.1]])


def test_divergence_by_hand_and_by_torch() -> None:
    """KL of (3/4, 1/4) from (1/2, 1/2) is ¾·ln 1.5 + ¼·ln 0.5; of logits as torch has it; of equals 0."""
    half, most = np.array([[0.5, 0.5]]), np.array([[0.75, 0.25]])
    assert divergence(half, most) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    ours, theirs = (torch.from_numpy(each).log_softmax(1) for each in (OTHERS, LOGITS))
    wanted = torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    assert divergence(OTHERS, LOGITS) == pytest.approx(float(wanted))
    assert divergence(LOGITS, LOGITS) == 0


def test_divergence_takes_logits_and_probabilities_alike() -> None:
    """A network that ends in softmax diverges by as much as one that does not, rounded to bytes or certain too."""
    softmax = [np.exp(each) / np.exp(each).sum(axis=1, keepdims=True) for each in (OTHERS, LOGITS)]
    assert divergence(*softmax) == pytest.approx(divergence(OTHERS, LOGITS))
    rounded = np.round(softmax[0] * 200) / 200 + 0.002  # no longer a sum of 1
    assert divergence(rounded, softmax[1]) == pytest.approx(divergence(*softmax), rel=0.05)
    certain = np.eye(3)
    assert divergence(certain[[1]], certain[[0]]) == pytest.approx(math.log(1e9))


def test_mcnemar_by_hand() -> None:
    """2 of 12 against 10: twice (1+12+66)/4096; no difference and a balanced one are no evidence at all."""
    assert mcnemar(10, 2) == mcnemar(2, 10) == pytest.approx(2 * (1 + 12 + 66) / 4096)
    assert mcnemar(0, 0) == mcnemar(3, 3) == 1
    assert mcnemar(5, 0) == pytest.approx(2 / 32)
    exact = 2 * sum(math.comb(3000, k) for k in range(1401)) / 2**3000
    assert mcnemar(1600, 1400) == pytest.approx(exact, rel=1e-9)


def one_hot(classes: list[int]) -> Array:
    """Outputs whose largest entry is the given class."""
    return np.eye(3, dtype=np.float32)[classes]


TRUTH = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]
REFERENCE = [0, 0, 0, 0, 1, 1, 1, 0, 2, 1]
VARIANT = [0, 0, 0, 2, 1, 0, 0, 1, 2, 2]


def test_classes_by_hand() -> None:
    """Three lost and two won of ten: top-1 0.7 against 0.8, a rate of 1/8; classes 0 and 1 lose a quarter of recall."""
    found = of(one_hot(VARIANT), one_hot(REFERENCE), np.array(TRUTH), "top1", "classification")
    assert found.top1 == 0.7
    assert found.macro_f1 == pytest.approx(f1_score(TRUTH, VARIANT, average="macro"))
    assert found.accuracy_drop_rate == pytest.approx(0.1 / 0.8)
    assert found.mcnemar_p == mcnemar(3, 2)
    assert found.worst_class in (
        WorstClass(0, PairedDrop(1, 0, 4).interval(), 4),
        WorstClass(1, PairedDrop(2, 1, 4).interval(), 4),
    )


def test_the_worst_class_is_the_one_that_loses_most() -> None:
    """Half of the rarest class is worse than any share of a larger one, although it hardly shows in the mean."""
    truth = np.repeat([0, 1, 2], [90, 8, 2])
    guess = truth.copy()
    guess[[0, 1, 2, 3, 98]] = 1
    assert worst_class(guess, truth, truth) == WorstClass(2, PairedDrop(1, 0, 2).interval(), 2)
    assert worst_class(truth, truth, truth) == WorstClass(0, PairedDrop(0, 0, 90).interval(), 90)
    assert worst_class(truth, guess, truth) == WorstClass(1, PairedDrop(0, 0, 8).interval(), 8), "others even gain"


def test_without_targets_the_references_classes_are_the_truth() -> None:
    """What needs labels is left out; the worst class is the one whose answers changed most."""
    found = of(one_hot(VARIANT), one_hot(REFERENCE), None, "top1", "classification")
    assert (found.top1, found.macro_f1, found.mcnemar_p) == (None, None, None)
    assert found.worst_class == WorstClass(1, PairedDrop(3, 0, 4).interval(), 4)
    assert found.accuracy_drop_rate == pytest.approx(0.5)


def test_what_is_not_finite_is_left_out_and_counted_or_worst() -> None:
    """Of three samples one is NaN: distances of the other two, a cosine of 0 there, and never right."""
    reference, broken = one_hot([0, 1, 2]), one_hot([0, 1, 2])
    broken[0, 1] = np.nan
    broken[1, 1] = 3
    found = of(broken, reference, np.array([0, 1, 2]), "top1", "classification")
    assert (found.not_finite, found.max_abs_difference, found.least_cosine) == (1, 2, 0)
    assert found.mse == pytest.approx(4 / 6)
    assert found.top1 == pytest.approx(2 / 3)
    assert found.worst_class == WorstClass(0, PairedDrop(1, 0, 1).interval(), 1)
    nothing = of(np.full((3, 3), np.inf, np.float32), reference, None, "agreement", "classification")
    assert (nothing.mse, nothing.max_abs_difference, nothing.kl, nothing.not_finite) == (None, None, None, 3)
    assert (nothing.cosine, nothing.accuracy_drop_rate) == (0, 1)


@pytest.mark.parametrize(
    ("answers", "task"),
    [(np.array([["a", "b"], ["c", "d"]], object), "generic"), (np.array([[1, 2], [3, 4]]), "generic")],
)
def test_texts_and_whole_numbers_have_no_distance(answers: Array, task: Task) -> None:
    """Nothing but the drop rate is said of answers that are equal or not."""
    assert of(answers, answers[::-1], None, "agreement", task) == Fidelity(accuracy_drop_rate=1.0)
    assert of(answers, answers, None, "agreement", task) == Fidelity(accuracy_drop_rate=0.0)


def test_a_single_number_has_no_direction() -> None:
    """A regression to one number has distances and no cosine; numbers whose squares overflow stay numbers."""
    reference = np.array([[1.0], [2.0], [4.0]])
    found = of(reference + np.array([[0], [0.5], [0]]), reference, None, "r2", "regression")
    assert (found.cosine, found.max_abs_difference) == (None, 0.5)
    assert found.mse == pytest.approx(0.25 / 3)
    huge = of(reference * 1e200, reference, None, "agreement", "regression")
    assert huge.mse == np.finfo(np.float64).max


def test_it_stands_on_the_card(built_digits: Built) -> None:
    """A built variant's card has it for every runtime, in agreement with what the gate judged."""
    for card in ModelFolder(built_digits.root / "digits").newest().cards().values():
        for proof in card.runtimes.values():
            assert proof.fidelity is not None
            assert proof.fidelity.top1 == pytest.approx(proof.score.value)
            assert proof.fidelity.accuracy_drop_rate == pytest.approx(
                proof.accuracy_drop.value / (proof.score.value + proof.accuracy_drop.value)
            )
            assert proof.fidelity.worst_class is not None


def test_a_card_of_an_older_build_has_none() -> None:
    """Evidence that was written without it is still read."""
    one = {"value": 1.0, "low": 1.0, "high": 1.0}
    older = {"score": one, "agreement": one, "accuracy_drop": one, "samples": 9, "batch_sizes": [1]}
    assert TypeAdapter(Evidence).validate_python({**older, "batch_invariance": 0.0}).fidelity is None
