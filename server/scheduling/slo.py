"""What a request asks of the server, what the scheduler keeps of it, and the ways a request can end.

Rules of this file: frozen values and plain arithmetic; instants and durations are integer nanoseconds of one
monotonic clock that the caller owns.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from enum import StrEnum
from itertools import takewhile
from typing import NamedTuple


class Outcome(StrEnum):
    """The one end of every request."""

    OK = "ok"
    LATE = "late"
    DEGRADED = "degraded"
    REJECTED = "rejected"
    INFEASIBLE = "infeasible"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    INVALID = "invalid"
    FAILED = "failed"


class OnInfeasible(StrEnum):
    """What to do when no allowed variant can meet the latency."""

    DEGRADE = "degrade"
    LATE = "late"
    REJECT = "reject"


class ModelKey(NamedTuple):
    """A loaded model. `load` tells a version that was loaded again from the one it replaces, which may still answer."""

    name: str
    version: str
    load: int = 0


@dataclass(frozen=True, slots=True)
class Slo:
    """What a request asks, as it asked it: None where it said nothing.

    Accuracies are in [0, 1]; `hard` says whether the accuracy floor may never be broken, and where nothing is said a
    floor that the request names is hard and the model's own is soft; a `variant` pins one variant and makes the
    accuracy fields void. `priority` 1 is the highest, 0 the default.
    """

    latency_ns: int | None = None
    min_accuracy: float | None = None
    max_accuracy_drop: float | None = None
    hard: bool | None = None
    on_infeasible: tuple[OnInfeasible, ...] | None = None
    variant: str | None = None
    priority: int = 0


@dataclass(slots=True, eq=False)
class Request:
    """One schedulable piece of work; a client's request above the maximum batch size becomes several.

    Sets of variants are bit sets over the model's ranking (bit 0 is the most accurate). A request's floor class is
    `allowed`, fixed before it is queued; only a soft floor that asked for `degrade` has a wider `fallback`.
    `number` is the arrival order and breaks every tie. `order_ns` is the place in the queue: the deadline, moved by
    the priority, less the fastest run at rest of the class that was asked for or, where that cannot run it, of its
    fallback. `payload` belongs to the caller and is never looked at.
    """

    number: int
    model: ModelKey
    allowed: int
    asked: int
    fallback: int
    samples: int
    size_bytes: int
    arrival_ns: int
    deadline_ns: int
    order_ns: int
    weight: float
    shape: Hashable
    on_infeasible: tuple[OnInfeasible, ...]
    pinned: bool
    payload: object = None
    step: int = 0
    """The step of its input's length, where that varies; see `latency`."""
    late: bool = False
    missed: bool = False
    """The forecast was told that it could not be in time."""
    solo: bool = False
    retried: bool = False
    """It was in a batch that failed, or whose executor died or seems stuck: it is tried once more, alone."""
    abandoned: bool = False
    """The client went away while it ran: it is not tried again."""
    queue: object | None = None
    """The queue it waits in; None while it runs and after its end."""

    @property
    def queue_key(self) -> tuple[int, Hashable]:
        """Requests with equal keys may share a batch on any of their variants."""
        return self.allowed, self if self.solo else self.shape

    @property
    def may_be_late(self) -> bool:
        """Whether it asked for `late`: what comes after `reject` is not asked for."""
        return OnInfeasible.LATE in takewhile(lambda action: action is not OnInfeasible.REJECT, self.on_infeasible)
