"""Nexus (SOSP'19) on one variant: batches that cost at most half of the SLO, kept at that size by early drop.

A request that just misses a batch waits for it and then for its own, so a batch may cost SLO / 2. In its code
(GetBatchTaskSlidingWindow) the batch has a target size, requests are popped in order, and those whose deadline lies
before the batch's finish are dropped though they have not expired.

Adapted: the SLO is the deadline that requests usually have; no squishy bin packing, since there is one model on
executors that are all its own; requests that may not run on the variant are given up.
"""

from __future__ import annotations

from server.scheduling.policies.fixed import Fixed


class Nexus(Fixed):
    """Batches of the planned size; to be used with early drop."""

    def size(self, _fits: int, planned: int, /) -> tuple[int, int]:
        """What was planned, whatever the head's slack."""
        return planned, planned
