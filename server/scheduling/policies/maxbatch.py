"""MaxBatch and MaxAcc: the two greedy policies that SuperServe (NSDI'25, appendix A.5) compares SlackFit with.

MaxBatch takes the largest batch that the fastest model finishes within the slack of the earliest deadline, then the
most accurate model that still does. MaxAcc takes the most accurate model that finishes one request within the slack,
then its largest batch.

Adapted: among the variants that the head allows; a batch is no larger than the queue, so that a short queue gets the
accuracy that it has time for.
"""

from __future__ import annotations

from server.scheduling.policies.batches import Line, Pick, Rule, fastest_for, largest, throughput_batch
from server.scheduling.policy import Moment
from server.scheduling.slo import Request


class MaxBatch(Rule):
    """First the size, then the accuracy."""

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """The most accurate variant for the largest batch."""
        model, fastest = line.model, fastest_for(line.model, head)
        if fastest is None:
            return None
        fits = {
            variant: min(largest(model, variant, head, moment.now_ns), max(head.samples, line.samples(variant)))
            for variant in model.fitting(head.allowed, head.samples)
        }
        variant = max(fits, key=lambda variant: (fits[variant], -variant))
        if not fits[variant]:
            return None
        return Pick(variant, fits[variant], throughput_batch(model, fastest))


class MaxAcc(Rule):
    """First the accuracy, then the size."""

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """The largest batch of the most accurate variant that is in time."""
        model, fastest = line.model, fastest_for(line.model, head)
        for variant in model.fitting(head.allowed, head.samples):
            size = largest(model, variant, head, moment.now_ns)
            if size and fastest is not None:
                return Pick(variant, size, throughput_batch(model, fastest))
        return None
