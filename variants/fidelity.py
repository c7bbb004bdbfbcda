"""Fidelity: how near a variant's answers are to the reference's, in the measures that the field reports.

Rules of this file: these numbers describe, the gate does not judge by them; the same samples and the same judged
output as in `evaluate`. A bounded measure takes its worst value where an answer is not finite, an unbounded one leaves
that sample out. What is undefined for a kind of answer (texts have no distance) is None, never a number.
"""

from __future__ import annotations

from math import exp, lgamma, log
from typing import Any

import numpy as np

from variants.data import Array
from variants.evaluate import Comparison
from variants.intervals import Floats, PairedDrop
from variants.model_config import Metric, Task
from variants.scores import by_row, classes_of, cosines, finite, flat, has_floats, labels_of, macro_f1, of_samples
from variants.variant import Fidelity, WorstClass

_CLASS_METRICS = ("top1", "macro_f1")
_LEAST_PROBABILITY = 1e-9
_MOST = float(np.finfo(np.float64).max)
"""JSON has no infinity."""


def fidelity(
    comparison: Comparison, answers: Array, reference: Array, target: Array | None, metric: Metric, task: Task
) -> Fidelity:
    """Describe a variant's answers [samples, ...] beside the reference's, whose `comparison` is known."""
    sane = finite(answers) & finite(reference)
    has_classes = task == "classification" or metric in _CLASS_METRICS
    found: dict[str, Any] = {"accuracy_drop_rate": _drop_rate(comparison), "not_finite": int(np.sum(~sane))}
    if has_floats(answers):
        found |= _distances(answers, reference, sane)
        if has_classes and sane.any():
            found["kl"] = divergence(of_samples(answers, sane), of_samples(reference, sane))
    if has_classes:
        labels = labels_of(target, reference) if metric in _CLASS_METRICS and target is not None else None
        found |= _by_class(classes_of(answers), classes_of(reference), labels)
    return Fidelity(**found)


def _drop_rate(comparison: Comparison) -> float | None:
    """The drop as a share of the reference's score; undefined where the reference scores nothing."""
    score, drop = comparison.score.interval().value, comparison.drop.interval().value
    return drop / (score + drop) if score + drop > 0 else None


def _by_class(guess: Array, reference_guess: Array, labels: Array | None) -> dict[str, Any]:
    """What needs class numbers, and what needs the true ones."""
    worst = worst_class(guess, reference_guess, reference_guess if labels is None else labels)
    if labels is None:
        return {"worst_class": worst}
    right, reference_right = guess == labels, reference_guess == labels
    lost, won = int(np.sum(reference_right & ~right)), int(np.sum(right & ~reference_right))
    scores = {"top1": float(np.mean(right)), "macro_f1": macro_f1(labels, guess), "mcnemar_p": mcnemar(lost, won)}
    return {**scores, "worst_class": worst}


def _distances(answers: Array, reference: Array, sane: Array) -> dict[str, float]:
    """Distances of floats; a single number has no direction, so no cosine."""
    found: dict[str, float] = {}
    width = flat(answers).shape[1]
    if width > 1:
        cosine = cosines(answers, reference)
        found |= {"cosine": float(cosine.mean()), "least_cosine": float(cosine.min())}
    if sane.any() and width > 0:
        pair = of_samples(answers, sane), of_samples(reference, sane)
        with np.errstate(over="ignore"):
            squares = by_row(lambda row, other: np.mean((row - other) ** 2, axis=1), *pair)
            largest = by_row(lambda row, other: np.max(np.abs(row - other), axis=1), *pair)
            found |= {"mse": _number(np.mean(squares)), "max_abs_difference": _number(np.max(largest))}
    return found


def _number(value: np.floating[Any]) -> float:
    """What overflowed is the largest number."""
    return float(np.nan_to_num(value, nan=_MOST, posinf=_MOST))


def divergence(answers: Array, reference: Array) -> float:
    """The mean over samples of KL(reference || variant) in nats, of finite logits or probabilities [samples, classes].

    Whether they are probabilities is what the reference's say: a variant's may miss a sum of 1 by rounding.
    """
    sums = by_row(lambda row: np.sum(row, axis=1), reference)
    are_probabilities = bool((reference >= 0).all()) and np.allclose(sums, 1.0, atol=1e-3)

    def of_rows(row: Floats, truth: Floats) -> Floats:
        ours, theirs = (_log_probabilities(each, are_probabilities=are_probabilities) for each in (row, truth))
        return np.asarray(np.sum(np.exp(theirs) * (theirs - ours), axis=1))

    return max(0.0, _number(np.mean(by_row(of_rows, answers, reference))))  # rounding may leave less than nothing


def _log_probabilities(rows: Floats, *, are_probabilities: bool) -> Floats:
    """Log-softmax of logits, or of the logarithms of probabilities, which may be 0."""
    logits = np.log(np.maximum(rows, _LEAST_PROBABILITY)) if are_probabilities else rows
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.sum(np.exp(shifted), axis=1, keepdims=True)))


def mcnemar(lost: int, won: int) -> float:
    """The exact two-sided p-value of McNemar's test (Psychometrika 12, 1947): lost and won samples are equally likely.

    Twice the binomial probability of so few of the rarer kind among all that differ, at most 1.
    """
    n, few = lost + won, min(lost, won)
    ways = [lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1) - n * log(2) for k in range(few + 1)]
    return min(1.0, 2 * sum(exp(way) for way in ways))


def worst_class(guess: Array, reference_guess: Array, truth: Array) -> WorstClass | None:
    """The class whose recall drops most, of several the one with the most samples; None if no sample has a class.

    Its interval is that class's own, paired: it does not allow for having been picked as the worst.
    """
    counted = truth >= 0
    truth, right, reference_right = truth[counted], (guess == truth)[counted], (reference_guess == truth)[counted]
    if not len(truth):
        return None
    samples, lost, won = (
        np.bincount(each, minlength=int(truth.max()) + 1)
        for each in (truth, truth[reference_right & ~right], truth[right & ~reference_right])
    )
    drops = np.where(samples > 0, (lost - won) / np.maximum(samples, 1), -np.inf)
    label = int(np.lexsort((samples, drops))[-1])
    count = int(samples[label])
    return WorstClass(label, PairedDrop(int(lost[label]), int(won[label]), count).interval(), count)
