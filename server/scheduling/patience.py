"""How long an executor may be busy before requests of a kind seen lately would come too late for it.

A request with a tight deadline and a strict floor cannot wait for a long batch of patient ones to end, and nothing that
runs is interrupted. So somewhere an executor must become free within the *laxity* of the tightest requests that are
to be expected: their time allowed beyond their fastest possible run.

Rules: kinds are few (floor class, size, step of length, octave of the time allowed) and forgotten within seconds.
"""

from __future__ import annotations

from collections.abc import Callable

from server.scheduling.slo import Request

_MEMORY_NS = 5_000_000_000
_MOST_KINDS = 64

Kind = tuple[int, int, int, int]
Quickest = Callable[[int, int, int], int | None]
"""Floor class, samples and step in; the least time in which they can run out."""


class Patience:
    """The kinds of requests seen lately, each with the least time one of them allowed and when one was last seen."""

    def __init__(self) -> None:
        self._kinds: dict[Kind, tuple[int, int]] = {}

    def arrived(self, request: Request, now_ns: int) -> None:
        """Take note of a request that was admitted."""
        budget_ns = request.deadline_ns - request.arrival_ns
        kind = request.allowed, request.samples, request.step, budget_ns.bit_length()
        least_ns, seen_ns = self._kinds.pop(kind, (budget_ns, now_ns))
        if now_ns - seen_ns > _MEMORY_NS:
            least_ns = budget_ns
        self._kinds[kind] = min(least_ns, budget_ns), now_ns  # at the end: in order of when they were last seen
        if len(self._kinds) > _MOST_KINDS:
            del self._kinds[next(iter(self._kinds))]

    def laxity_ns(self, quickest_ns: Quickest, now_ns: int) -> int | None:
        """The least time beyond its fastest run that a request seen lately allowed; None if none was."""
        least: int | None = None
        for (allowed, samples, step, _), (budget_ns, seen_ns) in self._kinds.items():
            run_ns = quickest_ns(allowed, samples, step) if now_ns - seen_ns <= _MEMORY_NS else None
            if run_ns is not None and (least is None or budget_ns - run_ns < least):
                least = budget_ns - run_ns
        return least
