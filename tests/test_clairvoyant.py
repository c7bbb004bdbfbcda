"""The clairvoyant search: its schedules can be carried out, and lie below the fluid bound."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from benchmarks.slo.clairvoyant import Schedule, clairvoyant
from server.simulation.bound import Demand, FluidVariant, upper_bound

MS = 1_000_000
VARIANTS = [
    (0.913, tuple((6 + 4 * n) * MS for n in range(1, 9))),
    (0.893, tuple(int((4 + 1.4 * n) * MS) for n in range(1, 9))),
    (0.872, tuple(int((2 + 0.7 * n) * MS) for n in range(1, 9))),
]


def check(schedule: Schedule, arrivals: list[int], slo_ns: int, executors: int) -> None:
    """Raise AssertionError unless the schedule can be carried out and reaches what it says."""
    answered: set[int] = set()
    worth = 0.0
    for batch in schedule.batches:
        members = range(batch.first, batch.first + batch.size)
        assert answered.isdisjoint(members)
        answered.update(members)
        assert batch.start_ns >= max(arrivals[member] for member in members)
        assert batch.finish_ns == batch.start_ns + VARIANTS[batch.variant][1][batch.size - 1]
        assert batch.finish_ns <= min(arrivals[member] for member in members) + slo_ns
        worth += VARIANTS[batch.variant][0] * batch.size
    for executor in range(executors):
        mine = sorted((b.start_ns, b.finish_ns) for b in schedule.batches if b.executor == executor)
        assert all(before[1] <= after[0] for before, after in pairwise(mine))
    assert {batch.executor for batch in schedule.batches} <= set(range(executors))
    assert schedule.attainment == pytest.approx(len(answered) / len(arrivals))
    assert schedule.effective_accuracy == pytest.approx(worth / len(arrivals))


@pytest.mark.parametrize("seed", range(6))
def test_a_schedule_is_feasible_and_below_the_bound(seed: int) -> None:
    """From idle to twice overloaded, on one to three executors."""
    rng = np.random.default_rng(seed)
    executors, rate = 1 + seed % 3, (60, 400, 1200, 2500)[seed % 4]
    arrivals = [int(at) for at in np.cumsum(rng.gamma(0.25, 4 * 1e9 / rate, 80))]
    schedule = clairvoyant(arrivals, 40 * MS, VARIANTS, executors, beam=24)
    check(schedule, arrivals, 40 * MS, executors)
    fluid = [FluidVariant(accuracy, latencies) for accuracy, latencies in VARIANTS]
    bound = upper_bound([Demand(at, at + 40 * MS) for at in arrivals], fluid, executors)
    assert 0 < schedule.effective_accuracy <= bound.effective_accuracy
    assert schedule.attainment <= bound.attainment


def test_it_finds_an_optimum_that_greed_misses() -> None:
    """Five requests at once, 15 ms: accuracy first answers one well and too few others, size first none well."""
    variants = [(0.9, (10 * MS, 20 * MS)), (0.5, (2 * MS, 3 * MS, 4 * MS, 5 * MS))]
    schedule = clairvoyant([0] * 5, 15 * MS, variants, 1)
    assert schedule.attainment == 1
    assert schedule.effective_accuracy == pytest.approx((0.9 + 4 * 0.5) / 5)


def test_it_waits_for_a_batch_and_drops_the_hopeless() -> None:
    """Knowing the arrivals, it lets an executor idle for a batch-mate, and gives up one request for two."""
    pair = [(0.9, (10 * MS, 10 * MS))]
    waits = clairvoyant([0, 2 * MS], 12 * MS, pair, 1)
    assert [(batch.start_ns, batch.size) for batch in waits.batches] == [(2 * MS, 2)]
    drops = clairvoyant([0, 5 * MS, 5 * MS], 10 * MS, pair, 1)
    assert [(batch.first, batch.size) for batch in drops.batches] == [(1, 2)]


def test_what_fits_no_window_is_dropped() -> None:
    """With an SLO below every latency there are no batches."""
    assert clairvoyant([0, MS], MS, VARIANTS, 1).batches == ()


def test_the_search_is_deterministic() -> None:
    """Equal arguments give equal schedules."""
    arrivals = [int(at) for at in np.cumsum(np.random.default_rng(3).exponential(2 * MS, 40))]
    assert clairvoyant(arrivals, 40 * MS, VARIANTS, 2, 16) == clairvoyant(arrivals, 40 * MS, VARIANTS, 2, 16)


@pytest.mark.parametrize("arrivals", [[], [5, 3]])
def test_bad_arrivals_are_refused(arrivals: list[int]) -> None:
    """None, or falling ones."""
    with pytest.raises(ValueError, match="rising arrivals"):
        clairvoyant(arrivals, MS, VARIANTS, 1)
