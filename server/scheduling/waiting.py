"""The waiting requests of a model in every order that a decision needs, each found without looking at all of them.

Rules: what is empty is forgotten, so hostile shapes leave nothing behind; work per decision grows with the floor
classes and the steps of length, of which there are few, and not with requests or their shapes, which clients choose.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.slo import Request

QueueKey = tuple[int, Hashable]
ClassKey = tuple[int, int]
"""Floor class and step of length: requests that take as long on the same variants."""


class FloorClass(DeadlineQueue):
    """The requests of one class and step of length, whatever their shapes; `shapes` counts these.

    A shape has one step: its length follows from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes = 0

    @property
    def average(self) -> int:
        """Samples of an average request, at least 1."""
        return max(1, self.samples // max(1, len(self)))


class Waiting:
    """Requests by what they may share a batch with, and by class.

    `queues` holds those of one class and shape; `by_shape` the same queues by shape, then class; `classes` all of a
    class together.
    """

    def __init__(self) -> None:
        self.queues: dict[QueueKey, DeadlineQueue] = {}
        self.by_shape: dict[Hashable, dict[int, DeadlineQueue]] = {}
        self.classes: dict[ClassKey, FloorClass] = {}
        self.requests = 0
        self.samples = 0
        self.size_bytes = 0

    def __len__(self) -> int:
        return self.requests

    def __iter__(self) -> Iterator[Request]:
        """Everybody, class by class."""
        return (request for floor_class in self.classes.values() for _, _, request in floor_class.entries)

    def add(self, request: Request) -> None:
        """Queue a request."""
        allowed, shape = request.queue_key
        floor_class = self.classes.setdefault((allowed, request.step), FloorClass())
        queue = self.queues.get((allowed, shape))
        if queue is None:
            queue = self.queues[allowed, shape] = DeadlineQueue()
            self.by_shape.setdefault(shape, {})[allowed] = queue
            floor_class.shapes += 1
        queue.add(request)
        floor_class.add(request)
        request.queue = queue
        self.requests += 1
        self.samples += request.samples
        self.size_bytes += request.size_bytes

    def remove(self, request: Request) -> None:
        """Take a request out. Raises KeyError if it does not wait here."""
        allowed, shape = request.queue_key
        queue, floor_class = self.queues[allowed, shape], self.classes[allowed, request.step]
        queue.discard(request)
        floor_class.discard(request)
        if not queue:
            del self.queues[allowed, shape]
            del self.by_shape[shape][allowed]
            if not self.by_shape[shape]:
                del self.by_shape[shape]
            floor_class.shapes -= 1
        if not floor_class:
            del self.classes[allowed, request.step]
        request.queue = None
        self.requests -= 1
        self.samples -= request.samples
        self.size_bytes -= request.size_bytes

    def first(self) -> Request:
        """The request that is first in order. Raises ValueError when nobody waits."""
        return min(floor_class.entries[0] for floor_class in self.classes.values())[2]
