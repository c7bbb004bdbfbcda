"""95 % confidence intervals, each of which can also say how it would look with more samples like these.

Pure arithmetic on counts and arrays. Sources are named at each formula. `scale` multiplies the number of samples and
keeps the observed rates, which is how `samples_needed` answers "how many would suffice".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from variants.variant import Interval

Z = 1.959963984540054
"""The 97.5 % point of the normal distribution: two-sided 95 %."""

RESAMPLES = 2000
SEED = 20240229
_MOST_COUNTS = 1 << 22
"""Resamples are counted together up to this many numbers: 32 MiB."""


class Estimate(Protocol):
    """Something measured on a sample, with its interval as if the sample were `scale` times as large."""

    def interval(self, scale: float = 1.0) -> Interval:
        """The value with its bounds."""
        ...


@dataclass(frozen=True, slots=True)
class Exact:
    """A value that holds by definition, whatever the sample."""

    value: float

    def interval(self, scale: float = 1.0) -> Interval:  # noqa: ARG002 - more samples change nothing
        """No width at any scale."""
        return Interval(self.value, self.value, self.value)


@dataclass(frozen=True, slots=True)
class Proportion:
    """`successes` of `n` independent samples."""

    successes: float
    n: float

    def interval(self, scale: float = 1.0) -> Interval:
        """The Wilson score interval (E. B. Wilson, JASA 22, 1927): honest at 0 % and 100 %, unlike Wald's."""
        n, rate = self.n * scale, self.successes / self.n
        centre = (rate + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
        return Interval(rate, max(0.0, centre - half), min(1.0, centre + half))


@dataclass(frozen=True, slots=True)
class PairedDrop:
    """How much a variant loses against the reference on the same `n` samples.

    `lost` samples only the reference gets right, `won` only the variant.
    """

    lost: float
    won: float
    n: float

    def interval(self, scale: float = 1.0) -> Interval:
        """Tango's score interval for a difference of paired proportions (T. Tango, Stat. Med. 17, 1998).

        Its width is not zero without any discordant pair: the bounds are then ∓z²/(n+z²).
        """
        lost, won, n = self.lost * scale, self.won * scale, self.n * scale
        drop = (lost - won) / n

        def solve(beyond: float, target: float) -> float:
            """Where the test statistic, which falls as the difference grows, passes `target`; by bisection."""
            near, far = drop, beyond
            for _ in range(80):
                middle = (near + far) / 2
                inside = abs(_tango_statistic(lost, won, n, middle)) < target
                near, far = (middle, far) if inside else (near, middle)
            return (near + far) / 2

        return Interval(drop, solve(-1.0, Z), solve(1.0, Z))


def _tango_statistic(lost: float, won: float, n: float, difference: float) -> float:
    """The score statistic of H0: drop = difference, with the nuisance rate at its constrained maximum likelihood."""
    a = 2 * n
    b = -lost - won + (2 * n - lost + won) * difference
    c = -won * difference * (1 - difference)
    won_rate = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * won_rate + difference * (1 - difference))
    distance = lost - won - n * difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


@dataclass(frozen=True, slots=True)
class Undetected:
    """The error that a sample may hide which shows none; `classes` is how many samples each class has.

    A statistic that averages over classes hides most in its rarest ones: `n` samples without an error leave a rate of
    z²/(n+z²) possible, as in Tango's interval, and a group of classes counts with its share of all classes. The worst
    group holds. A single class is the plain case: every sample counts alike.
    """

    classes: tuple[float, ...]

    def interval(self, scale: float = 1.0) -> Interval:
        """Around no error at all."""
        rarest = np.cumsum(np.sort(self.classes)) * scale
        shares = np.arange(1, len(rarest) + 1) / len(rarest)
        most = float(np.max(shares * Z * Z / (rarest + Z * Z)))
        return Interval(0.0, -most, most)

    @property
    def worth(self) -> float:
        """How many samples of a single class would hide as much."""
        return Z * Z * (1 / self.interval().high - 1)


@dataclass(frozen=True, slots=True)
class Bootstrapped:
    """A statistic without a closed form, from paired resamples; `floor` is the least half-width one may claim."""

    value: float
    low: float
    high: float
    floor: Undetected | None = None

    def interval(self, scale: float = 1.0) -> Interval:
        """The percentile interval, widened to what a score interval would say; with more samples it narrows.

        A score interval of `k` errors ends at about k + z√k + z²/2, percentiles of resamples at k + z√k: so they miss
        half of what no error at all hides.
        """
        hidden = 0.0 if self.floor is None else self.floor.interval(scale).high
        below, above = (
            max(apart / math.sqrt(scale) + hidden / 2, hidden)
            for apart in (self.value - self.low, self.high - self.value)
        )
        return Interval(self.value, self.value - below, self.value + above)


Floats = npt.NDArray[np.float64]
Statistic = Callable[[Floats], Floats]
"""Of resamples, given as how often each sample is in each, [resamples, samples], to values [resamples]."""


def bootstrap(statistic: Statistic, n: int, floor: Undetected | None = None) -> Bootstrapped:
    """The percentile bootstrap (B. Efron, Ann. Stat. 7, 1979) of `n` samples, with a fixed seed.

    The seed and `n` fix the resamples, so two statistics of the same samples are resampled alike, and their
    difference, taken inside one `statistic`, is paired.
    """
    generator = np.random.default_rng(SEED)
    at_once = max(1, _MOST_COUNTS // n)
    values = [statistic(_counts(generator, n, min(at_once, RESAMPLES - at))) for at in range(0, RESAMPLES, at_once)]
    low, high = np.percentile(np.concatenate(values), [2.5, 97.5])
    value = float(statistic(np.ones((1, n)))[0])
    return Bootstrapped(value, min(float(low), value), max(float(high), value), floor)


def _counts(generator: np.random.Generator, n: int, resamples: int) -> Floats:
    """How often each of `n` samples is drawn in each resample, [resamples, samples]."""
    return np.stack([np.bincount(generator.integers(0, n, n), minlength=n) for _ in range(resamples)]).astype(float)


def samples_needed(passes: Callable[[float], bool], n: int, most: float = 1e7) -> int | None:
    """The least number of samples, at the observed rates, for which `passes(scale)` holds; None beyond `most`."""
    low, high = 1.0, 1.0
    while not passes(high):
        low, high = high, high * 2
        if high * n > most:
            return None
    while (high - low) * n > 1:
        middle = (low + high) / 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return math.ceil(high * n)
