"""Triton's statistics from event records."""

from __future__ import annotations

import pytest

from server.events import BatchRan, Decided, RequestEnded
from server.scheduling.slo import Outcome
from server.statistics import Statistics

MS = 1_000_000


def ended(outcome: Outcome, samples: int = 2, model: str = "m") -> RequestEnded:
    """A request's end: 10 ms in all, 3 of them waiting, 6 computing."""
    return RequestEnded(
        model, "1", "fp32", outcome, "best", samples, None, None, True, 0, 10 * MS, 3 * MS, 6 * MS, None
    )


def ran(samples: int, failed: bool = False) -> BatchRan:
    """A batch of 5 ms."""
    return BatchRan("m", "1", "fp32", 0, 1, samples, "best", 5 * MS, 5 * MS, failed)


@pytest.fixture
def statistics() -> Statistics:
    """With one model, at the wall clock's second 1000."""
    made = Statistics(wall_clock_ns=lambda: 1_000_000_000_000)
    made.add_model("m", "1")
    return made


def test_answered_requests_are_successes(statistics: Statistics) -> None:
    """Ok, late and degraded answers count with their times and samples."""
    for outcome in (Outcome.OK, Outcome.LATE, Outcome.DEGRADED):
        statistics(ended(outcome))
    tallies = statistics.of("m", "1")
    assert (tallies.success.count, tallies.success.ns) == (3, 30 * MS)
    assert (tallies.queue.ns, tallies.compute.ns, tallies.inferences) == (9 * MS, 18 * MS, 6)
    assert tallies.fail.count == 0
    assert tallies.last_inference_ms == 1_000_000


@pytest.mark.parametrize(
    "outcome",
    [o for o in Outcome if o not in (Outcome.OK, Outcome.LATE, Outcome.DEGRADED)],
)
def test_everything_else_is_a_failure(statistics: Statistics, outcome: Outcome) -> None:
    """No answer is never a success, and adds no samples."""
    statistics(ended(outcome))
    tallies = statistics.of("m", "1")
    assert (tallies.fail.count, tallies.success.count, tallies.inferences) == (1, 0, 0)
    assert tallies.last_inference_ms == 0


def test_batches_are_counted_by_size(statistics: Statistics) -> None:
    """An execution is a batch that ran; one that failed is none."""
    for event in (ran(4), ran(4), ran(1), ran(2, failed=True), Decided("m", 5)):
        statistics(event)
    tallies = statistics.of("m", "1")
    assert tallies.executions == 3
    assert {size: (tally.count, tally.ns) for size, tally in tallies.batches.items()} == {
        4: (2, 10 * MS),
        1: (1, 5 * MS),
    }


def test_names_that_clients_invent_are_not_kept(statistics: Statistics) -> None:
    """Only models that were added have tallies, and one that is loaded again starts from nothing."""
    statistics(ended(Outcome.INVALID, model="invented"))
    assert statistics.of("invented", "1").fail.count == 0
    assert list(statistics._models) == [("m", "1")]
    statistics(ended(Outcome.OK))
    statistics.add_model("m", "1")
    assert statistics.of("m", "1").success.count == 0
