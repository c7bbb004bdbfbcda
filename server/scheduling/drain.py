"""Would everybody who waits, and who is about to come, still be in time if an executor were busy until then?

The test plays the backlog forward, most urgent first, on the fastest allowed variants, in the largest batches that the
time left allows; beyond a bounded number of batches, and for the arrivals forecast, it reckons with a fluid. It is
conservative, not complete: batches of several floor classes, which are allowed, are not tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heapreplace
from typing import NamedTuple

from server.scheduling.deadline_queue import Entry
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Moment
from server.scheduling.slo import Request

_DRAIN_STEPS = 32  # batches of backlog tested one by one; the rest is tested as a fluid


@dataclass(slots=True)
class _Stream:
    """One floor class of one model as it drains: its requests in order, and the next one's place among them."""

    model: ModelQueue
    variant: int
    step: int
    most: int
    """Requests that a full batch takes."""
    average: int
    """Samples of an average request."""
    full_ns: int
    entries: Sequence[Entry]
    place: int = 0

    def head_deadline_ns(self, gone: set[Request]) -> int | None:
        """The deadline of the next request that was not taken; None at the end."""
        while self.place < len(self.entries):
            request = self.entries[self.place][2]
            if request not in gone:
                return request.deadline_ns
            self.place += 1
        return None

    def batch(self, slack_ns: int) -> tuple[int, int]:
        """The largest batch within the slack: its requests and its time. Without any, the time that one needs."""
        latency = self.model.latency
        if self.full_ns <= slack_ns:
            return self.most, self.full_ns
        requests = latency.largest_crowded(self.variant, slack_ns, self.step) // self.average
        return requests, latency.crowded_ns(self.variant, max(requests, 1) * self.average, self.step)


@dataclass(frozen=True, slots=True)
class Behind:
    """What a batch leaves waiting: by floor class as (key, requests), and who must not be counted."""

    model: ModelQueue
    gone: set[Request]
    left: dict[tuple[int, int], int]


def left_behind(model: ModelQueue, taken: Sequence[Request] = ()) -> Behind:
    """What waits once a batch has been taken."""
    taken_from = Counter((request.allowed, request.step) for request in taken)
    counts = {key: len(waiting) - taken_from[key] for key, waiting in model.regular.classes.items()}
    return Behind(model, set(taken), {key: count for key, count in counts.items() if count})


class Shortage(NamedTuple):
    """By how much those who wait, and those who are about to come, would be late; 0 where they are not."""

    waiting_ns: int
    arriving_ns: int = 0


def shortage(behind: Behind, moment: Moment, free_ns: int) -> Shortage:
    """By how much the first of those left behind, else the forecast, would be late on their fastest variants.

    `free_ns` is when the executor that decides would be free again. Of other models only the most urgent batch is
    looked at, where it can still be in time: what lies behind it is a matter of fairness.
    """
    free = [free_ns, *moment.others_free_ns]
    heapify(free)
    streams = _streams(behind)
    heads = sorted(_rivals_heads(moment))
    tested = dict.fromkeys(behind.left, 0)
    for _ in range(_DRAIN_STEPS):
        while heads and (not streams or heads[0][0] <= streams[0][0]):
            deadline_ns, batch_ns = heads.pop(0)
            if free[0] + batch_ns > deadline_ns - REPLY_RESERVE_NS:
                return Shortage(free[0] + batch_ns - deadline_ns + REPLY_RESERVE_NS)
            heapreplace(free, free[0] + batch_ns)
        if not streams:
            break
        deadline_ns, _, key, stream = streams[0]
        requests, batch_ns = stream.batch(deadline_ns - REPLY_RESERVE_NS - free[0])
        if not requests:
            return Shortage(free[0] + batch_ns - deadline_ns + REPLY_RESERVE_NS)
        heapreplace(free, free[0] + batch_ns)
        stream.place += requests
        tested[key] += requests
        next_ns = stream.head_deadline_ns(behind.gone)
        if next_ns is None:
            streams.pop(0)
        else:
            streams[0] = next_ns, stream.place, key, stream
            streams.sort(key=_by_deadline)
    return _as_fluid(behind, moment, free_ns, free, tested)


def _streams(behind: Behind) -> list[tuple[int, int, tuple[int, int], _Stream]]:
    """Every class that has somebody left, by the deadline of its next request; ties by place and class."""
    streams = []
    for key in behind.left:
        stream = _stream(behind.model, key)
        deadline_ns = stream.head_deadline_ns(behind.gone) if stream is not None else None
        if stream is not None and deadline_ns is not None:
            streams.append((deadline_ns, stream.place, key, stream))
    return sorted(streams, key=_by_deadline)


def _by_deadline(head: tuple[int, int, tuple[int, int], _Stream]) -> tuple[int, int, tuple[int, int]]:
    return head[:3]


def _stream(model: ModelQueue, key: tuple[int, int]) -> _Stream | None:
    allowed, step = key
    waiting, variant = model.regular.classes[key], model.fastest(allowed)
    if variant is None:
        return None
    most, full_ns = model.chunk(allowed, step, waiting)
    return _Stream(model, variant, step, most, waiting.average, full_ns, waiting.entries)


def _rivals_heads(moment: Moment) -> list[tuple[int, int]]:
    """The deadline and the run of every other model's most urgent request that can still be in time."""
    heads = []
    for rival in moment.rivals:
        head = rival.most_urgent(moment.now_ns)
        run_ns = None if head is None else rival.quickest_ns(head.allowed, head.samples, head.step)
        if head is not None and run_ns is not None:
            heads.append((head.deadline_ns, run_ns))
    return heads


def _as_fluid(
    behind: Behind, moment: Moment, free_ns: int, free: Sequence[int], tested: dict[tuple[int, int], int]
) -> Shortage:
    """By how much what was not tested one by one, and what is to come while the batch runs, would be late."""
    model = behind.model
    tail_ns = last_deadline_ns = 0
    for key, count in behind.left.items():
        if count > tested[key]:
            waiting = model.regular.classes[key]
            most, full_ns = model.chunk(*key, waiting)
            tail_ns += -(-(count - tested[key]) // most) * full_ns
            last_deadline_ns = max(last_deadline_ns, waiting.entries[-1][2].deadline_ns)
    if tail_ns and (late_ns := max(free) + tail_ns // len(free) - last_deadline_ns) > 0:
        return Shortage(late_ns)
    arriving_ns = _arriving_ns(model, moment.now_ns, free_ns)
    if not arriving_ns:
        return Shortage(0)
    drained_ns = (sum(free) + tail_ns + arriving_ns) // len(free)
    return Shortage(0, max(0, int(drained_ns - moment.now_ns - model.typical_budget_ns)))


def _arriving_ns(model: ModelQueue, now_ns: int, free_ns: int) -> int:
    """Executor time of the arrivals to be expected during the batch, as a fluid on the fastest variant."""
    fastest = model.fastest(model.eligible)
    if fastest is None:
        return 0
    batch = model.throughput_batch(fastest)
    return int(model.forecast.expected(free_ns - now_ns, now_ns) * model.latency.crowded_ns(fastest, batch) / batch)
