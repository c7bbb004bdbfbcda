"""Answers as numbers, and scores as statistics of them: what `evaluate` compares and `fidelity` describes.

Rules of this file: answers are [samples, ...]; an answer that is not finite is of no class, points nowhere and is
infinitely wrong. Nothing here copies a whole data set in double precision.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from variants.data import Array
from variants.intervals import Floats, Statistic
from variants.model_config import RepositoryError

_MOST_NUMBERS = 1 << 20
"""Answers are taken to double precision in parts of up to this many numbers: 8 MiB."""

TEXT = "OUS"
"""Numpy's kinds of text; an object array holds nothing else here."""

_NOT_FLOATS = TEXT + "biu"


def has_floats(answers: Array) -> bool:
    """Whether there is a "nearly" between answers: not between whole numbers, truths and texts."""
    return answers.dtype.kind not in _NOT_FLOATS


def finite(values: Array) -> npt.NDArray[np.bool_]:
    """Which samples have no NaN and no infinity in them."""
    if not has_floats(values):
        return np.ones(len(values), np.bool_)
    return np.asarray(np.isfinite(values.reshape(len(values), -1)).all(axis=1))


def of_samples(values: Array, chosen: npt.NDArray[np.bool_]) -> Array:
    """The chosen samples, without a copy where that is all of them."""
    return values if chosen.all() else values[chosen]


def macro_f1(truth: Array, guess: Array) -> float:
    """The mean over classes that occur of 2·TP/(2·TP+FP+FN), in [0, 1]; -1 is no answer and so never right."""
    return float(macro_f1_of(truth, guess)(np.ones((1, len(truth))))[0])


def macro_f1_of(truth: Array, guess: Array) -> Statistic:
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
    return float(r2_of(truth, guess)(np.ones((1, len(truth))))[0])


def r2_of(truth: Array, guess: Array) -> Statistic:
    """`r2` of resamples, as sums over samples: no resample is copied out."""
    mean = truth.mean(axis=0, dtype=np.float64)
    squares = by_row(lambda row: np.sum((row - mean) ** 2, axis=1), truth)
    with np.errstate(invalid="ignore", over="ignore"):
        errors = by_row(lambda row, other: np.sum((row - other) ** 2, axis=1), truth, guess)
    errors = np.fmin(errors, len(truth) * squares.max())  # beyond this r2 is 0 anyway, and 0 · infinity is no number
    moved = _mean_moves(truth, mean)

    def values(counts: Floats) -> Floats:
        around_zero = counts @ squares
        spread = around_zero - moved(counts)
        varies = spread > 1e-12 * around_zero  # less is what rounding leaves of nothing
        return np.where(varies, np.maximum(0.0, 1 - counts @ errors / np.where(varies, spread, 1.0)), 0.0)

    return values


def _mean_moves(truth: Array, mean: Floats) -> Statistic:
    """How far each resample's mean is from `mean`: the squared distance, times the samples.

    It is |counts · centred truth|² / n: through the products of samples where these are fewer than the outputs.
    """
    n, width = truth.shape
    count = -(-width // max(1, min(n, _MOST_NUMBERS // n)))
    columns = np.array_split(np.arange(width), max(1, count))

    def centred() -> Iterator[Floats]:
        return (truth[:, part].astype(np.float64) - mean[part] for part in columns)

    if width <= n:
        return lambda counts: np.asarray(sum(np.sum((counts @ part) ** 2, axis=1) for part in centred()) / n)
    products: Floats = np.zeros((n, n))
    for part in centred():
        products += part @ part.T
    return lambda counts: np.asarray(np.sum((counts @ products) * counts, axis=1) / n)


def mean_of(values: Floats) -> Statistic:
    """The mean of resamples."""
    return lambda counts: counts @ values / len(values)


def flat(values: Array) -> Array:
    """One row of numbers per sample, [samples, numbers]."""
    if values.dtype.kind in TEXT:
        raise RepositoryError("texts have no distance; compare them with the metric `agreement`")
    return values.reshape(len(values), -1)


def by_row(measure: Callable[..., Floats], *values: Array) -> Floats:
    """A measure of each sample, [samples], taken in parts: it gets rows in double precision, [some, numbers]."""
    rows = [flat(each) for each in values]
    step = max(1, _MOST_NUMBERS // max(1, rows[0].shape[1]))
    starts = range(0, len(rows[0]), step)
    return np.concatenate([measure(*(each[at : at + step].astype(np.float64) for each in rows)) for at in starts])


def cosines(a: Array, b: Array) -> Floats:
    """The cosine of each sample's two answers: 1 for equal ones, zeros too, and 0 where one is not finite."""
    if flat(a).shape != flat(b).shape:
        raise RepositoryError(f"cosine needs a target of the output's shape {flat(a).shape}, got {flat(b).shape}")
    return by_row(_cosine_of_rows, a, b)


def _cosine_of_rows(left: Floats, right: Floats) -> Floats:
    sane = finite(left) & finite(right)
    equal = sane & (left == right).all(axis=1)
    left, right = (_unit(np.where(sane[:, None], rows, 0.0)) for rows in (left, right))
    return np.asarray(np.where(equal, 1.0, np.sum(left * right, axis=1)))


def _unit(rows: Floats) -> Floats:
    """Rows of length 1; scaled by their largest number first, whose square may be no number."""
    scaled = rows / np.maximum(np.max(np.abs(rows), axis=1, keepdims=True, initial=0.0), np.finfo(np.float64).tiny)
    return np.asarray(scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), np.finfo(np.float64).tiny))


def classes_of(answers: Array) -> Array:
    """Class numbers [samples], -1 where an answer is not finite."""
    if answers.ndim != 2 or answers.shape[1] < 2 or answers.dtype.kind in TEXT:
        raise RepositoryError(f"classification needs numbers [batch, classes], got {['batch', *answers.shape[1:]]}")
    return np.where(finite(answers), answers.argmax(axis=1), -1)


def labels_of(target: Array | None, reference: Array) -> Array:
    """Class numbers [samples]: the target, or what the reference says where there is none."""
    if target is None:
        return classes_of(reference)
    labels = target.reshape(-1) if target.shape == (len(target), 1) else target
    if labels.ndim != 1 or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= reference.shape[1]:
        raise RepositoryError(f"the target must be class numbers 0..{reference.shape[1] - 1}, one per sample")
    return labels.astype(np.int64)
