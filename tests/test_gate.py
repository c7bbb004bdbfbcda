"""The gate: its verdicts, and the sentences that a person reads of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from variants.evaluate import Comparison, compare, explain, faultless_samples, judge, overall
from variants.intervals import PairedDrop, Proportion
from variants.model_config import GateConfig
from variants.variant import Gate, Interval, Verdict

GATE = GateConfig(max_accuracy_drop=0.01, min_agreement=0.98)


def one_hot(classes: list[int], count: int = 3) -> np.ndarray[Any, Any]:
    """Outputs whose largest entry is the given class."""
    return np.eye(count, dtype=np.float32)[classes]


@pytest.mark.parametrize(
    ("drop", "agreement", "samples", "verdict"),
    [
        ((0.0, -0.009, 0.01), (0.99, 0.98, 0.995), 400, Verdict.PASSED),
        ((0.0, -0.009, 0.0101), (0.99, 0.98, 0.995), 400, Verdict.INCONCLUSIVE),
        ((0.0, -0.009, 0.009), (0.99, 0.979, 0.995), 400, Verdict.INCONCLUSIVE),
        ((0.05, 0.0101, 0.09), (0.99, 0.98, 0.995), 30, Verdict.REJECTED),
        ((0.0, -0.009, 0.009), (0.9, 0.8, 0.979), 30, Verdict.REJECTED),
        ((0.05, 0.0, 0.09), (0.99, 0.98, 0.995), 400, Verdict.REJECTED),
        ((0.05, 0.0, 0.09), (0.99, 0.98, 0.995), 300, Verdict.INCONCLUSIVE),
    ],
)
def test_the_gates_verdicts(
    drop: tuple[float, float, float], agreement: tuple[float, float, float], samples: int, verdict: Verdict
) -> None:
    """Bounds decide; a value beyond the gate rejects only where a faultless variant could have passed (381 samples)."""
    assert math.ceil(faultless_samples(GATE)) == 381
    assert judge(Interval(*drop), Interval(*agreement), samples, GATE) is verdict


def test_an_inconclusive_verdict_says_how_many_samples_would_do() -> None:
    """The named number really passes, and one less does not."""
    perfect = compare(one_hot([0, 1] * 50), one_hot([0, 1] * 50), np.array([0, 1] * 50), "top1", "classification")
    gate = explain(perfect, GATE)
    assert gate.verdict is Verdict.INCONCLUSIVE
    assert "about 381 would suffice" in gate.reason
    for n, passes in ((381, True), (380, False)):
        classes = [0] * n
        found = compare(one_hot(classes), one_hot(classes), np.zeros(n, np.int64), "top1", "classification")
        assert (explain(found, GATE).verdict is Verdict.PASSED) is passes


def test_a_gate_of_zero_is_said_to_be_unprovable() -> None:
    """No sample proves a drop of exactly nothing, and the reason says so."""
    perfect = compare(one_hot([0, 1]), one_hot([0, 1]), np.array([0, 1]), "top1", "classification")
    assert "no number of samples can prove this gate" in explain(perfect, GateConfig(max_accuracy_drop=0)).reason


def top1(wrong: int, n: int) -> Comparison:
    """A variant of which `wrong` of `n` answers are so, beside a faultless reference."""
    guess = [1] * wrong + [0] * (n - wrong)
    return compare(one_hot(guess), one_hot([0] * n), np.zeros(n, np.int64), "top1", "classification")


@pytest.mark.parametrize(
    ("wrong", "n", "drop", "agreement", "verdict"),
    [
        (0, 1000, "0.00% [-0.38%, 0.38%]", "100.00% [99.62%, 100.00%]", "passed"),
        (100, 1000, "10.00% [8.29%, 12.02%]", "90.00% [87.98%, 91.71%]", "rejected"),
        (12, 1000, "1.20% [0.69%, 2.09%]", "98.80% [97.91%, 99.31%]", "rejected"),
    ],
)
def test_what_a_person_reads_of_a_settled_verdict(wrong: int, n: int, drop: str, agreement: str, verdict: str) -> None:
    """Both values with their bounds, beside what the gate asks, and the samples: no number is missing to check it."""
    found = explain(top1(wrong, n), GATE)
    said = f"drop {drop} (at most 1.00%), agreement {agreement} (at least 98.00%), {n} samples"
    assert found == Gate(Verdict(verdict), said)


@pytest.mark.parametrize(
    ("wrong", "n", "allowed", "what_would_do"),
    [
        (5, 1000, 0.01, "about 1522 would suffice at these rates"),
        (1, 20, 0.01, "at least 381 are needed to judge"),
        (0, 1000, 0.0, "no number of samples can prove this gate"),
    ],
)
def test_what_a_person_reads_of_an_open_verdict(wrong: int, n: int, allowed: float, what_would_do: str) -> None:
    """After the numbers comes what would settle it, in the three ways that there are."""
    found = explain(top1(wrong, n), GateConfig(max_accuracy_drop=allowed, min_agreement=0.98))
    assert found.verdict is Verdict.INCONCLUSIVE
    assert found.reason.endswith(f" {n} samples; {what_would_do}")


def test_the_number_that_would_suffice_suffices() -> None:
    """At the same rate of one error in two hundred, 1522 samples pass and 1520 do not."""
    errors = PairedDrop(5, 0, 1000), Proportion(995, 1000)
    for samples, verdict in ((1522, Verdict.PASSED), (1520, Verdict.INCONCLUSIVE)):
        drop, agreement = (each.interval(samples / 1000) for each in errors)
        assert judge(drop, agreement, samples, GATE) is verdict


def test_one_passing_runtime_is_enough_and_is_named() -> None:
    """Runtimes differ; the verdict says which one passed."""
    gates = {"a": Gate(Verdict.REJECTED, "bad"), "b": Gate(Verdict.PASSED, "good"), "c": Gate(Verdict.PASSED, "good")}
    assert overall(gates) == Gate(Verdict.PASSED, "b and c: good")
    assert overall({"a": gates["a"], "d": Gate(Verdict.INCONCLUSIVE, "few")}) == Gate(Verdict.INCONCLUSIVE, "d: few")
    assert overall({}).verdict is Verdict.UNVERIFIED
