"""Would everybody who waits, and who is about to come, still be in time if an executor were busy until then?

The test plays the backlog forward, most urgent first, on the fastest allowed variants, in the largest batches that the
time left allows; beyond a bounded number of batches, and for the arrivals forecast, it reckons with a fluid. It is
conservative, not complete: batches of several floor classes, which are allowed, are not tried.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
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
class _Rival:
    """Another model's most urgent request: a stream of one."""

    entries: Sequence[Entry]
    run_ns: int
    left: int = 1

    def next_place(self, place: int, _: set[Request]) -> int | None:
        """The place of the only request, unless that was passed."""
        return None if place else 0

    def batch(self, slack_ns: int) -> tuple[int, int]:
        """The request and its time, if that is within the slack."""
        return int(self.run_ns <= slack_ns), self.run_ns


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
    streams: list[_Stream | _Rival] = [*behind.streams, *_rivals(behind, moment, free_ns)]
    left = [stream.left for stream in streams]
    heads = [head for number in range(len(left)) if (head := _head(streams, number, 0, behind.gone)) is not None]
    heapify(heads)
    for _ in range(_STEPS):
        if not heads:
            break
        deadline_ns, number, place = heads[0]
        slack_ns = deadline_ns - REPLY_RESERVE_NS - free[0]
        requests, batch_ns = streams[number].batch(slack_ns)
        if not requests:
            return Shortage(batch_ns - slack_ns)
        heapreplace(free, free[0] + batch_ns)
        left[number] -= requests
        head = _head(streams, number, place + requests, behind.gone)
        if head is None:
            heappop(heads)
        else:
            heapreplace(heads, head)
    return _as_fluid(behind, moment, free_ns, free, left[: len(behind.streams)])


def _head(
    streams: Sequence[_Stream | _Rival], number: int, place: int, gone: set[Request]
) -> tuple[int, int, int] | None:
    """The next request of a stream: its deadline, the stream's number and its place there; None at the end."""
    found = streams[number].next_place(place, gone)
    return None if found is None else (streams[number].entries[found][2].deadline_ns, number, found)


def _rivals(behind: Behind, moment: Moment, free_ns: int) -> Iterator[_Rival]:
    """Every other model's most urgent request that can still be in time.

    Who has time after this batch, and more than a newcomer here would have, takes nothing from those who are to come.
    """
    newcomer_ns = moment.now_ns + behind.model.typical_budget_ns
    for rival in moment.rivals:
        head = rival.most_urgent(moment.now_ns)
        run_ns = None if head is None else rival.quickest_ns(head.allowed, head.samples, head.step)
        if head is not None and run_ns is not None:
            due_ns = head.deadline_ns - REPLY_RESERVE_NS
            if due_ns <= newcomer_ns or free_ns + run_ns > due_ns:
                yield _Rival(((head.order_ns, head.number, head),), run_ns)


def _as_fluid(behind: Behind, moment: Moment, free_ns: int, free: Sequence[int], left: Sequence[int]) -> Shortage:
    """By how much what was not tested one by one, and what is to come while the batch runs, would be late."""
    tail_ns = last_deadline_ns = 0
    for stream, count in zip(behind.streams, left, strict=True):
        if count > 0:
            tail_ns += -(-count // stream.full.requests) * stream.full.batch_ns
            last_deadline_ns = max(last_deadline_ns, stream.entries[-1][2].deadline_ns)
    if tail_ns and (late_ns := max(free) + tail_ns // len(free) - last_deadline_ns) > 0:
        return Shortage(late_ns)
    arriving_ns = _arriving_ns(behind.model, moment.now_ns, free_ns, len(free))
    if not arriving_ns:
        return Shortage(0)
    drained_ns = (sum(free) + tail_ns + arriving_ns) // len(free)
    return Shortage(0, max(0, int(drained_ns - moment.now_ns - behind.model.typical_budget_ns)))


def _arriving_ns(model: ModelQueue, now_ns: int, free_ns: int, executors: int) -> int:
    """Executor time of the arrivals to be expected during the batch, as a fluid on the fastest variant."""
    fastest = model.fastest(model.eligible)
    if fastest is None:
        return 0
    batch = model.throughput_batch(fastest)
    each_ns = model.latency.crowded_ns(fastest, batch) / batch
    load = model.forecast.rate(now_ns) * each_ns / 1e9 / executors
    return int(model.forecast.expected(free_ns - now_ns, now_ns, load) * each_ns)
