"""SlackFit (SuperServe, NSDI'25): the slack of the most urgent request selects a batch size and a variant at once.

Offline, the range of latencies, from the fastest variant's for one to the slowest's for a full batch, is cut into 20
evenly spaced buckets; each keeps, of the (variant, batch size) within its range (appendix A.5), the one with the
largest batch, and of equal ones the most accurate. Online, the bucket whose latency is closest to but below the slack
of the earliest deadline is taken, and so many of the earliest requests are packed. The queue's length does not matter,
nothing is dropped, nothing waits.

Adapted: the buckets hold only what the head allows and are computed from calibrated predictions at every decision;
where no bucket lies below the slack, the fastest choice runs if it fits. "slackfit-q" keeps only batches that
the queue can fill, so that a short queue does not get the variant meant for a long one.
"""

from __future__ import annotations

from server.scheduling.policies.batches import Line, Pick, Rule, fastest_for, sizes, slack_ns, throughput_batch
from server.scheduling.policy import Moment
from server.scheduling.slo import Request

_BUCKETS = 20


class SlackFit(Rule):
    """The bucket below the slack; `to_queue` clips batches to what waits."""

    def __init__(self, *, to_queue: bool = False) -> None:
        self._to_queue = to_queue

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """The batch and the variant of the bucket that the head's slack selects."""
        fastest = fastest_for(line.model, head)
        if fastest is None:
            return None
        cells = self._cells(head, line)
        least_ns, most_ns = min(cells)[0], max(cells)[0]
        width_ns = max(1, (most_ns - least_ns) // _BUCKETS)
        slack = slack_ns(head, moment.now_ns)
        fitting = [
            (-(-(latency_ns - least_ns) // width_ns), size, -variant)
            for latency_ns, size, variant in cells
            if latency_ns <= slack
        ]
        if not fitting:
            return None
        below = (slack - least_ns) // width_ns
        _, size, place = max([cell for cell in fitting if cell[0] <= below], default=min(fitting))
        return Pick(-place, size, throughput_batch(line.model, fastest))

    def _cells(self, head: Request, line: Line) -> list[tuple[int, int, int]]:
        """What there is to choose from: (latency, batch size, variant)."""
        model = line.model
        return [
            (model.latency.predict_ns(variant, size, head.step), size, variant)
            for variant in model.fitting(head.allowed, head.samples)
            for size in sizes(model, variant, head)
            if not self._to_queue or size <= max(head.samples, line.samples(variant))
        ]
