"""The frozen records of what happened; metrics, the status page and the tests' recorder listen to them.

Rules: a record holds plain values, is made once per event and never changes. Durations are integer nanoseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from server.scheduling.slo import Outcome, Slo


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request met its one outcome. `variant` is "none" where none was chosen.

    `slo_met` is None for a request that could not be judged (invalid, cancelled, infeasible). `accuracy` is the served
    variant's measured score, None where none is known. `reason` is the routing decision's short code. `slo` is what the
    request asked and `budget_ns` the time from its arrival to its deadline, None where that was never read;
    `arrival_ns` is an instant of the monotonic clock. `request_id` is the client's own, empty if it gave none.
    """

    model: str
    version: str
    variant: str
    outcome: Outcome
    reason: str
    samples: int
    slo: Slo | None
    budget_ns: int | None
    slo_met: bool | None
    arrival_ns: int
    total_ns: int
    queue_ns: int
    compute_ns: int
    accuracy: float | None
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class BatchRan:
    """A batch left an executor, successfully or not."""

    model: str
    version: str
    variant: str
    executor: int
    requests: int
    samples: int
    reason: str
    compute_ns: int
    predicted_ns: int
    failed: bool


@dataclass(frozen=True, slots=True)
class Decided:
    """The scheduler took one decision."""

    model: str
    duration_ns: int


Event = RequestEnded | BatchRan | Decided


class Listener(Protocol):
    """Receives every record from the engine's threads, from several at a time; it must be quick and never raise."""

    def __call__(self, event: Event) -> None:
        """Take note of one event."""
        ...
