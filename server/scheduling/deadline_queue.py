"""The waiting requests of a model, kept in the two orders that matter.

- A `DeadlineQueue` holds one floor class and one shape in the order of latest starts, in which they should run.
- A `DeadlineList` holds one floor class, size and step of length in the order of their deadlines, whatever their
  shapes, because these alone decide when a request becomes hopeless.

Both are sorted lists: for the ten thousand requests that may wait, moving pointers in one block beats any tree or heap.
"""

from __future__ import annotations

from bisect import bisect_left, insort

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
        insort(self.entries, (request.order_ns, request.number, request))
        self.samples += request.samples

    def discard(self, request: Request) -> None:
        """Take a request out, wherever it stands. Raises KeyError if it is not here."""
        _take_out(self.entries, (request.order_ns, request.number), request)
        self.samples -= request.samples

    def first(self) -> Request:
        """The request that should run first. Raises IndexError when empty."""
        return self.entries[0][2]

    def ahead_of(self, order_ns: int) -> int:
        """How many requests wait ahead of a newcomer with this order; a tie goes to whoever came first."""
        return bisect_left(self.entries, (order_ns + 1,))


class DeadlineList:
    """Requests sorted by (deadline, number)."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        """Take note of a request."""
        insort(self._entries, (request.deadline_ns, request.number, request))

    def discard(self, request: Request) -> None:
        """Forget a request. Raises KeyError if it is not here."""
        _take_out(self._entries, (request.deadline_ns, request.number), request)

    def soonest(self, not_before_ns: int | None = None) -> Request | None:
        """The request with the least deadline, or with the least that is not before an instant, if any."""
        place = 0 if not_before_ns is None else bisect_left(self._entries, (not_before_ns,))
        return self._entries[place][2] if place < len(self._entries) else None

    def before(self, instant_ns: int | None) -> list[Request]:
        """The requests whose deadlines are before an instant; all of them without one."""
        place = len(self._entries) if instant_ns is None else bisect_left(self._entries, (instant_ns,))
        return [request for _, _, request in self._entries[:place]]


def _take_out(entries: list[Entry], key: tuple[int, int], request: Request) -> None:
    place = bisect_left(entries, key)
    if place == len(entries) or entries[place][2] is not request:
        raise KeyError(f"request {request.number} is not queued. This is a bug.")
    del entries[place]
