"""Triton's per-model statistics, kept from the event records for `ModelStatistics`.

Rules: a listener; one lock, held for a few additions. Durations are integer nanoseconds, as the rpc wants them.
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from server.events import BatchRan, Event, RequestEnded
from server.scheduling.slo import Outcome

_ANSWERED = frozenset({Outcome.OK, Outcome.LATE, Outcome.DEGRADED})


@dataclass(slots=True)
class Tally:
    """How often something happened and how long it took in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int) -> None:
        """Count one occurrence."""
        self.count += 1
        self.ns += ns


@dataclass(slots=True)
class ModelTallies:
    """One model's statistics. `inferences` counts samples, `executions` batches, `batches` maps batch size to time."""

    success: Tally = field(default_factory=Tally)
    fail: Tally = field(default_factory=Tally)
    queue: Tally = field(default_factory=Tally)
    compute: Tally = field(default_factory=Tally)
    inferences: int = 0
    executions: int = 0
    last_inference_ms: int = 0
    batches: dict[int, Tally] = field(default_factory=lambda: defaultdict(Tally))


class Statistics:
    """Listens to event records; only models that were added are kept."""

    def __init__(self, wall_clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._models: dict[tuple[str, str], ModelTallies] = {}
        self._wall_clock_ns = wall_clock_ns
        self._lock = threading.Lock()

    def add_model(self, name: str, version: str) -> None:
        """Start counting for a model that was loaded, from nothing."""
        with self._lock:
            self._models[name, version] = ModelTallies()

    def of(self, name: str, version: str) -> ModelTallies:
        """A model's tallies so far; all zero for one that was never added."""
        return self._models.get((name, version), ModelTallies())

    def __call__(self, event: Event) -> None:
        """Count one event."""
        match event:
            case RequestEnded():
                self._request_ended(event)
            case BatchRan():
                self._batch_ran(event)

    def _request_ended(self, event: RequestEnded) -> None:
        with self._lock:
            tallies = self._models.get((event.model, event.version))
            if tallies is None:
                return
            if event.outcome not in _ANSWERED:
                tallies.fail.add(event.total_ns)
                return
            tallies.success.add(event.total_ns)
            tallies.queue.add(event.queue_ns)
            tallies.compute.add(event.compute_ns)
            tallies.inferences += event.samples
            tallies.last_inference_ms = self._wall_clock_ns() // 1_000_000

    def _batch_ran(self, event: BatchRan) -> None:
        with self._lock:
            tallies = self._models.get((event.model, event.version))
            if tallies is None or event.failed:
                return
            tallies.executions += 1
            tallies.batches[event.samples].add(event.compute_ns)
