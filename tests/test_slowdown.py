from __future__ import annotations

import pytest

from server.scheduling.slowdown import Slowdown

SECOND = 1_000_000_000


def observed(*ratios: float) -> Slowdown:
    """A slowdown after these batches, one a millisecond."""
    slowdown = Slowdown()
    for place, ratio in enumerate(ratios):
        slowdown.observe(ratio, place * 1_000_000)
    return slowdown


def test_an_executor_starts_as_profiled() -> None:
    """Before anything ran the factor is one."""
    assert observed().factor(SECOND) == 1.0


def test_a_slow_executor_is_noticed_within_five_batches() -> None:
    """Three batches at twice the profile are believed."""
    assert observed(2.0, 2.0, 2.0).factor(0) == 2.0
    assert observed(*[1.0] * 50, 2.0, 2.0, 2.0).factor(0) == 2.0


def test_recovery_is_noticed_within_five_batches() -> None:
    """Three batches as profiled end it."""
    assert observed(*[3.0] * 20, 1.0, 1.0, 1.0).factor(0) == 1.0


def test_single_outliers_are_not_believed() -> None:
    """Two out of five change nothing."""
    assert observed(*[1.0] * 10, 50.0, 1.0, 50.0, 1.0, 1.0).factor(0) == 1.0


def test_it_relaxes_while_nothing_runs_and_does_not_come_back() -> None:
    """After half a minute the factor is one again, and the next normal batch leaves it there."""
    slowdown = observed(*[3.0] * 10)
    assert slowdown.factor(SECOND) == 3.0
    assert 1.5 < slowdown.factor(4 * SECOND) < 2.5
    assert slowdown.factor(30 * SECOND) == pytest.approx(1.0, abs=0.001)
    slowdown.observe(1.0, 30 * SECOND)
    assert slowdown.factor(30 * SECOND) == pytest.approx(1.0, abs=0.001)


@pytest.mark.parametrize("ratio", [1e-9, 1e9])
def test_absurd_ratios_are_bounded(ratio: float) -> None:
    """The factor stays between a quarter and eight."""
    assert 0.25 <= observed(*[ratio] * 9).factor(0) <= 8.0
