"""Confidence intervals against published examples, other implementations and each other."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from variants.intervals import RESAMPLES, PairedDrop, Proportion, Undetected, Z, bootstrap, samples_needed


def test_wilson_matches_the_published_example() -> None:
    """81 of 263 gives [0.2553, 0.3662], as in Newcombe, Stat. Med. 17, 1998, table I."""
    found = Proportion(81, 263).interval()
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


def test_perfection_is_not_certainty() -> None:
    """10 of 10 has the lower bound n/(n+z²), and no discordant pair still leaves a drop of z²/(n+z²) possible."""
    assert Proportion(10, 10).interval().low == pytest.approx(10 / (10 + Z * Z))
    drop = PairedDrop(0, 0, 100).interval()
    assert drop.high == pytest.approx(Z * Z / (100 + Z * Z), abs=1e-12)
    assert drop.low == pytest.approx(-drop.high, abs=1e-12)


def test_tango_is_the_score_test_inverted() -> None:
    """At both bounds the score statistic, with the nuisance found by brute force, is 1.96."""
    lost, won, n = 12, 2, 50
    interval = PairedDrop(lost, won, n).interval()
    for bound in (interval.low, interval.high):
        rates = np.linspace(1e-9, (1 - abs(bound)) / 2 + 0.5, 2_000_001)  # the rate of `won` under drop = bound
        rates = rates[(rates + bound > 0) & (2 * rates + bound < 1)]
        likelihood = (
            lost * np.log(rates + bound) + won * np.log(rates) + (n - lost - won) * np.log1p(-2 * rates - bound)
        )
        rate = rates[likelihood.argmax()]
        statistic = (lost - won - n * bound) / math.sqrt(n * (2 * rate + bound * (1 - bound)))
        assert abs(statistic) == pytest.approx(Z, abs=1e-4)


def test_tango_is_symmetric() -> None:
    """Exchanging variant and reference mirrors the interval."""
    a, b = PairedDrop(7, 1, 90).interval(), PairedDrop(1, 7, 90).interval()
    assert [a.low, a.high] == pytest.approx([-b.high, -b.low])


def test_the_bootstrap_is_repeatable_and_about_right() -> None:
    """Two runs agree exactly, and the mean's interval is that of the normal approximation within a few per cent."""
    values = np.random.default_rng(1).normal(size=400)
    first, second = (bootstrap(lambda counts: counts @ values / 400, 400).interval() for _ in range(2))
    assert first == second
    assert first.high - first.value == pytest.approx(Z * values.std() / 20, rel=0.1)


def test_samples_needed_is_the_least_that_passes() -> None:
    """Without a differing answer, 1 % of drop takes 381 samples: n >= z²·99."""
    assert samples_needed(lambda scale: PairedDrop(0, 0, 100).interval(scale).high <= 0.01, 100) == 381
    assert math.ceil(Z * Z * 99) == 381
    assert samples_needed(lambda _scale: False, 100) is None


def test_what_no_error_hides_is_the_worst_group_of_classes() -> None:
    """By hand: balanced classes as Tango's interval for all samples, one rare class by its share, many by theirs."""

    def rate(n: float) -> float:
        return Z * Z / (n + Z * Z)

    assert Undetected((100,) * 10).interval().high == pytest.approx(PairedDrop(0, 0, 1000).interval().high)
    assert Undetected((990, 10)).interval().high == pytest.approx(rate(10) / 2)
    assert Undetected((995, 2, 2, 1)).interval().high == pytest.approx(rate(5) * 3 / 4)
    assert Undetected((990, 10)).interval(100).high == pytest.approx(rate(1000) / 2)
    assert Undetected((50,)).worth == pytest.approx(50)


def test_resamples_are_weighed_together() -> None:
    """A statistic sees all resamples of 1000 samples at once, and every resample draws as many as there are."""
    seen = []

    def statistic(counts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        seen.append(counts.shape)
        assert (counts.sum(axis=1) == 1000).all()
        return np.asarray(counts[:, 0])

    bootstrap(statistic, 1000)
    assert seen == [(RESAMPLES, 1000), (1, 1000)]
