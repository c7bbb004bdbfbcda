"""What is known of the executors: who is free when, how fast, and who must be taken for lost."""

from __future__ import annotations

from scheduling_models import MS

from server.scheduling.latency import UNIT, Spot
from server.scheduling.policy import Run
from server.scheduling.pool import Pool
from server.scheduling.slo import ModelKey


def batch(executor: int = 0, started_ms: int = 0, predicted_ms: int = 40) -> Run:
    """A batch without requests."""
    return Run(executor, ModelKey("m", "1"), "fp32", 0, (), 1, predicted_ms * MS, "best", started_ms * MS, 0, UNIT)


def test_a_busy_executor_is_expected_when_its_batch_was_predicted_to_end() -> None:
    """The idle ones are free now, the busy one then; whoever asks about the others is not among them."""
    pool = Pool(2)
    pool.start(batch(executor=1))
    assert pool.free_ns(10 * MS) == [10 * MS, 40 * MS]
    assert pool.free_ns(10 * MS, but=1) == [10 * MS]
    assert (pool.busy, pool.working, pool.idle) == (1, 2, True)


def test_an_overdue_executor_is_expected_to_need_half_as_long_again() -> None:
    """Twenty milliseconds over, it is expected in ten more, and never in the past."""
    pool = Pool(1)
    pool.start(batch())
    assert pool.free_ns(60 * MS) == [70 * MS]


def test_an_executor_is_overdue_after_ten_times_the_prediction_and_a_quarter_second() -> None:
    """A short batch has the quarter second, a long one ten times its prediction; at that very instant it is not yet."""
    pool = Pool(2)
    pool.start(batch(0, predicted_ms=1))
    pool.start(batch(1, predicted_ms=40))
    assert pool.soonest_loss_ns() == 250 * MS
    assert pool.overdue(250 * MS) == []
    assert pool.overdue(250 * MS + 1) == [0]
    assert pool.overdue(400 * MS) == [0]
    assert pool.overdue(400 * MS + 1) == [0, 1]


def test_a_lost_executor_is_no_capacity_until_it_is_back() -> None:
    """It takes its batch along, is neither idle nor working, and after `regain` is both."""
    pool, run = Pool(2), batch()
    pool.start(run)
    assert pool.lose(0) is run
    assert (pool.busy, pool.working, pool.free_ns(5 * MS)) == (0, 1, [5 * MS])
    pool.start(batch(1))
    assert not pool.idle
    pool.regain(0)
    assert (pool.working, pool.idle) == (2, True)


def test_a_batch_that_ends_after_all_brings_its_executor_back() -> None:
    """`end` tells the batch that was expected from the one that had been given up on; both leave the executor idle."""
    pool, run = Pool(1), batch()
    pool.start(run)
    assert pool.end(run, 30 * MS)
    pool.start(run)
    pool.lose(0)
    assert not pool.end(run, 500 * MS)
    assert (pool.idle, pool.free_ns(500 * MS)) == (True, [500 * MS])


def test_where_all_are_lost_one_is_hoped_to_be_back_soon() -> None:
    """Times stay finite and capacity is never nought, so that admission has an answer."""
    pool = Pool(2)
    assert pool.lose(0) is None
    pool.lose(1)
    assert pool.free_ns(MS) == []
    assert pool.all_free_ns(MS) == [MS + 250 * MS]
    assert pool.working == 1
    assert pool.spots(MS) == (Spot(0, UNIT), Spot(0, UNIT))


def test_the_best_spot_is_the_fastest_executor_and_the_crowd_an_average_one() -> None:
    """Of one as profiled and one at half speed: best is the first, a backlog drains at one and a half."""
    pool = Pool(2)
    for _ in range(5):
        pool.observe(batch(1), 2.0, MS)
    best, crowd = pool.spots(MS)
    assert (best.slowdown, crowd.slowdown) == (UNIT, 3 * UNIT // 2)
    assert pool.spot(1, MS).slowdown == 2 * UNIT
    pool.lose(0)
    assert pool.spots(MS)[0].slowdown == 2 * UNIT


def test_a_spot_counts_the_other_busy_executors() -> None:
    """The one that asks does not count itself, busy or not; a lost one is not busy."""
    pool = Pool(3)
    pool.start(batch(0))
    pool.start(batch(1))
    assert (pool.spot(0, 0).busy, pool.spot(2, 0).busy) == (1, 2)
    assert [spot.busy for spot in pool.spots(0)] == [2, 2]
    pool.lose(1)
    assert (pool.spot(0, 0).busy, pool.spot(2, 0).busy) == (0, 1)
    assert [spot.busy for spot in pool.spots(0)] == [1, 1]


def test_what_was_learnt_of_an_executors_speed_is_forgotten_in_time() -> None:
    """A minute after it was slow, it is reckoned with as profiled, though nothing ran meanwhile."""
    pool = Pool(1)
    for _ in range(5):
        pool.observe(batch(), 4.0, MS)
    assert pool.spots(MS)[0].slowdown == 4 * UNIT
    assert pool.spots(60_000 * MS)[0].slowdown < 1.01 * UNIT
