from __future__ import annotations

from random import Random

import pytest

from server.scheduling.learnt import Learnt


@pytest.mark.parametrize("rate", [0.001, 0.05])
def test_in_the_long_run_mistakes_are_as_rare_as_was_asked(rate: float) -> None:
    """Where a larger number makes mistakes rarer, their share settles at the rate, whatever that takes."""
    random, learnt, mistakes = Random(5), Learnt(0.0, least=0.0, most=100.0, step=0.5, rate=rate), 0  # noqa: S311
    for _ in range(40_000):
        mistake = random.expovariate(1.0) > learnt.value
        mistakes += mistake
        learnt.judged(mistake=mistake)
    assert mistakes / 40_000 == pytest.approx(rate, rel=0.5)


def test_it_stays_within_its_bounds() -> None:
    """Neither endless mistakes nor endless success move it beyond."""
    learnt = Learnt(1.0, least=0.5, most=2.0, step=0.25, rate=0.01)
    for _ in range(100):
        learnt.judged(mistake=True)
    assert learnt.value == 2.0
    for _ in range(100_000):
        learnt.judged(mistake=False)
    assert learnt.value == 0.5
