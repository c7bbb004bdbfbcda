"""What the server looks like at this moment: the snapshots the status page draws, and the memory of recent traffic.

Rules of this file: snapshots are frozen; the memory is a listener that only appends to bounded queues, so it costs an
answer next to nothing and never grows; percentiles are exact over the remembered answers and computed when asked.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from server.events import BatchRan, Event, RequestEnded
from server.metrics import ANSWERED, ModelLoad
from variants.variant import Variant


@dataclass(frozen=True, slots=True)
class ModelStatus:
    """One loaded model with every variant it has on this host."""

    name: str
    version: str
    variants: tuple[Variant, ...]
    load: ModelLoad


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """The whole server. `reason` says why it is not ready; `failed` maps a model that did not load to the reason."""

    live: bool
    ready: bool
    reason: str
    executors: int
    busy_executors: int
    hardware: str
    models: tuple[ModelStatus, ...] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


class StatusSource(Protocol):
    """Asked for every page and probe, from the HTTP server's threads; it must not wait for work to finish."""

    def __call__(self) -> ServerStatus:
        """The server as it is now."""
        ...


@dataclass(frozen=True, slots=True)
class Traffic:
    """A variant's part in a model's remembered answers: how many, which share of them, and their total latency."""

    answers: int
    share: float
    p50_ns: int
    p95_ns: int


@dataclass(frozen=True, slots=True)
class Decision:
    """A batch that ran, and when by the memory's clock."""

    batch: BatchRan
    at_ns: int


class Recent:
    """Remembers each model's latest answers and the server's latest batches; a listener."""

    def __init__(self, clock_ns: Callable[[], int], answers: int = 1000, decisions: int = 20) -> None:
        """Keep so many answers per model and so many decisions in all; `clock_ns` is monotonic."""
        self._clock_ns = clock_ns
        self._answers: dict[tuple[str, str], deque[tuple[str, int]]] = defaultdict(lambda: deque(maxlen=answers))
        self._decisions: deque[Decision] = deque(maxlen=decisions)

    def __call__(self, event: Event) -> None:
        """Take note of an answer or a batch. Only answers are kept by model, so clients cannot invent keys."""
        if isinstance(event, RequestEnded) and event.outcome in ANSWERED:
            self._answers[event.model, event.version].append((event.variant, event.total_ns))
        elif isinstance(event, BatchRan):
            self._decisions.append(Decision(event, self._clock_ns()))

    def traffic(self, model: str, version: str) -> dict[str, Traffic]:
        """Each variant's part in the remembered answers; empty before the first."""
        answers = list(self._answers.get((model, version), ()))  # one step: a deque must not grow while it is iterated
        latencies: dict[str, list[int]] = defaultdict(list)
        for variant, total_ns in answers:
            latencies[variant].append(total_ns)
        return {
            variant: Traffic(len(totals), len(totals) / len(answers), _percentile(totals, 50), _percentile(totals, 95))
            for variant, totals in latencies.items()
        }

    def decisions(self) -> list[tuple[BatchRan, int]]:
        """The latest batches, newest first, each with its age in nanoseconds."""
        now_ns = self._clock_ns()
        return [(decision.batch, now_ns - decision.at_ns) for decision in reversed(list(self._decisions))]


def _percentile(values: list[int], percent: int) -> int:
    """The smallest value that at least `percent` % of the values do not exceed."""
    ordered = sorted(values)
    return ordered[-(-len(ordered) * percent // 100) - 1]
