"""How long an executor may be busy before requests of a kind seen lately would come too late for it.

A request with a tight deadline and a strict floor cannot wait for a long batch of patient ones to end, and nothing that
runs is interrupted. So somewhere an executor must become free within the *laxity* of the tightest requests that are
to be expected: their time allowed beyond their fastest possible run.

Rules: kinds are few (floor class, size, step of length, octave of the time allowed) and forgotten within seconds; they
are looked through once in a few milliseconds, not at every decision of every model. A kind too tight for anything that
could run protects nobody and must not stand in the way of those that can be protected.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from math import exp
from typing import NamedTuple

from server.scheduling.slo import Request

_TAU_NS = 1_000_000_000  # over which arrivals of a kind are counted
_MEMORY_NS = 5_000_000_000
_MOST_KINDS = 64
_REVIEW_NS = 5_000_000  # for so long the laxities that were worked out last are good enough
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
        self._laxities: list[tuple[int, float]] = []  # with how many came in the last `_TAU_NS`, the tightest first
        self._reviewed_ns: int | None = None

    def copy(self) -> Patience:
        """The same memory, that goes its own way from now on."""
        other = Patience()
        other._kinds = dict(self._kinds)
        return other

    def arrived(self, request: Request, now_ns: int) -> None:
        """Take note of a request that was admitted."""
        budget_ns = request.deadline_ns - request.arrival_ns
        kind = request.allowed, request.samples, request.step, budget_ns.bit_length()
        seen = self._kinds.pop(kind, None)
        if seen is None or now_ns - seen.last_ns > _MEMORY_NS:
            seen = _Seen(budget_ns, 0.0, now_ns)
            self._reviewed_ns = None
        # put at the end: in order of when they were last seen
        self._kinds[kind] = _Seen(min(seen.least_ns, budget_ns), seen.count_at(now_ns) + 1.0, now_ns)
        if len(self._kinds) > _MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]

    def laxity_ns(self, quickest_ns: Quickest, now_ns: int, within_ns: int, least_ns: int = 0) -> int | None:
        """The least time beyond its fastest run that a request allows of which some are expected; None if none are.

        Expected are those of which more than `_NOTABLE` come in a time as long as `within_ns`, judged by late arrivals.
        Who allows less than `least_ns` is passed over.
        """
        if self._reviewed_ns is None or now_ns - self._reviewed_ns >= _REVIEW_NS:
            self._reviewed_ns = now_ns
            self._laxities = sorted(self._review(quickest_ns, now_ns))
        place = bisect_left(self._laxities, (least_ns,))
        expected = (laxity for laxity, count in self._laxities[place:] if count * within_ns >= _NOTABLE * _TAU_NS)
        return next(expected, None)

    def _review(self, quickest_ns: Quickest, now_ns: int) -> Iterator[tuple[int, float]]:
        for kind in [kind for kind, seen in self._kinds.items() if now_ns - seen.last_ns > _MEMORY_NS]:
            del self._kinds[kind]
        for (allowed, samples, step, _), seen in self._kinds.items():
            run_ns = quickest_ns(allowed, samples, step)
            if run_ns is not None:
                yield seen.least_ns - run_ns, seen.count_at(now_ns)
