"""Clockwork (OSDI'20) on one variant: only batches that will be in time, by the latencies seen last.

In its code every request waits in one queue per supported batch size and leaves the queue of size b once it could not
be in time in a batch of b; one that has left them all is rejected, so no work is spent on the doomed. The largest batch
with as many requests in its queue runs. A batch's latency is estimated by the 99th percentile of its last 10
measurements.

Adapted: the queues are computed from the one that there is, when an executor is idle. The order of its strategies by
latest start decides between models, which is the scheduler's matter here. Until a size has been measured its estimate
is the prediction; measurements are forgotten after a second, or one pause as long as the SLO would make the variant
refuse everybody for ever. Requests that may not run on the variant are given up.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.batches import Line, lines, may_run, nothing, place_of
from server.scheduling.policy import Choice, Decision, Moment, Run
from server.scheduling.slo import Request

_LAST = 10
_FORGET_NS = 1_000_000_000


class Clockwork:
    """The largest supported batch that can be filled with requests which will be in time.

    With early drop, those who left the queue of the batch that runs, and are ahead of its last request, are given up.
    """

    admits = False

    def __init__(self, name: str, *, early_drop: bool) -> None:
        self._name = name
        self._early_drop = early_drop
        self._measured: dict[tuple[int, int, int], deque[tuple[int, int]]] = defaultdict(lambda: deque(maxlen=_LAST))

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:
        """Nothing to learn here."""

    def finished(self, model: ModelQueue, run: Run, compute_ns: int, now_ns: int) -> None:
        """Remember how long a batch of this size took."""
        size = _supported(run.samples, model.latency.max_batch_size(run.place))
        self._measured[run.place, run.requests[0].step, size].append((now_ns, compute_ns))

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        """The largest batch; those who would be in time in none are rejected."""
        variant = place_of(model, self._name)
        rejected: list[Request] = []
        for line in lines(model):
            requests = list(line)
            if variant is None:
                rejected += requests
                continue
            finish_ns = self._finishes(model, variant, requests[0].step, moment.now_ns)
            waiting = [request for request in requests if _in_time(line, variant, request, finish_ns)]
            rejected += [request for request in requests if not _in_time(line, variant, request, finish_ns)]
            if waiting:
                members, left = _largest_batch(model, variant, waiting, finish_ns)
                samples = sum(request.samples for request in members)
                predicted_ns = model.latency.predict_ns(variant, samples, members[0].step)
                choice = Choice(variant, tuple(members), samples, predicted_ns, "policy")
                return Decision(choice, (*rejected, *(left if self._early_drop else ())))
        return nothing(rejected, moment.now_ns)

    def _finishes(self, model: ModelQueue, variant: int, step: int, now_ns: int) -> dict[int, int]:
        """When a batch of each supported size would be answered."""
        most = model.latency.max_batch_size(variant)
        sizes = sorted({_supported(samples, most) for samples in range(1, most + 1)})
        return {size: now_ns + self._estimate_ns(model, variant, step, size, now_ns) for size in sizes}

    def _estimate_ns(self, model: ModelQueue, variant: int, step: int, size: int, now_ns: int) -> int:
        measured = self._measured.get((variant, step, size), ())
        recent = [took_ns for at_ns, took_ns in measured if now_ns - at_ns < _FORGET_NS]
        return max(recent, default=model.latency.predict_ns(variant, size, step)) + REPLY_RESERVE_NS


def _in_time(line: Line, variant: int, request: Request, finish_ns: dict[int, int]) -> bool:
    if not may_run(line.model, variant, request):
        return False
    return finish_ns[_supported(request.samples, max(finish_ns))] <= request.deadline_ns


def _largest_batch(
    model: ModelQueue, variant: int, waiting: Sequence[Request], finish_ns: dict[int, int]
) -> tuple[list[Request], list[Request]]:
    """The members, and those ahead of the last of them who would have been late in this batch."""
    for size in sorted(finish_ns, reverse=True) if model.variants[variant].batchable else ():
        queue = [request for request in waiting if request.deadline_ns >= finish_ns[size]]
        if sum(request.samples for request in queue) < size:
            continue
        members, samples = list[Request](), 0
        for request in queue:
            if samples + request.samples <= size:
                members.append(request)
                samples += request.samples
        if members:
            ahead = waiting[: waiting.index(members[-1])]
            return members, [request for request in ahead if request.deadline_ns < finish_ns[size]]
    return [waiting[0]], []


def _supported(samples: int, most: int) -> int:
    """The batch size that so many samples run in: the next power of two, or the largest there is."""
    return min(1 << (samples - 1).bit_length(), most)
