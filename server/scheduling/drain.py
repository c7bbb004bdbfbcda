"""Would everybody who waits, and who is about to come, still be in time if an executor were busy until then?

The test plays the backlog forward, most urgent first, on the fastest allowed variants, in the largest batches that the
time left allows; beyond a bounded number of batches, and for the arrivals forecast, it reckons with a fluid. It is
conservative, not complete: batches of several floor classes, which are allowed, are not tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from server.scheduling.deadline_queue import Entry
from server.scheduling.latency import LatencyModel
from server.scheduling.model_queue import REPLY_RESERVE_NS, Chunk, ModelQueue
from server.scheduling.policy import Moment
from server.scheduling.slo import Request

_STEPS = 24  # batches of backlog tested one by one; the rest is tested as a fluid


@dataclass(frozen=True, slots=True)
class _Stream:
    """One floor class as it drains: its requests in order, those taken included, and how its batches are."""

    latency: LatencyModel
    entries: Sequence[Entry]
    left: int
    """Requests that were not taken."""
    step: int
    full: Chunk
    average: int
    """Samples of an average request."""

    def next_place(self, place: int, gone: set[Request]) -> int | None:
        """The place of the first request from here on that was not taken; None at the end."""
        entries = self.entries
        while place < len(entries):
            if entries[place][2] not in gone:
                return place
            place += 1
        return None

    def batch(self, slack_ns: int) -> tuple[int, int]:
        """The largest batch within the slack: its requests and its time. Without any, the time that one needs."""
        variant, requests, _, full_ns = self.full
        if full_ns <= slack_ns:
            return requests, full_ns
        requests = self.latency.largest_crowded(variant, slack_ns, self.step) // self.average
        return requests, self.latency.crowded_ns(variant, max(requests, 1) * self.average, self.step)


@dataclass(frozen=True, slots=True)
class Behind:
    """What a batch leaves waiting, by floor class, and the requests that it takes."""

    model: ModelQueue
    gone: set[Request]
    streams: Sequence[_Stream]


def left_behind(model: ModelQueue, taken: Sequence[Request] = ()) -> Behind:
    """What waits once a batch has been taken."""
    taken_from = Counter((request.allowed, request.step) for request in taken)
    streams = []
    for key, waiting in model.regular.classes.items():
        left = len(waiting) - taken_from[key]
        chunk = model.chunk(*key, waiting) if left else None
        if chunk is not None:
            streams.append(_Stream(model.latency, waiting.entries, left, key[1], chunk, waiting.average))
    return Behind(model, set(taken), streams)


class Shortage(NamedTuple):
    """By how much those who wait, and those who are about to come, would be late; 0 where they are not."""

    waiting_ns: int
    arriving_ns: int = 0


def shortage(behind: Behind, moment: Moment, free_ns: int) -> Shortage:
    """By how much the first of those left behind, else the forecast, would be late on their fastest variants.

    `free_ns` is when the executor that decides would be free again. Of other models only the most urgent request is
    looked at, where it can still be in time: what lies behind it is a matter of fairness.
    """
    free = [free_ns, *moment.others_free_ns]
    heapify(free)
    for deadline_ns, run_ns in sorted(_rivals_heads(moment)):
        late_ns = free[0] + run_ns - deadline_ns + REPLY_RESERVE_NS
        if late_ns > 0:
            return Shortage(late_ns)
        heapreplace(free, free[0] + run_ns)
    left = [stream.left for stream in behind.streams]
    heads = [head for number in range(len(left)) if (head := _head(behind, number, 0)) is not None]
    heapify(heads)
    for _ in range(_STEPS):
        if not heads:
            break
        deadline_ns, number, place = heads[0]
        requests, batch_ns = behind.streams[number].batch(deadline_ns - REPLY_RESERVE_NS - free[0])
        if not requests:
            return Shortage(free[0] + batch_ns - deadline_ns + REPLY_RESERVE_NS)
        heapreplace(free, free[0] + batch_ns)
        left[number] -= requests
        head = _head(behind, number, place + requests)
        if head is None:
            heappop(heads)
        else:
            heapreplace(heads, head)
    return _as_fluid(behind, moment, free_ns, free, left)


def _head(behind: Behind, number: int, place: int) -> tuple[int, int, int] | None:
    """The next request of a class: its deadline, the class's number and its place there; None at the end."""
    stream = behind.streams[number]
    found = stream.next_place(place, behind.gone)
    return None if found is None else (stream.entries[found][2].deadline_ns, number, found)


def _rivals_heads(moment: Moment) -> list[tuple[int, int]]:
    """The deadline and the run of every other model's most urgent request that can still be in time."""
    heads = []
    for rival in moment.rivals:
        head = rival.most_urgent(moment.now_ns)
        run_ns = None if head is None else rival.quickest_ns(head.allowed, head.samples, head.step)
        if head is not None and run_ns is not None:
            heads.append((head.deadline_ns, run_ns))
    return heads


def _as_fluid(behind: Behind, moment: Moment, free_ns: int, free: Sequence[int], left: Sequence[int]) -> Shortage:
    """By how much what was not tested one by one, and what is to come while the batch runs, would be late."""
    tail_ns = last_deadline_ns = 0
    for stream, count in zip(behind.streams, left, strict=True):
        if count > 0:
            tail_ns += -(-count // stream.full.requests) * stream.full.batch_ns
            last_deadline_ns = max(last_deadline_ns, stream.entries[-1][2].deadline_ns)
    if tail_ns and (late_ns := max(free) + tail_ns // len(free) - last_deadline_ns) > 0:
        return Shortage(late_ns)
    arriving_ns = _arriving_ns(behind.model, moment.now_ns, free_ns)
    if not arriving_ns:
        return Shortage(0)
    drained_ns = (sum(free) + tail_ns + arriving_ns) // len(free)
    return Shortage(0, max(0, int(drained_ns - moment.now_ns - behind.model.typical_budget_ns)))


def _arriving_ns(model: ModelQueue, now_ns: int, free_ns: int) -> int:
    """Executor time of the arrivals to be expected during the batch, as a fluid on the fastest variant."""
    fastest = model.fastest(model.eligible)
    if fastest is None:
        return 0
    batch = model.throughput_batch(fastest)
    return int(model.forecast.expected(free_ns - now_ns, now_ns) * model.latency.crowded_ns(fastest, batch) / batch)
