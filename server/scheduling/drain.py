"""Would everybody who waits, and who is about to come, still be in time if an executor were busy until then?

The test plays the backlog forward, most urgent first, on the fastest allowed variants, in the largest batches that the
time left allows; beyond a bounded number of batches, and for the arrivals forecast, it reckons with a fluid. It is
conservative, not complete: batches of several floor classes, which are allowed, are not tried. A batch is due when its
first request is; where sizes or priorities differ, one behind it in the queue may be due earlier.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heapreplace
from typing import NamedTuple

from server.scheduling.deadline_queue import Entry
from server.scheduling.latency import LatencyModel
from server.scheduling.model_queue import REPLY_RESERVE_NS, Chunk, ModelQueue
from server.scheduling.policy import Moment
from server.scheduling.slo import Request
from server.scheduling.waiting import ClassKey

_STEPS = 24  # batches of backlog tested one by one; the rest is tested as a fluid


@dataclass(frozen=True, slots=True)
class _Stream:
    """One floor class as it drains: its requests in order, those taken included, and how its batches are."""

    key: ClassKey
    latency: LatencyModel
    entries: Sequence[Entry]
    full: Chunk
    average: int
    """Samples of an average request."""

    def next_place(self, place: int, gone: Collection[Request]) -> int | None:
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
        requests = self.latency.largest_crowded(variant, slack_ns, self.key[1]) // self.average
        return requests, self.latency.crowded_ns(variant, max(requests, 1) * self.average, self.key[1])


@dataclass(frozen=True, slots=True)
class _Rival:
    """Another model's most urgent request: a stream of one."""

    entries: Sequence[Entry]
    run_ns: int

    def next_place(self, place: int, _: Collection[Request]) -> int | None:
        """The place of the only request, unless that was passed."""
        return None if place else 0

    def batch(self, slack_ns: int) -> tuple[int, int]:
        """The request and its time, if that is within the slack."""
        return int(self.run_ns <= slack_ns), self.run_ns

    def counts(self, newcomer_ns: int, free_ns: int) -> bool:
        """Whether it takes time from those who are to come, or would be late itself.

        Who has time after this batch, and more than a newcomer to this model would have, does neither.
        """
        due_ns = self.entries[0][2].deadline_ns - REPLY_RESERVE_NS
        return due_ns <= newcomer_ns or free_ns + self.run_ns > due_ns


@dataclass(frozen=True, slots=True)
class Behind:
    """What waits behind a batch at one moment, by floor class, and the requests that the batch takes."""

    model: ModelQueue
    moment: Moment
    streams: Sequence[_Stream]
    rivals: Sequence[_Rival]
    left: Sequence[int]
    """How many requests of each stream are not taken."""
    gone: Collection[Request] = ()

    def without(self, taken: Sequence[Request]) -> Behind:
        """What waits behind a batch of these. Raises ValueError if some are taken already."""
        if self.gone:
            raise ValueError("a batch has been taken already")
        taken_from = Counter((request.allowed, request.step) for request in taken)
        left = [count - taken_from[stream.key] for stream, count in zip(self.streams, self.left, strict=True)]
        return Behind(self.model, self.moment, self.streams, self.rivals, left, set(taken))


def left_behind(model: ModelQueue, moment: Moment, taken: Sequence[Request] = ()) -> Behind:
    """What waits once a batch has been taken.

    Of other models only the most urgent request is looked at, where it can still be in time: what lies behind it is a
    matter of fairness.
    """
    streams = []
    for key, waiting in model.regular.classes.items():
        chunk = model.chunk(*key, waiting)
        if chunk is not None:
            streams.append(_Stream(key, model.latency, waiting.entries, chunk, waiting.average))
    behind = Behind(model, moment, streams, list(_rivals(moment)), [len(stream.entries) for stream in streams])
    return behind.without(taken) if taken else behind


def _rivals(moment: Moment) -> Iterator[_Rival]:
    for rival in moment.rivals:
        head = rival.most_urgent(moment.now_ns)
        run_ns = None if head is None else rival.quickest_ns(head.allowed, head.samples, head.step)
        if head is not None and run_ns is not None:
            yield _Rival(((head.order_ns, head.number, head),), run_ns)


class Shortage(NamedTuple):
    """By how much those who wait, and those who are about to come, would be late; 0 where they are not."""

    waiting_ns: int
    arriving_ns: int = 0


def shortage(behind: Behind, free_ns: int) -> Shortage:
    """By how much the first of those left behind, else the forecast, would be late on their fastest variants.

    `free_ns` is when the executor that decides would be free again.
    """
    play = _Play(behind, free_ns)
    late = next(play.late(), None)
    return _as_fluid(behind, free_ns, play) if late is None else Shortage(late[0])


def lost(behind: Behind, free_ns: int, most: float) -> float:
    """The weight of those left behind who would be late though each batch saves whom it can, the most urgent first.

    Only the next few batches are looked at, and no further than to more than `most`.
    """
    weight = 0.0
    for _, request in _Play(behind, free_ns).late():
        weight += request.weight
        if weight > most:
            break
    return weight


def load(model: ModelQueue, moment: Moment) -> float:
    """The share of all executor time that the arrivals of all models take at least, at the rates of late."""
    return model.utilisation(moment.now_ns, 1 + len(moment.others_free_ns)) + moment.others_load


class _Play:
    """The backlog played forward: when the executors are `free`, and how many requests of each class are `left`."""

    def __init__(self, behind: Behind, free_ns: int) -> None:
        self.free = [free_ns, *behind.moment.others_free_ns]
        heapify(self.free)
        self._gone = behind.gone
        newcomer_ns = int(behind.moment.now_ns + behind.model.typical_budget_ns)
        rivals = [rival for rival in behind.rivals if rival.counts(newcomer_ns, free_ns)]
        self._streams: list[_Stream | _Rival] = [*behind.streams, *rivals]
        self.left = [*behind.left, *(1 for _ in rivals)]

    def late(self) -> Iterator[tuple[int, Request]]:
        """Play on to whoever would be late next, and leave them out: by how much, and who."""
        heads = [head for number in range(len(self.left)) if (head := self._head(number, 0)) is not None]
        heapify(heads)
        for _ in range(_STEPS):
            if not heads:
                break
            deadline_ns, number, place = heads[0]
            slack_ns = deadline_ns - REPLY_RESERVE_NS - self.free[0]
            requests, batch_ns = self._streams[number].batch(slack_ns)
            if requests:
                heapreplace(self.free, self.free[0] + batch_ns)
            else:
                yield batch_ns - slack_ns, self._streams[number].entries[place][2]
            self.left[number] -= max(requests, 1)
            head = self._head(number, place + max(requests, 1))
            if head is None:
                heappop(heads)
            else:
                heapreplace(heads, head)

    def _head(self, number: int, place: int) -> tuple[int, int, int] | None:
        """The next request of a stream: its deadline, the stream's number and its place there; None at the end."""
        stream = self._streams[number]
        found = stream.next_place(place, self._gone)
        return None if found is None else (stream.entries[found][2].deadline_ns, number, found)


def _as_fluid(behind: Behind, free_ns: int, play: _Play) -> Shortage:
    """By how much what was not tested one by one, and what is to come while the batch runs, would be late."""
    model, now_ns, free = behind.model, behind.moment.now_ns, play.free
    tail_ns = last_deadline_ns = 0
    for stream, count in zip(behind.streams, play.left[: len(behind.streams)], strict=True):
        if count > 0:
            tail_ns += -(-count // stream.full.requests) * stream.full.batch_ns
            last_deadline_ns = max(last_deadline_ns, stream.entries[-1][2].deadline_ns)
    if tail_ns and (late_ns := max(free) + tail_ns // len(free) - last_deadline_ns) > 0:
        return Shortage(late_ns)
    coming = model.forecast.expected(free_ns - now_ns, now_ns, load(model, behind.moment))
    if not coming:
        return Shortage(0)
    drained_ns = (sum(free) + tail_ns + int(coming * model.least_cost_ns())) // len(free)
    return Shortage(0, max(0, int(drained_ns - now_ns - model.typical_budget_ns)))
