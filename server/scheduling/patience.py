"""How long an executor may be busy before requests of a kind seen lately would come too late for it.

A request with a tight deadline and a strict floor cannot wait for a long batch of patient ones to end, and nothing that
runs is interrupted. So somewhere an executor must become free within the *laxity* of the tightest requests that are
to be expected: their time allowed beyond their fastest possible run.

Rules: kinds are few (floor class, size, step of length, octave of the time allowed) and forgotten within seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp
from typing import NamedTuple

from server.scheduling.slo import Request

_TAU_NS = 1_000_000_000  # over which arrivals of a kind are counted
_MEMORY_NS = 5_000_000_000
_MOST_KINDS = 64
_NOTABLE = 0.1  # arrivals expected while a batch runs, below which a kind need not be kept in mind

Kind = tuple[int, int, int, int]
Quickest = Callable[[int, int, int], int | None]
"""Floor class, samples and step in; the least time in which they can run out."""


class _Seen(NamedTuple):
    """A kind of requests: the least time one of them allowed, how many came of late, and when the last one did."""

    least_ns: int
    weight: float
    last_ns: int

    def count_at(self, now_ns: int) -> float:
        """How many came in the last `_TAU_NS`, those of long ago fading out."""
        return self.weight * exp((self.last_ns - now_ns) / _TAU_NS)


class Patience:
    """The kinds of requests seen lately."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, _Seen] = {}

    def arrived(self, request: Request, now_ns: int) -> None:
        """Take note of a request that was admitted."""
        budget_ns = request.deadline_ns - request.arrival_ns
        kind = request.allowed, request.samples, request.step, budget_ns.bit_length()
        seen = self._kinds.pop(kind, None)
        if seen is None or now_ns - seen.last_ns > _MEMORY_NS:
            seen = _Seen(budget_ns, 0.0, now_ns)
        # put at the end: in order of when they were last seen
        self._kinds[kind] = _Seen(min(seen.least_ns, budget_ns), seen.count_at(now_ns) + 1.0, now_ns)
        if len(self._kinds) > _MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]

    def laxity_ns(self, quickest_ns: Quickest, now_ns: int, within_ns: int) -> int | None:
        """The least time beyond its fastest run that a request allows of which some are expected; None if none are.

        Expected are those of which more than `_NOTABLE` come in a time as long as `within_ns`, judged by late arrivals.
        """
        least: int | None = None
        for (allowed, samples, step, _), seen in self._kinds.items():
            if seen.count_at(now_ns) * within_ns < _NOTABLE * _TAU_NS:
                continue
            run_ns = quickest_ns(allowed, samples, step)
            if run_ns is not None and (least is None or seen.least_ns - run_ns < least):
                least = seen.least_ns - run_ns
        return least
