"""What is so at this moment, asked at every scrape: each model's load and each executor's health.

Rules of this file: a source is asked once per scrape and once only, so that figures of one scrape belong together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector


@dataclass(frozen=True, slots=True)
class ModelLoad:
    """One model's load at this moment. `saturation_ratio` is 0 when idle and 1 when no slack is left."""

    queue_depth: int
    queue_bytes: int
    inflight_requests: int
    saturation_ratio: float


@dataclass(frozen=True, slots=True)
class ExecutorHealth:
    """One executor at this moment: its latest latencies over its profiled ones, and whether it is taken for stuck."""

    slowdown_ratio: float
    lost: bool


class GaugeSource(Protocol):
    """Asked at every scrape, from the scraper's thread."""

    def __call__(self) -> Mapping[str, ModelLoad]:
        """The load of every loaded model, by name."""
        ...


class ExecutorSource(Protocol):
    """Asked at every scrape, from the scraper's thread."""

    def __call__(self) -> Sequence[ExecutorHealth]:
        """Every executor, by its number."""
        ...


Shown = Sequence[tuple[str, str, str]]
"""Gauges as (name without prefix, attribute of what the source gives, help)."""

LOADS: Shown = (
    ("queue_depth", "queue_depth", "Requests that wait for a batch."),
    ("queue_bytes", "queue_bytes", "Bytes of the requests that wait for a batch."),
    ("inflight_requests", "inflight_requests", "Requests admitted and not yet ended."),
    ("saturation_ratio", "saturation_ratio", "Load against capacity: 0 is idle, 1 has no slack left."),
)
EXECUTORS: Shown = (
    ("executor_slowdown_ratio", "slowdown_ratio", "Latency now over latency as profiled; 1 is as profiled."),
    ("executor_lost", "lost", "1 for an executor that seems stuck and does not count as capacity."),
)


class Gauges(Collector):
    """Turns a source's snapshot, by the value of one label, into gauges."""

    def __init__(self, label: str, gauges: Shown, source: Callable[[], Mapping[str, object]]) -> None:
        self._label = label
        self._gauges = gauges
        self._source = source

    def describe(self) -> Iterator[Metric]:
        """The families without samples, so that registering asks nothing of the source."""
        for name, _, text in self._gauges:
            yield GaugeMetricFamily(f"gearshift_{name}", text, labels=[self._label])

    def collect(self) -> Iterator[Metric]:
        """One sample per label value and gauge, all from one snapshot."""
        found = self._source()
        for family, (_, attribute, _) in zip(self.describe(), self._gauges, strict=True):
            for key, each in found.items():
                family.add_metric([key], float(getattr(each, attribute)))  # type: ignore[attr-defined]
            yield family
