"""One variant for everybody, with lazy drop.

The batch is the largest that finishes before the head's deadline, as Nexus (SOSP'19) forms batches without early drop
(in its code GetBatchTaskEarliest: heads that cannot finish even alone are dropped, then the batch is as large as the
earliest deadline leaves room for). SuperServe (NSDI'25) compares itself with six such fixed models as "Clipper+".

Adapted: requests that may not run on the variant are given up; the service has no other.
"""

from __future__ import annotations

from server.scheduling.policies.batches import HOPELESS, Line, Pick, Rule, largest, may_run, place_of
from server.scheduling.policy import Moment
from server.scheduling.slo import Request


class Fixed(Rule):
    """Everybody runs on the variant of this name, or on the "fastest"."""

    def __init__(self, name: str) -> None:
        self._name = name

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """A batch on the one variant, unless not even the head would be in time."""
        variant = place_of(line.model, self._name)
        if variant is None or not may_run(line.model, variant, head):
            return HOPELESS
        fits = largest(line.model, variant, head, moment.now_ns)
        if not fits:
            return HOPELESS
        size, kept = self.size(fits, line.model.throughput_batch(variant))
        return Pick(variant, max(size, head.samples), (variant, kept))

    def size(self, fits: int, planned: int, /) -> tuple[int, int]:
        """The most samples to run together, and so many that early drop keeps.

        `fits` is what the head's slack leaves time for, `planned` what fits half of the usual deadline.
        """
        return fits, planned
