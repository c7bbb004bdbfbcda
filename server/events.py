"""The frozen records of what happened; metrics, the status page and the tests' recorder listen to them.

Rules: a record holds plain values, is made once per event and never changes. Durations are integer nanoseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from server.scheduling.slo import Outcome, Slo


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request met its one outcome. `variant` is "none" where none was chosen.

    `slo_met` is None for a request that could not be judged (invalid, cancelled, infeasible). `accuracy` is the served
    variant's measured score, None where none is known. `reason` is the routing decision's short code. `slo` is what the
    request asked and `budget_ns` the time from its arrival to its deadline, None where that was never read;
    `timeout_ns` is the part of it that the gRPC deadline or the `timeout` parameter set, None where neither did.
    `arrival_ns` is an instant of the monotonic clock. `request_id` is the client's own, empty if it gave none;
    `asked_version` the version it named, empty for the newest; `shape` is that of each input without the batch.
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
    timeout_ns: int | None = None
    asked_version: str = ""
    shape: Hashable = None


class PassedOver(NamedTuple):
    """A more accurate variant than the one that ran: why it was passed over (a short code), and what was missing.

    `short` is nanoseconds for "slack", "reserve" and "drain", samples for "batch".
    """

    variant: str
    reason: str
    short: int


@dataclass(frozen=True, slots=True)
class BatchRan:
    """A batch left an executor, successfully or not; `passed_over` begins with the most accurate variant."""

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
    passed_over: tuple[PassedOver, ...] = ()


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
