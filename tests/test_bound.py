"""The fluid bound: never below a schedule that exists, and equal to what can be worked out by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import numpy as np
import pytest

from server.simulation import bound as module
from server.simulation.bound import Demand, FluidVariant, upper_bound
from variants.variant import LatencyProfile

MS = 1_000_000


def linear(accuracy: float, per_sample_ms: float, *, fixed_ms: float = 0, largest: int = 16) -> FluidVariant:
    """A variant whose batch takes ``fixed + per_sample * n``."""
    return FluidVariant(accuracy, tuple(int((fixed_ms + per_sample_ms * n) * MS) for n in range(1, largest + 1)))


FAMILY = [linear(0.913, 4, fixed_ms=6), linear(0.893, 1.4, fixed_ms=4), linear(0.872, 0.7, fixed_ms=2)]


def bursty(seconds: float, *, slos_ms: Sequence[int] = (60,), seed: int = 0, rate: float = 1200) -> list[Demand]:
    """Gamma arrivals of CV² 8."""
    rng = np.random.default_rng(seed)
    instants = np.cumsum(rng.gamma(1 / 8, 8 / rate, int(rate * seconds * 3))) * 1e9
    arrivals = instants[instants < seconds * 1e9].astype(np.int64)
    return [Demand(int(at), int(at) + int(rng.choice(slos_ms)) * MS) for at in arrivals]


def schedules(
    demands: Sequence[Demand], variants: Sequence[FluidVariant], free_ns: tuple[int, ...]
) -> Iterator[tuple[int, float]]:
    """(answered in time, sum of accuracies) of every schedule that starts each batch as soon as it can."""
    yield 0, 0.0
    for size in range(1, len(demands) + 1):
        for members in combinations(demands, size):
            rest = [demand for demand in demands if demand not in members]
            for index, variant in enumerate(variants):
                if size > len(variant.latencies_ns) or not all(demand.allowed >> index & 1 for demand in members):
                    continue
                for executor, free in enumerate(free_ns):
                    finish = max(free, *(d.arrival_ns for d in members)) + variant.latencies_ns[size - 1]
                    if finish <= min(demand.deadline_ns for demand in members):
                        then = (*free_ns[:executor], finish, *free_ns[executor + 1 :])
                        for count, worth in schedules(rest, variants, then):
                            yield count + size, worth + size * variant.accuracy


@pytest.mark.parametrize("bin_ns", [MS // 2, 10 * MS, 37 * MS])
@pytest.mark.parametrize("executors", [1, 2])
def test_no_schedule_of_a_small_instance_beats_the_bound(executors: int, bin_ns: int) -> None:
    """Against every schedule of four requests: attainment, effective accuracy, and accuracy at each attainment."""
    rng = np.random.default_rng(executors)
    variants = [linear(0.9, 3, fixed_ms=2, largest=2), linear(0.7, 1.5, fixed_ms=1.5, largest=2)]
    for _ in range(6):
        arrivals = [int(value) for value in rng.integers(0, (12 // executors**2) * MS, 4)]
        windows, allowed = rng.integers(3 * MS, (14 // executors) * MS, 4), rng.choice([0b11, 0b11, 0b01, 0b10], 4)
        demands = [Demand(a, a + int(w), 1, int(v)) for a, w, v in zip(arrivals, windows, allowed, strict=True)]
        found = set(schedules(demands, variants, (0,) * executors))
        levels = sorted({count / 4 for count, _ in found})
        bound = upper_bound(demands, variants, executors, bin_ns, levels)
        assert bound.attainment >= max(count for count, _ in found) / 4 - 1e-12
        assert bound.effective_accuracy >= max(worth for _, worth in found) / 4 - 1e-12
        for level, most in zip(levels, bound.accuracy_at, strict=True):
            assert most >= max(worth for count, worth in found if count / 4 >= level) / 4 - 1e-12


def test_an_idle_server_answers_everything_most_accurately() -> None:
    """Far below capacity nothing has to be given up."""
    bound = upper_bound([Demand(at * 100 * MS, at * 100 * MS + 60 * MS) for at in range(50)], FAMILY, 1)
    assert bound.attainment == pytest.approx(1)
    assert bound.effective_accuracy == pytest.approx(0.913)


@pytest.mark.parametrize("executors", [1, 3])
def test_half_of_twice_the_work_that_fits_is_done(executors: int) -> None:
    """Twenty requests of 1 ms before 10 ms for each executor: ten are answered."""
    bound = upper_bound([Demand(0, 10 * MS)] * 20 * executors, [linear(0.8, 1)], executors)
    assert bound.attainment == pytest.approx(0.5)
    assert bound.effective_accuracy == pytest.approx(0.4)


def test_a_mixed_load_is_bounded_tightly() -> None:
    """Ten requests in 20 ms, 3 ms or 1 ms each: five of either kind is optimal, and that is the bound."""
    bound = upper_bound([Demand(0, 20 * MS)] * 10, [linear(0.9, 3), linear(0.8, 1)], 1)
    assert bound.attainment == pytest.approx(1)
    assert bound.effective_accuracy == pytest.approx(0.85)


def test_answering_more_can_cost_accuracy() -> None:
    """Where the accurate variant earns more per time, each attainment has its own most accurate schedule."""
    variants = [linear(1.0, 2), linear(0.4, 1)]
    bound = upper_bound([Demand(0, 10 * MS)] * 10, variants, 1, attainments=(0.2, 0.5, 0.75, 1.0))
    assert bound.effective_accuracy == pytest.approx(0.5)
    for most, exact in zip(bound.accuracy_at, (0.5, 0.5, 0.45, 0.4), strict=True):
        assert exact - 1e-9 <= most <= exact + 2e-3
    with pytest.raises(ValueError, match="at most"):
        upper_bound([Demand(0, 10 * MS)] * 11, variants, 1, attainments=(1.0,))


def test_a_batch_must_fit_its_requests_windows() -> None:
    """A sample costs what the best batch that fits takes; what no batch fits is not answered."""
    variant = FluidVariant.of(0.9, LatencyProfile((1, 2, 4), (5 * MS, 6 * MS, 8 * MS)))
    assert variant.latencies_ns == (5 * MS, 6 * MS, 7 * MS, 8 * MS)
    assert [variant.cost_ns(window * MS) / MS for window in (4, 5, 6, 8, 100)] == [np.inf, 5, 3, 2, 2]
    assert upper_bound([Demand(0, 4 * MS), Demand(9, 9)], [variant], 4).attainment == 0
    assert upper_bound([Demand(0, 6 * MS)] * 4, [variant], 1, bin_ns=MS).attainment == pytest.approx(0.5)


def test_inputs_of_any_length_cost_what_the_fastest_length_does() -> None:
    """At each batch size the fastest profile counts, whichever length it is of."""
    real, short = LatencyProfile((1, 2), (5 * MS, 9 * MS)), LatencyProfile((1, 2), (6 * MS, 7 * MS))
    assert FluidVariant.of(0.9, real, short).latencies_ns == (5 * MS, 7 * MS)


def test_answers_of_no_known_accuracy_are_worth_nothing() -> None:
    """A model without a score has a bound for its attainment, and an effective accuracy of zero."""
    bound = upper_bound([Demand(0, 10 * MS)] * 20, [linear(0.0, 1)], 1, attainments=(0.25,))
    assert bound.attainment == pytest.approx(0.5)
    assert (bound.effective_accuracy, bound.accuracy_at) == (0, (0,))


def test_samples_and_allowed_variants_count() -> None:
    """A request of two samples costs twice; one that forbids the cheap variant pays for the dear one."""
    variants = [linear(0.9, 4), linear(0.8, 1)]
    assert upper_bound([Demand(0, 10 * MS, samples=2)] * 10, variants, 1).attainment == pytest.approx(0.5)
    assert upper_bound([Demand(0, 10 * MS, allowed=0b01)] * 10, variants, 1).attainment == pytest.approx(0.25)
    assert upper_bound([Demand(0, 10 * MS, allowed=0)], variants, 1).attainment == 0


def test_more_executors_or_wider_bins_never_lower_the_bound() -> None:
    """On a bursty trace, in both figures."""
    demands = bursty(2, slos_ms=(30, 60))
    by_executors = [upper_bound(demands, FAMILY, count) for count in (1, 2, 3)]
    by_bins = [upper_bound(demands, FAMILY, 1, width * MS) for width in (5, 10, 20, 40)]
    for rising in (by_executors, by_bins):
        for less, more in pairwise(rising):
            assert less.attainment <= more.attainment + 1e-9
            assert less.effective_accuracy <= more.effective_accuracy + 1e-9
    assert by_executors[0].attainment < 0.95 < by_executors[2].attainment  # the trace is not all slack


def test_segments_hardly_loosen_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices found second by second bound the whole as well as prices found at once, and never below."""
    demands = bursty(5)
    whole = upper_bound(demands, FAMILY, 2)
    monkeypatch.setattr(module, "_SEGMENT_BINS", 100)
    pieces = upper_bound(demands, FAMILY, 2)
    assert whole.effective_accuracy - 1e-9 <= pieces.effective_accuracy <= whole.effective_accuracy + 1e-4


def test_any_prices_bound() -> None:
    """Weak duality: arbitrary prices never give less than the best ones, so a bad solver cannot make it invalid."""
    accuracies = np.array([variant.accuracy for variant in FAMILY])
    market = module._Market(module._groups(bursty(1), FAMILY, 10 * MS), 2)
    best, _ = market.bound(accuracies)
    rng = np.random.default_rng(1)
    for scale in (0.1, 1, 10):
        assert market._worth(rng.random(market._bins) * scale, accuracies) >= best - 1e-6


def test_chains_are_as_few_as_the_slos() -> None:
    """Three latency SLOs, mixed at random, are at most three chains, and deadlines rise in each."""
    groups = module._groups(bursty(1, slos_ms=(30, 60, 120)), FAMILY, 10 * MS)
    chains, chain_of = module._chains(groups)
    assert chains == 3
    for chain in range(chains):
        ends = [group.end for group, of in zip(groups, chain_of, strict=True) if of == chain]
        assert ends == sorted(ends)


@pytest.mark.parametrize(
    ("requests", "variants", "executors", "bin_ns"),
    [
        ([], FAMILY, 1, MS),
        ([Demand(0, MS)], [], 1, MS),
        ([Demand(0, MS)], FAMILY, 0, MS),
        ([Demand(0, MS)], FAMILY, 1, 0),
    ],
)
def test_nothing_to_bound_is_an_error(
    requests: list[Demand], variants: list[FluidVariant], executors: int, bin_ns: int
) -> None:
    """Without requests, variants, executors or bins there is no bound."""
    with pytest.raises(ValueError, match="at least one request"):
        upper_bound(requests, variants, executors, bin_ns)


def test_a_missing_scipy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says which extra to install."""
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(ImportError, match=r"gearshift\[simulate\]"):
        upper_bound([Demand(0, 100 * MS)], FAMILY, 1)
