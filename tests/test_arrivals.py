"""Made arrivals: the rate and the burstiness that were asked for, the same for the same seed."""

from __future__ import annotations

import statistics
from itertools import pairwise

import pytest

from server.arrivals import gamma_arrivals_ns


@pytest.mark.parametrize("cv2", [0.25, 1.0, 4.0])
def test_gaps_have_the_rate_and_the_variation_asked(cv2: float) -> None:
    """Over 40,000 gaps the mean and the squared coefficient of variation are within 10 % of what was asked."""
    instants = gamma_arrivals_ns(1000, 40, cv2=cv2, seed=1)
    gaps = [after - before for before, after in pairwise(instants)]
    mean = statistics.fmean(gaps)
    assert mean == pytest.approx(1e6, rel=0.1)
    assert statistics.pvariance(gaps) / mean**2 == pytest.approx(cv2, rel=0.1)


def test_equal_seeds_are_equal_and_others_differ() -> None:
    """The seed decides everything; the instants rise and stay within the time."""
    first = gamma_arrivals_ns(100, 2, cv2=8, seed=3)
    assert first == gamma_arrivals_ns(100, 2, cv2=8, seed=3) != gamma_arrivals_ns(100, 2, cv2=8, seed=4)
    assert first == sorted(first)
    assert 0 <= first[0] <= first[-1] < 2 * 10**9


def test_no_variation_is_even_spacing() -> None:
    """A cv2 of 0 sends one request each 1/rate."""
    assert gamma_arrivals_ns(4, 1.1, cv2=0) == [250_000_000, 500_000_000, 750_000_000, 1_000_000_000]


@pytest.mark.parametrize("cv2", [0.01, 1000])
def test_the_extremes_keep_the_rate(cv2: float) -> None:
    """At either end of the range a million seconds hold about as many arrivals as asked."""
    assert len(gamma_arrivals_ns(0.1, 1e6, cv2=cv2, seed=1)) == pytest.approx(1e5, rel=0.3)


@pytest.mark.parametrize(
    ("rate", "seconds", "cv2", "told"),
    [
        *[(rate, 1, 1, "above 0") for rate in (0, -1, float("nan"), float("inf"))],
        *[(1, seconds, 1, "above 0") for seconds in (0, float("nan"), 2e9)],
        *[(1, 1, cv2, "a cv2 of 0 or") for cv2 in (-1, 1e-320, 0.001, 1e30, float("inf"), float("nan"))],
        (1e9, 1e9, 1, "10,000,000 requests"),
    ],
)
def test_impossible_processes_are_refused(rate: float, seconds: float, cv2: float, told: str) -> None:
    """What floating point, the memory or an instant cannot hold is told instead of tried."""
    with pytest.raises(ValueError, match=told):
        gamma_arrivals_ns(rate, seconds, cv2=cv2)
