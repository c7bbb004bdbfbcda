from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.margin import MISS_RATE, START, Margin

MS = 1_000_000
SECOND = 1_000_000_000

Draw = Callable[[Random, int], float]


def heavy_tailed(random: Random, _: int) -> float:
    """Most batches as predicted, some held up for long."""
    return random.lognormvariate(0.0, 0.05) * (1.0 + (random.expovariate(1.0) if random.random() < 0.02 else 0.0))


def drifting(random: Random, batch: int) -> float:
    """Noise whose spread comes and goes."""
    return random.lognormvariate(0.0, 0.3 if batch // 1000 % 2 else 0.03)


@pytest.mark.parametrize("draw", [heavy_tailed, drifting, lambda random, _: random.lognormvariate(0.0, 0.1)])
def test_in_the_long_run_one_prediction_in_a_hundred_is_exceeded(draw: Draw) -> None:
    """Whatever the noise and however it drifts, the share of misses is near what was asked."""
    random, margin, missed = Random(3), Margin(), 0  # noqa: S311 - repeatable on purpose
    for batch in range(30_000):
        score = draw(random, batch)
        missed += score > margin.value
        margin.observe(score, batch * MS)
    assert missed / 30_000 == pytest.approx(MISS_RATE, rel=0.4)


def test_a_steady_host_earns_a_small_margin() -> None:
    """Where batches take what is predicted, little is added."""
    margin = Margin()
    for batch in range(300):
        margin.observe(1.0, batch * MS)
    assert margin.value < 1.05


def test_a_margin_is_narrow_again_soon_after_a_bad_moment() -> None:
    """Twenty slow batches are forgotten after a few hundred good ones, not after thousands."""
    margin = Margin()
    for batch in range(300):
        margin.observe(1.0, batch * MS)
    for batch in range(300, 320):
        margin.observe(3.0, batch * MS)
    assert margin.value > 1.9
    for batch in range(320, 720):
        margin.observe(1.0, batch * MS)
    assert margin.value < 1.2


def test_old_scores_are_forgotten_even_where_nothing_new_comes() -> None:
    """Who was passed over is not measured: after seconds without a score the start counts again."""
    margin = Margin()
    for batch in range(50):
        margin.observe(4.0, batch * MS)
    assert not margin.forget(5 * SECOND)
    assert margin.value > 1.9
    assert margin.forget(6 * SECOND)
    assert margin.value == START
    assert not margin.forget(70 * SECOND)


def test_what_was_a_minute_ago_is_forgotten_though_new_scores_come() -> None:
    """A bad moment raises the margin of sparse batches for a minute and no longer."""
    margin = Margin()
    for batch in range(5):
        margin.observe(3.0, batch * MS)
    for second in range(1, 62, 2):
        margin.observe(1.0, second * SECOND)
        assert (margin.value > 1.9) == (second <= 60)


def test_after_a_refusal_scores_are_void_as_soon_as_nothing_new_comes() -> None:
    """What was refused is never measured: a second later the start counts again, unless something was measured."""
    margin = Margin()
    for batch in range(50):
        margin.observe(4.0, batch * MS)
    margin.doubted = True
    assert not margin.forget(SECOND // 2)
    margin.observe(4.0, SECOND // 2)
    assert not margin.forget(2 * SECOND)
    margin.doubted = True
    assert margin.forget(2 * SECOND)
    assert margin.value == START


@pytest.mark.parametrize("gap_ns", [SECOND // 10, SECOND, 2 * SECOND])
def test_sparse_batches_are_learnt_from_too(gap_ns: int) -> None:
    """Up to seconds apart, the window holds enough of them to see that one in ten takes half as long again."""
    random, margin, missed = Random(1), Margin(), 0  # noqa: S311 - repeatable on purpose
    for batch in range(1000):
        score = 1.6 if random.random() < 0.1 else 1.0
        margin.forget(batch * gap_ns)
        missed += batch >= 200 and score > margin.value
        margin.observe(score, batch * gap_ns)
    assert missed / 800 < 0.03


def test_one_bad_batch_among_few_is_no_reason_for_a_wide_margin() -> None:
    """The missing ones of the first hundred count as good ones: one in a hundred may be exceeded."""
    margin = Margin()
    for batch in range(10):
        margin.observe(5.0 if batch == 3 else 1.0, batch * SECOND // 10)
    assert margin.value <= 1.1 * START


@given(st.lists(st.floats(0.001, 1000), max_size=400))
def test_the_margin_stays_within_bounds(scores: list[float]) -> None:
    """Never below the least nor above the most, whatever was seen."""
    margin = Margin()
    for batch, score in enumerate(scores):
        margin.observe(score, batch * 100 * MS)
        assert 1.02 <= margin.value <= 2.0


def test_a_pause_now_and_then_does_not_refuse_everybody() -> None:
    """Where one batch in fifty takes four times as long, no batch is taken to last more than twice as long."""
    random, margin = Random(1), Margin()  # noqa: S311 - repeatable on purpose
    for batch in range(2000):
        margin.observe(4.0 if random.random() < 0.02 else 1.0, batch * MS)
        assert margin.value <= 2.0
