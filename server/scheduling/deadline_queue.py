"""The waiting requests of a model, kept in the two orders that matter.

- A `DeadlineQueue` holds one floor class and one shape in the order in which they should run, for batches.
- A `DeadlineHeap` holds one floor class and one size in the order of their deadlines, whatever their shapes, because
  class, size and deadline alone decide when a request becomes hopeless. It is cleaned lazily: the number of a request
  that left is skipped when it surfaces, and nothing else of it is kept.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from heapq import heapify, heappop, heappush

from server.scheduling.slo import Request

Entry = tuple[int, int, Request]


class DeadlineQueue:
    """Requests that may share a batch, sorted by (order, number). `samples` is their sum."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.samples = 0

    def __len__(self) -> int:
        return len(self.entries)

    def add(self, request: Request) -> None:
        """Queue a request."""
        request.queue = self
        insort(self.entries, (request.order_ns, request.number, request))
        self.samples += request.samples

    def discard(self, request: Request) -> None:
        """Take a request out, wherever it stands. Raises KeyError if it is not here."""
        place = bisect_left(self.entries, (request.order_ns, request.number))
        if place == len(self.entries) or self.entries[place][2] is not request:
            raise KeyError(f"request {request.number} is not queued. This is a bug.")
        del self.entries[place]
        self.samples -= request.samples
        request.queue = None

    def first(self) -> Request:
        """The request that should run first. Raises IndexError when empty."""
        return self.entries[0][2]

    def ahead_of(self, order_ns: int) -> int:
        """How many requests wait ahead of a newcomer with this order; a tie goes to whoever came first."""
        return bisect_left(self.entries, (order_ns + 1,))


class DeadlineHeap:
    """Requests by (deadline, number). At most twice as many entries are kept as requests wait, and a few."""

    def __init__(self) -> None:
        self._entries: list[tuple[int, int]] = []
        self._waiting: dict[int, Request] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Take note of a request."""
        self._waiting[request.number] = request
        heappush(self._entries, (request.deadline_ns, request.number))

    def discard(self, request: Request) -> None:
        """Forget a request. Raises KeyError if it is not here."""
        del self._waiting[request.number]
        if len(self._entries) > 2 * len(self._waiting) + 64:
            self._entries = [entry for entry in self._entries if entry[1] in self._waiting]
            heapify(self._entries)

    def soonest(self) -> Request:
        """The request with the least deadline. Raises IndexError when empty."""
        while self._entries[0][1] not in self._waiting:
            heappop(self._entries)
        return self._waiting[self._entries[0][1]]
