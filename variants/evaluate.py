"""Evidence and verdicts: how good a variant is on held-out data, compared sample by sample with the reference.

Rules of this file: scores lie in [0, 1], higher is better; an accuracy drop is in absolute points, reference minus
variant on the same samples; the reference answers are fp32's on ONNX Runtime; the first output is the one judged.
An answer that is not finite is never right and agrees with nothing, not even with another such answer.
The gate believes bounds, not point values (see `judge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from variants.data import Array
from variants.intervals import (
    Bootstrapped,
    Estimate,
    Exact,
    Floats,
    PairedDrop,
    Proportion,
    Statistic,
    Undetected,
    Z,
    bootstrap,
    samples_needed,
)
from variants.model_config import GateConfig, Metric, RepositoryError, Task
from variants.runtimes.runtime import Session
from variants.variant import Evidence, Gate, Interval, Verdict

AGREEMENT_COSINE = 0.98
"""An embedding agrees with fp32's when their cosine is at least this."""

AGREEMENT_TOLERANCE = 0.05
"""Any other answer agrees when its distance to fp32's is at most this share of the fp32 answers' RMS."""

INVARIANT = 1e-3
"""The largest absolute difference between an answer alone and in a batch that still counts as none."""

INVARIANCE_SAMPLES = 32
"""How many samples are run alone and together to measure batch invariance."""

_TEXT = "OUS"
_NOT_FLOATS = _TEXT + "biu"  # numpy's kinds


@dataclass(frozen=True, slots=True)
class Comparison:
    """A variant against the reference on the same samples, as estimates that know their intervals."""

    score: Estimate
    agreement: Estimate
    drop: Estimate
    samples: int

    @property
    def worth(self) -> float:
        """How many samples prove as much for a metric that no rare class weakens; at most `samples`."""
        floor = self.drop.floor if isinstance(self.drop, Bootstrapped) else None
        return min(self.samples, floor.worth if floor else self.samples)


def run_samples(session: Session, inputs: Mapping[str, Array], batch_size: int) -> list[Array]:
    """Every output for all samples, [samples, ...]; a `batch_size` of 0 means the model has no batch dimension.

    Raises ValueError when the first output, the one judged, has not one row per sample.
    """
    count = len(next(iter(inputs.values())))
    if batch_size == 0:
        single = [session.run({name: array[row, ...] for name, array in inputs.items()}) for row in range(count)]
        return [np.stack(column) for column in zip(*single, strict=True)]
    starts = range(0, count, batch_size)
    parts = [session.run({name: array[at : at + batch_size] for name, array in inputs.items()}) for at in starts]
    for at, (judged, *_) in zip(starts, parts, strict=True):
        if judged.shape[:1] != (rows := min(batch_size, count - at),):
            raise ValueError(f"the first output must have one row per sample; {rows} gave {list(judged.shape)}")
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def batch_invariance(session: Session, inputs: Mapping[str, Array], batch_size: int) -> float:
    """The largest absolute difference between a sample's answer alone and inside a batch; 0 is bit-equal or near it."""
    if batch_size < 2:
        return 0.0
    some = {name: array[:INVARIANCE_SAMPLES] for name, array in inputs.items()}
    alone, together = run_samples(session, some, 1), run_samples(session, some, batch_size)
    return max(_largest_difference(a, b) for a, b in zip(alone, together, strict=True))


def _largest_difference(a: Array, b: Array) -> float:
    if a.dtype.kind in _TEXT + "b":
        return float(np.any(a != b))
    left, right = a.astype(np.float64), b.astype(np.float64)
    with np.errstate(invalid="ignore"):  # inf - inf
        apart = np.where((left == right) | (np.isnan(left) & np.isnan(right)), 0.0, np.abs(left - right))
    return float(np.max(np.nan_to_num(apart, nan=np.inf), initial=0.0).clip(max=np.finfo(np.float64).max))  # JSON


def compare(answers: Array, reference: Array, target: Array | None, metric: Metric, task: Task) -> Comparison:
    """Score a variant's answers [samples, ...] beside the reference's; without a target the reference is the truth.

    Raises RepositoryError when answers or target do not have the form that the metric needs.
    """
    n = len(answers)
    agrees = np.zeros(n, np.bool_)
    if (sane := _finite(answers) & _finite(reference)).any():
        agrees[sane] = _agrees(answers[sane], reference[sane], task)
    agreement = Proportion(int(agrees.sum()), n)
    if metric == "agreement":
        return Comparison(agreement, agreement, PairedDrop(n - int(agrees.sum()), 0, n), n)
    score = _SCORES[metric]
    return Comparison(*score(answers, reference, target, agreement), n)


def against_itself(answers: Array, target: Array | None, metric: Metric, task: Task) -> Comparison:
    """The reference's own comparison: its drop is 0 and its agreement 1 by definition."""
    own = compare(answers, answers, target, metric, task)
    return Comparison(own.score if target is not None else Exact(1.0), Exact(1.0), Exact(0.0), own.samples)


def _agrees(answers: Array, reference: Array, task: Task) -> npt.NDArray[np.bool_]:
    """Which samples get the same answer: the same class, nearly the same direction, or nearly the same values.

    Between whole numbers, truths and texts there is no "nearly": a class number beside the right one is another class.
    """
    if task == "classification":
        return np.asarray(_classes(answers) == _classes(reference))
    if answers.dtype.kind in _NOT_FLOATS:
        return np.array([np.array_equal(row, other) for row, other in zip(answers, reference, strict=True)])
    if task == "embedding":
        return _cosines(answers, reference) >= AGREEMENT_COSINE
    flat, flat_reference = _rows(answers), _rows(reference)
    scale = np.sqrt(np.mean(np.sum(flat_reference**2, axis=1)))
    return np.asarray(np.linalg.norm(flat - flat_reference, axis=1) <= AGREEMENT_TOLERANCE * scale)


def _finite(values: Array) -> npt.NDArray[np.bool_]:
    """Which samples have no NaN and no infinity in them."""
    if values.dtype.kind in _NOT_FLOATS:
        return np.ones(len(values), np.bool_)
    return np.asarray(np.isfinite(values.reshape(len(values), -1)).all(axis=1))


Estimates = tuple[Estimate, Estimate, Estimate]


def _top1(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = _labels(target, reference)
    right, reference_right = ((found == truth) & (found >= 0) for found in (_classes(answers), _classes(reference)))
    lost, won = int(np.sum(reference_right & ~right)), int(np.sum(right & ~reference_right))
    return Proportion(int(right.sum()), len(truth)), agreement, PairedDrop(lost, won, len(truth))


def _macro_f1(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = _labels(target, reference)
    score, reference_score = (_macro_f1_of(truth, _classes(each)) for each in (answers, reference))
    return _resampled(score, reference_score, agreement, np.unique(truth, return_counts=True)[1])


def _cosine(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = reference if target is None else target
    score, reference_score = (_mean_of(np.maximum(_cosines(each, truth), 0.0)) for each in (answers, reference))
    return _resampled(score, reference_score, agreement, np.array([len(truth)]))


def _r2(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth, guess, reference_guess = _rows(reference if target is None else target), _rows(answers), _rows(reference)
    if truth.shape != guess.shape:
        raise RepositoryError(f"r2 needs a target of the output's shape {guess.shape}, got {truth.shape}")
    if not np.isfinite(truth).all():
        raise RepositoryError("r2 needs finite targets (fp32's own answers where there is no target)")
    return _resampled(_r2_of(truth, guess), _r2_of(truth, reference_guess), agreement, np.array([len(truth)]))


def _resampled(score: Statistic, reference_score: Statistic, agreement: Estimate, classes: Array) -> Estimates:
    """Score and paired drop by bootstrap; a bootstrap of equals has no width, so few samples need a floor.

    `classes` says how many samples each class has.
    """
    floor, n = Undetected(tuple(classes.tolist())), int(classes.sum())
    drop = bootstrap(lambda counts: reference_score(counts) - score(counts), n, floor)
    return bootstrap(score, n, floor), agreement, drop


_SCORES: dict[Metric, Callable[[Array, Array, Array | None, Estimate], Estimates]] = {
    "top1": _top1,
    "macro_f1": _macro_f1,
    "cosine": _cosine,
    "r2": _r2,
}


def macro_f1(truth: Array, guess: Array) -> float:
    """The mean over classes that occur of 2·TP/(2·TP+FP+FN), in [0, 1]; -1 is no answer and so never right."""
    return float(_macro_f1_of(truth, guess)(np.ones((1, len(truth))))[0])


def _macro_f1_of(truth: Array, guess: Array) -> Statistic:
    """`macro_f1` of resamples."""
    classes = int(max(truth.max(), guess.max())) + 1

    def value(counts: Floats) -> float:
        hits, real, guessed = (
            np.bincount(found + 1, weights, classes + 1)[1:]  # without -1
            for found, weights in ((truth, counts * (truth == guess)), (truth, counts), (guess, counts))
        )
        occurs = real + guessed > 0
        return float(np.mean(2 * hits[occurs] / (real + guessed)[occurs])) if occurs.any() else 0.0

    return lambda resamples: np.array([value(counts) for counts in resamples])


def r2(truth: Array, guess: Array) -> float:
    """The coefficient of determination over all outputs [samples, outputs], clipped to [0, 1]; 0 without variance.

    A guess that is not finite is infinitely wrong.
    """
    return float(_r2_of(truth, guess)(np.ones((1, len(truth))))[0])


def _r2_of(truth: Array, guess: Array) -> Statistic:
    """`r2` of resamples, as sums over samples: no resample is copied out, and no product is wider than the counts."""
    centred = truth - truth.mean(axis=0)
    columns = np.array_split(centred, -(-centred.shape[1] // len(truth)) or 1, axis=1)
    squares = np.sum(centred**2, axis=1)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.sum((truth - guess) ** 2, axis=1)
    errors = np.fmin(errors, len(truth) * squares.max())  # beyond this r2 is 0 anyway, and 0 · infinity is no number

    def values(counts: Floats) -> Floats:
        around_zero = counts @ squares
        spread = around_zero - sum(np.sum((counts @ part) ** 2, axis=1) for part in columns) / len(truth)
        varies = spread > 1e-12 * around_zero  # less is what rounding leaves of nothing
        return np.where(varies, np.maximum(0.0, 1 - counts @ errors / np.where(varies, spread, 1.0)), 0.0)

    return values


def _mean_of(values: Floats) -> Statistic:
    return lambda counts: counts @ values / len(values)


def _rows(values: Array) -> Floats:
    if values.dtype.kind in _TEXT:
        raise RepositoryError("texts have no distance; compare them with the metric `agreement`")
    return values.reshape(len(values), -1).astype(np.float64)


def _cosines(a: Array, b: Array) -> Floats:
    left, right = _rows(a), _rows(b)
    if left.shape != right.shape:
        raise RepositoryError(f"cosine needs a target of the output's shape {left.shape}, got {right.shape}")
    sane = (_finite(left) & _finite(right))[:, None]
    left, right = np.where(sane, left, 0.0), np.where(sane, right, 0.0)
    norms = np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    return np.asarray(np.sum(left * right, axis=1) / np.maximum(norms, 1e-30))


def _classes(answers: Array) -> Array:
    """Class numbers [samples], -1 where an answer is not finite."""
    if answers.ndim != 2 or answers.shape[1] < 2 or answers.dtype.kind in _TEXT:
        raise RepositoryError(f"classification needs numbers [batch, classes], got {['batch', *answers.shape[1:]]}")
    return np.where(_finite(answers), answers.argmax(axis=1), -1)


def _labels(target: Array | None, reference: Array) -> Array:
    """Class numbers [samples]: the target, or what the reference says where there is none."""
    if target is None:
        return _classes(reference)
    labels = target.reshape(-1) if target.shape == (len(target), 1) else target
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= reference.shape[1]:
        raise RepositoryError(f"the target must be class numbers 0..{reference.shape[1] - 1}, one per sample")
    return labels.astype(np.int64)


def evidence(comparison: Comparison, batch_sizes: Sequence[int], invariance: float) -> Evidence:
    """The comparison as it stands on the card; a score's interval never leaves [0, 1]."""
    score = comparison.score.interval()
    return Evidence(
        score=Interval(score.value, max(0.0, score.low), min(1.0, score.high)),
        agreement=comparison.agreement.interval(),
        accuracy_drop=comparison.drop.interval(),
        samples=comparison.samples,
        batch_sizes=tuple(batch_sizes),
        batch_invariance=invariance,
    )


def judge(drop: Interval, agreement: Interval, samples: float, gate: GateConfig) -> Verdict:
    """The gate's verdict on one runtime's evidence.

    passed: the drop's upper bound keeps `max_accuracy_drop` and the agreement's lower bound keeps `min_agreement`.
    rejected: even the favourable bound breaks the gate; or a measured value breaks it on a sample large enough for a
    faultless variant to have passed. inconclusive: everything else, which is always a matter of too few samples.
    """
    if drop.high <= gate.max_accuracy_drop and agreement.low >= gate.min_agreement:
        return Verdict.PASSED
    if drop.low > gate.max_accuracy_drop or agreement.high < gate.min_agreement:
        return Verdict.REJECTED
    value_breaks = drop.value > gate.max_accuracy_drop or agreement.value < gate.min_agreement
    if value_breaks and samples >= faultless_samples(gate):
        return Verdict.REJECTED
    return Verdict.INCONCLUSIVE


def faultless_samples(gate: GateConfig) -> float:
    """How many samples a variant without a single differing answer needs to pass; infinite for an impossible gate.

    Both bounds have closed forms there: z²/(n+z²) for Tango's drop, n/(n+z²) for Wilson's agreement.
    """
    tolerance = min(gate.max_accuracy_drop, 1 - gate.min_agreement)
    return Z * Z * (1 - tolerance) / tolerance if tolerance > 0 else float("inf")


def explain(comparison: Comparison, gate: GateConfig) -> Gate:
    """Verdict and reason for one runtime's comparison, with the number of samples that would settle it."""
    drop, agreement = comparison.drop.interval(), comparison.agreement.interval()
    verdict = judge(drop, agreement, comparison.worth, gate)
    measured = (
        f"drop {_percent(drop)} (at most {gate.max_accuracy_drop:.2%}), "
        f"agreement {_percent(agreement)} (at least {gate.min_agreement:.2%}), {comparison.samples} samples"
    )
    if verdict is not Verdict.INCONCLUSIVE:
        return Gate(verdict, measured)

    def passes(scale: float) -> bool:
        d, a = comparison.drop.interval(scale), comparison.agreement.interval(scale)
        return d.high <= gate.max_accuracy_drop and a.low >= gate.min_agreement

    value_breaks = drop.value > gate.max_accuracy_drop or agreement.value < gate.min_agreement
    if value_breaks and np.isfinite(faultless := faultless_samples(gate)):
        least = int(np.ceil(faultless * comparison.samples / comparison.worth))
        return Gate(verdict, f"{measured}; at least {least} are needed to judge")
    needed = None if value_breaks else samples_needed(passes, comparison.samples)
    enough = f"about {needed} would suffice at these rates" if needed else "no number of samples can prove this gate"
    return Gate(verdict, f"{measured}; {enough}")


def _percent(interval: Interval) -> str:
    return f"{interval.value:.2%} [{interval.low:.2%}, {interval.high:.2%}]"


def overall(verdicts: Mapping[str, Gate]) -> Gate:
    """One verdict for a variant from its runtimes': passed if any passes, and the reason says which."""
    for verdict in (Verdict.PASSED, Verdict.INCONCLUSIVE, Verdict.REJECTED):
        runtimes: dict[str, list[str]] = {}
        for runtime, gate in verdicts.items():
            if gate.verdict is verdict:
                runtimes.setdefault(gate.reason, []).append(runtime)
        if runtimes:
            return Gate(verdict, "; ".join(f"{' and '.join(names)}: {reason}" for reason, names in runtimes.items()))
    return Gate(Verdict.UNVERIFIED, "no runtime here could run it")
