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
from variants.scores import (
    TEXT,
    by_row,
    classes_of,
    cosines,
    finite,
    flat,
    has_floats,
    labels_of,
    macro_f1_of,
    mean_of,
    of_samples,
    r2_of,
)
from variants.variant import Card, Evidence, Fidelity, Gate, Interval, Verdict

AGREEMENT_COSINE = 0.98
"""An embedding agrees with fp32's when their cosine is at least this."""

AGREEMENT_TOLERANCE = 0.05
"""Any other answer agrees when its distance to fp32's is at most this share of the fp32 answers' RMS."""

INVARIANT = 1e-3
"""The largest absolute difference between an answer alone and in a batch that still counts as none."""

INVARIANCE_SAMPLES = 32
"""How many samples are run alone and together to measure batch invariance."""


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
    """The largest absolute difference between a sample's answer alone and inside a batch; 0 is bit-equal or near it.

    Raises ValueError when an output has another shape in a batch: then it has no row for each sample.
    """
    if batch_size < 2:
        return 0.0
    some = {name: array[:INVARIANCE_SAMPLES] for name, array in inputs.items()}
    alone, together = run_samples(session, some, 1), run_samples(session, some, batch_size)
    for spec, a, b in zip(session.outputs, alone, together, strict=True):
        if a.shape != b.shape:
            raise ValueError(
                f"output {spec.name!r} of {len(alone[0])} samples has shape {list(a.shape)} one by one "
                f"and {list(b.shape)} in batches of {batch_size}"
            )
    return max(_largest_difference(a, b) for a, b in zip(alone, together, strict=True))


def _largest_difference(a: Array, b: Array) -> float:
    if a.dtype.kind in TEXT + "b":
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
    if (sane := finite(answers) & finite(reference)).any():
        agrees[sane] = _agrees(of_samples(answers, sane), of_samples(reference, sane), task)
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
        return np.asarray(classes_of(answers) == classes_of(reference))
    if not has_floats(answers):
        return np.array([np.array_equal(row, other) for row, other in zip(answers, reference, strict=True)])
    if task == "embedding":
        return cosines(answers, reference) >= AGREEMENT_COSINE
    scale = np.sqrt(np.mean(by_row(lambda row: np.sum(row**2, axis=1), reference)))
    with np.errstate(over="ignore"):
        distances = by_row(lambda row, other: np.linalg.norm(row - other, axis=1), answers, reference)
    return np.asarray(distances <= AGREEMENT_TOLERANCE * scale)


Estimates = tuple[Estimate, Estimate, Estimate]


def _top1(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = labels_of(target, reference)
    right, reference_right = ((found == truth) & (found >= 0) for found in (classes_of(answers), classes_of(reference)))
    lost, won = int(np.sum(reference_right & ~right)), int(np.sum(right & ~reference_right))
    return Proportion(int(right.sum()), len(truth)), agreement, PairedDrop(lost, won, len(truth))


def _macro_f1(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = labels_of(target, reference)
    score, reference_score = (macro_f1_of(truth, classes_of(each)) for each in (answers, reference))
    return _resampled(score, reference_score, agreement, np.unique(truth, return_counts=True)[1])


def _cosine(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth = reference if target is None else target
    score, reference_score = (mean_of(np.maximum(cosines(each, truth), 0.0)) for each in (answers, reference))
    return _resampled(score, reference_score, agreement, np.array([len(truth)]))


def _r2(answers: Array, reference: Array, target: Array | None, agreement: Estimate) -> Estimates:
    truth, guess, reference_guess = flat(reference if target is None else target), flat(answers), flat(reference)
    if truth.shape != guess.shape:
        raise RepositoryError(f"r2 needs a target of the output's shape {guess.shape}, got {truth.shape}")
    if not np.isfinite(truth).all():
        raise RepositoryError("r2 needs finite targets (fp32's own answers where there is no target)")
    return _resampled(r2_of(truth, guess), r2_of(truth, reference_guess), agreement, np.array([len(truth)]))


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


def evidence(
    comparison: Comparison, batch_sizes: Sequence[int], invariance: float, fidelity: Fidelity | None = None
) -> Evidence:
    """The comparison as it stands on the card; a score's interval never leaves [0, 1]."""
    score = comparison.score.interval()
    return Evidence(
        score=Interval(score.value, max(0.0, score.low), min(1.0, score.high)),
        agreement=comparison.agreement.interval(),
        accuracy_drop=comparison.drop.interval(),
        samples=comparison.samples,
        batch_sizes=tuple(batch_sizes),
        batch_invariance=invariance,
        fidelity=fidelity,
    )


def may_batch(card: Card, proof: Evidence | None) -> bool:
    """Whether batch-mates leave a variant's answers alone: neither its recipe nor the measurement says otherwise."""
    said = card.requirements.get("solo") is True or card.parameters.get("batch_invariant") is False
    return not said and (proof is None or proof.batch_invariance <= INVARIANT)


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
