"""The most that any scheduler could reach on given requests: an upper bound from a linear program.

What is bounded: any schedule, even one that knows every arrival in advance, on equal executors whose batches take
exactly their profiled (mean) latency; real service times, which vary, may by luck beat a bound made of their means.
Where the inputs' lengths vary, every input counts as if it were of the length that runs fastest: valid, and looser.
The bound is the optimum of an easier problem (the *fluid relaxation*), easier in four ways:

* **Batching.** A request answered in time shares a batch that runs inside its window (arrival to deadline), so the
  batch's latency L(b) is at most the window, and each of its b samples takes up L(b)/b of executor time. The easier
  problem charges the least L(b)/b among the batch sizes that fit the window; a variant whose L(1) does not fit cannot
  answer the request at all.
* **Executors.** In any interval they do at most their number times its length of work, and that is all that is kept:
  work is a fluid, which any number of executors may share and which is interrupted for nothing.
* **Requests** may be answered in part, each part by another variant, and count in part.
* **Time** goes in bins: arrivals are rounded down to their bin's start and deadlines up to their bin's end, so windows
  only grow. Wider bins are faster and looser, never wrong.

How it is computed: by prices. Let executor time cost price[t] >= 0 in bin t. A request, buying in its window's cheapest
bin, is worth at most ``max(0, value - work * cheapest price)`` over its variants, and all executor time together
sells for ``executors * sum(price)``. By weak duality the sum of both is an upper bound **for any prices**, and with the
best ones it equals the easier problem's optimum. So the solver (scipy's HiGHS) only has to find good prices, segment by
segment; what it gets wrong, its tolerance included, makes the bound looser and never invalid.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from variants.variant import LatencyProfile

_SEGMENT_BINS = 500  # a linear program's time grows faster than its length
_MARGIN_WINDOWS = 4  # what a segment sees of its neighbours, in longest windows
_BISECTIONS = 12
_ROUNDING = 1e-12  # far above what adding up floating-point numbers can lose

_Vector = NDArray[np.float64]
_Work = tuple[float, ...]  # executor time per variant, in bins; infinite where the variant cannot answer


@dataclass(frozen=True, slots=True)
class FluidVariant:
    """A variant as the bound sees it: its accuracy in [0, 1] and the latency of a batch of 1, 2, 3 … samples."""

    accuracy: float
    latencies_ns: tuple[int, ...]

    @classmethod
    def of(cls, accuracy: float, *profiles: LatencyProfile) -> FluidVariant:
        """The variant with these latency profiles, one for each length: at every batch size the fastest of them counts.

        Between the measured batch sizes it is interpolated as a profile does.
        """
        largest = max(profile.max_batch_size for profile in profiles)
        return cls(accuracy, tuple(_fastest_ns(profiles, size) for size in range(1, largest + 1)))

    def cost_ns(self, window_ns: int) -> float:
        """The least executor time per sample in a batch that fits the window; infinite where no batch fits."""
        costs = (latency / size for size, latency in enumerate(self.latencies_ns, 1) if latency <= window_ns)
        return min(costs, default=np.inf)


def _fastest_ns(profiles: Sequence[LatencyProfile], size: int) -> int:
    return min(profile.latency_ns(size) for profile in profiles if size <= profile.max_batch_size)


@dataclass(frozen=True, slots=True)
class Demand:
    """One request: its window, its samples, and the variants it allows (bit i is the i-th variant; -1 is all)."""

    arrival_ns: int
    deadline_ns: int
    samples: int = 1
    allowed: int = -1


@dataclass(frozen=True, slots=True)
class Bound:
    """What no scheduler exceeds; a request of many samples counts once.

    `attainment` bounds the share of requests answered in time, `effective_accuracy` the sum of the accuracies of the
    answers in time over the number of requests. `accuracy_at[i]` bounds the effective accuracy of the schedules whose
    attainment is at least the i-th level asked for.
    """

    attainment: float
    effective_accuracy: float
    accuracy_at: tuple[float, ...] = ()


def upper_bound(
    requests: Sequence[Demand],
    variants: Sequence[FluidVariant],
    executors: int,
    bin_ns: int = 10_000_000,
    attainments: Sequence[float] = (),
) -> Bound:
    """Bound every schedule of the requests; the module says what is relaxed and why the bound holds.

    Raises ValueError without requests or variants, with executors or a bin width below 1, or for a level in
    `attainments` beyond the attainable; ImportError, naming the extra to install, without scipy.
    """
    if not requests or not variants or executors < 1 or bin_ns < 1:
        raise ValueError("a bound needs at least one request, variant and executor, and bins of at least 1 ns")
    market = _Market(_groups(requests, variants, bin_ns), executors)
    accuracies = np.array([variant.accuracy for variant in variants])
    total = len(requests)
    attainment = market.bound(np.ones_like(accuracies))[0] / total
    free, answered = market.bound(accuracies)
    at = []
    for level in attainments:
        if level > attainment + 1e-9:
            raise ValueError(f"no schedule answers {level:.6f} of these requests in time: at most {attainment:.6f}")
        wanted = level * total
        at.append((free if answered >= wanted - 1e-6 * total else _at_least(market, accuracies, free, wanted)) / total)
    return Bound(min(1.0, attainment), free / total, tuple(at))


def _at_least(market: _Market, accuracies: _Vector, free: float, wanted: float) -> float:
    """Bound the sum of accuracies when at least `wanted` requests are answered, `free` being the bound without that.

    A bonus for every answer, paid back for the wanted ones, never lowers what such a schedule is worth: each bonus
    gives a bound. It is convex in the bonus, and least where the best schedule answers just as many as wanted.
    """
    best, low, high = free, 0.0, 2.0 * float(accuracies.max()) + 1.0
    for _ in range(_BISECTIONS):
        bonus = (low + high) / 2
        worth, answered = market.bound(accuracies + bonus)
        best = min(best, worth - bonus * wanted)
        low, high = (low, bonus) if answered >= wanted else (bonus, high)
    return best


@dataclass(frozen=True, slots=True, order=True)
class _Group:
    """Requests that the program cannot tell apart: bins [start, end), work by variant, and how many they are."""

    start: int
    end: int
    work: _Work
    count: int


def _groups(requests: Sequence[Demand], variants: Sequence[FluidVariant], bin_ns: int) -> list[_Group]:
    """The requests that some variant can answer, grouped, by arrival and then deadline."""
    origin_ns = min(request.arrival_ns for request in requests)

    @cache
    def work(window_ns: int, samples: int, allowed: int) -> _Work:
        costs = (v.cost_ns(window_ns) if allowed >> bit & 1 else np.inf for bit, v in enumerate(variants))
        return tuple(cost * samples / bin_ns for cost in costs)

    counts: Counter[tuple[int, int, _Work]] = Counter()
    for request in requests:
        start = (request.arrival_ns - origin_ns) // bin_ns
        end = -((origin_ns - request.deadline_ns) // bin_ns)
        counts[start, end, work(request.deadline_ns - request.arrival_ns, request.samples, request.allowed)] += 1
    return sorted(_Group(*key, count) for key, count in counts.items() if min(key[2]) < np.inf)


class _Market:
    """The requests as buyers of executor time."""

    def __init__(self, groups: list[_Group], executors: int) -> None:
        self._groups = groups
        self._executors = executors
        self._bins = max((group.end for group in groups), default=0)
        self._margin = _MARGIN_WINDOWS * max((group.end - group.start for group in groups), default=0)
        self._counts = np.array([group.count for group in groups], dtype=np.float64)
        work = np.array([group.work for group in groups])
        self._usable = np.isfinite(work)
        self._work = np.where(self._usable, work, 0.0)

    def bound(self, values: _Vector) -> tuple[float, float]:
        """Bound the sum of values answered (`values` by variant), with about how many requests an optimum answers."""
        if not self._groups:
            return 0.0, 0.0
        prices = np.zeros(self._bins)
        answered = 0.0
        for first in range(0, self._bins, _SEGMENT_BINS):
            core = range(first, min(first + _SEGMENT_BINS, self._bins))
            seen = [g for g in self._groups if first - self._margin <= g.start < core.stop + self._margin]
            if any(group.start in core or first < group.end for group in seen):
                found, shares = _solve(seen, values, self._executors)
                origin = seen[0].start
                stop = min(core.stop, origin + len(found))
                prices[max(first, origin) : stop] = found[max(first - origin, 0) : stop - origin]
                answered += sum(share for group, share in zip(seen, shares, strict=True) if group.start in core)
        return self._worth(prices, values), answered

    def _worth(self, prices: _Vector, values: _Vector) -> float:
        """What buyers and executors gain together at these prices: a bound whatever the prices are."""
        cheapest = np.array([prices[group.start : group.end].min() for group in self._groups])
        gains = np.where(self._usable, values - self._work * cheapest[:, None], 0.0).max(axis=1)
        return float(self._executors * prices.sum() + self._counts @ np.maximum(gains, 0.0)) * (1 + _ROUNDING)


def _solve(groups: Sequence[_Group], values: _Vector, executors: int) -> tuple[_Vector, _Vector]:
    """Prices per bin from the first group's start on, and answered requests per group, of the fluid problem's optimum.

    Groups are split into the fewest *chains* in which deadlines rise with arrivals (one per latency SLO, as a rule).
    Inside a chain first come, first served loses nothing, so two balances per bin stand for "which request when":
    `waiting` work (arrived, not done) and work done `ahead` of its deadline, both at least 0.
    """
    origin = groups[0].start
    bins = max(group.end for group in groups) - origin
    chains, chain_of = _chains(groups)
    shares = [
        (row, variant) for row, group in enumerate(groups) for variant in _worth_buying(group.work, tuple(values))
    ]
    if not shares:  # what these may run on is worth nothing, such as a model of no known accuracy
        return np.zeros(bins), np.zeros(len(groups))
    sparse, linprog = _scipy()
    row_of = np.array([row for row, _ in shares])
    work = np.array([groups[row].work[variant] for row, variant in shares])
    arrives = np.array([chain_of[row] * bins + groups[row].start - origin for row, _ in shares])
    is_due = np.array([chain_of[row] * bins + groups[row].end - 1 - origin for row, _ in shares])

    def entries(values: _Vector, rows: NDArray[np.int64], height: int) -> Any:
        return sparse.csr_array((values, (rows, np.arange(len(shares)))), shape=(height, len(shares)))

    done = sparse.eye_array(chains * bins)
    change = sparse.kron(sparse.eye_array(chains), sparse.eye_array(bins) - sparse.eye_array(bins, k=-1))
    balances = [
        [-entries(work, arrives, chains * bins), done, change, None],
        [entries(work, is_due, chains * bins), -done, None, change],
    ]
    limits = [
        [entries(np.ones(len(shares)), row_of, len(groups)), None, None],
        [None, sparse.kron(np.ones((1, chains)), sparse.eye_array(bins)), sparse.csr_array((bins, 2 * chains * bins))],
    ]
    counts = np.array([group.count for group in groups], dtype=np.float64)
    result = linprog(
        -np.concatenate([values[[variant for _, variant in shares]], np.zeros(3 * chains * bins)]),
        A_ub=sparse.block_array(limits, format="csr"),
        b_ub=np.concatenate([counts, np.full(bins, float(executors))]),
        A_eq=sparse.block_array(balances, format="csr"),
        b_eq=np.zeros(2 * chains * bins),
        method="highs",
    )
    if result.status != 0:
        raise RuntimeError(f"the linear program was not solved: {result.message}")
    answered = np.zeros(len(groups))
    np.add.at(answered, row_of, result.x[: len(shares)])
    return np.maximum(0.0, -result.ineqlin.marginals[len(groups) :]), answered


def _chains(groups: Iterable[_Group]) -> tuple[int, list[int]]:
    """The least number of chains of groups (given by arrival) whose deadlines never fall, and each group's chain."""
    ends: list[int] = []  # each chain's last deadline, falling, so that the first that fits is the nearest
    chain_of = []
    for group in groups:
        chain = bisect_left(ends, -group.end, key=lambda end: -end)
        if chain == len(ends):
            ends.append(group.end)
        ends[chain] = group.end
        chain_of.append(chain)
    return len(ends), chain_of


@cache
def _worth_buying(work: _Work, values: tuple[float, ...]) -> tuple[int, ...]:
    """The variants on the concave hull of (work, value) from (0, 0): the others are no bargain at any price."""
    hull: list[int] = []
    at_work, at_value = 0.0, 0.0
    while True:
        slopes = {
            variant: (value - at_value) / (work[variant] - at_work)
            for variant, value in enumerate(values)
            if at_work < work[variant] < np.inf and value > at_value
        }
        if not slopes:
            return tuple(hull)
        best = max(slopes, key=lambda variant: slopes[variant])
        hull.append(best)
        at_work, at_value = work[best], values[best]


def _scipy() -> tuple[Any, Any]:
    """scipy.sparse and linprog, loaded when first needed: a server works without them."""
    try:
        from scipy import sparse
        from scipy.optimize import linprog
    except ImportError as error:
        raise ImportError("scipy is not installed: pip install 'gearshift[simulate]'") from error
    return sparse, linprog
