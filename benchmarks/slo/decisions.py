"""What the scheduler itself costs on this host: `python -m benchmarks.slo.decisions`.

So many requests wait, of so many shapes, floor classes and sizes, all with time enough that none becomes hopeless. Then
they keep coming: `arrive` is one arrival, `decide` what an idle executor's thread does (tick, decide, ask when to come
back), and the cost per request is everything over the requests that were answered. At last, all that wait become
hopeless at once: `expire` is what a tick then takes for each. Times, so only worth something beside each other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from random import Random
from time import perf_counter_ns
from typing import TypeVar

from benchmarks.slo.family import MAX_BATCH, MS, family
from server.scheduling.admission import Defaults, make_request
from server.scheduling.model_queue import ModelQueue
from server.scheduling.scheduler import Run, Scheduler
from server.scheduling.slo import ModelKey, Request, Slo

_BUDGET_NS = 2_000_000 * MS
_STEP_NS = MS // 10
_CLASSES = (Slo(), *(Slo(min_accuracy=floor) for floor in (0.88, 0.90, 0.91, 0.9125)), Slo(variant="int8-static"))

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Load:
    """What waits."""

    queued: int
    shapes: int
    classes: int
    sizes: int = 1
    """Samples of the largest request."""


class Bench:
    """A scheduler with a full queue, and how long its answers took."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._scheduler = Scheduler(2, max_requests=2 * load.queued + 1000, max_bytes=1 << 50)
        self._model = ModelQueue(ModelKey("model", "1"), family())
        self._scheduler.add_model(self._model)
        self._random = Random(1)  # noqa: S311 - repeatable on purpose
        self._numbers = count()
        self._now_ns = 0
        self.arrive_ns: list[int] = []
        self.decide_ns: list[int] = []
        self.finish_ns: list[int] = []
        self.answered = 0
        for _ in range(load.queued):
            self._scheduler.arrived(self._request(), self._now_ns)

    def run(self, decisions: int) -> None:
        """So many batches, each followed by as many arrivals as it held."""
        scheduler = self._scheduler
        for _ in range(decisions):
            self._now_ns += _STEP_NS
            run = _timed(self.decide_ns, self._decide)
            if run is None:
                raise RuntimeError("the scheduler did not run anything though requests wait")
            _timed(self.finish_ns, partial(scheduler.finished, run, self._now_ns, run.predicted_ns))
            self.answered += len(run.requests)
            for _ in run.requests:
                _timed(self.arrive_ns, partial(scheduler.arrived, self._request(), self._now_ns))

    def expire_ns(self) -> int:
        """The time to take out each of those that wait, all hopeless by now."""
        ended: list[int] = []
        hopeless = _timed(ended, partial(self._scheduler.tick, 2 * _BUDGET_NS))
        return ended[0] // len(hopeless)

    def _decide(self) -> Run | None:
        self._scheduler.tick(self._now_ns)
        run, _ = self._scheduler.decide(0, self._now_ns)
        self._scheduler.next_event_ns(self._now_ns)
        return run

    def _request(self) -> Request:
        number = next(self._numbers)
        return make_request(
            self._model,
            replace(_CLASSES[number % self._load.classes], latency_ns=int(_BUDGET_NS * (0.5 + self._random.random()))),
            Defaults(_BUDGET_NS),
            number=number,
            samples=1 + number % self._load.sizes,
            size_bytes=0,
            shape=(number % self._load.shapes,),
            arrival_ns=self._now_ns,
            rpc_deadline_ns=None,
        )


def _timed(into: list[int], act: Callable[[], _T]) -> _T:
    start_ns = perf_counter_ns()
    answer = act()
    into.append(perf_counter_ns() - start_ns)
    return answer


def loads(most: int) -> Iterator[Load]:
    """Up to a queue length, every combination of shapes and classes, and all classes in requests of many sizes."""
    for queued in (10, 100, 1000, 10_000):
        if queued <= most:
            for shapes in (1, 8, 1 << 30):
                yield from (Load(queued, shapes, classes) for classes in (1, len(_CLASSES)))
            yield Load(queued, 1, len(_CLASSES), MAX_BATCH)


def main(words: Sequence[str]) -> int:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo.decisions", description=__doc__)
    parser.add_argument("--decisions", type=int, default=600, help="batches per row")
    parser.add_argument("--queued", type=int, default=10_000, help="the longest queue")
    chosen = parser.parse_args(words)
    if min(chosen.decisions, chosen.queued) < 1:
        parser.error("--decisions and --queued must be at least 1")
    print(
        "| queued | shapes | classes | samples | arrive p50, p99 µs | decide p50, p99 µs | per request µs | expire µs |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for load in loads(chosen.queued):
        bench = Bench(load)
        bench.run(chosen.decisions)
        spent_ns = sum(bench.arrive_ns) + sum(bench.decide_ns) + sum(bench.finish_ns)
        shapes = "all differ" if load.shapes > load.queued else str(load.shapes)
        print(
            f"| {load.queued} | {shapes} | {load.classes} | 1{f' to {load.sizes}' if load.sizes > 1 else ''} "
            f"| {_percentiles(bench.arrive_ns)} | {_percentiles(bench.decide_ns)} "
            f"| {spent_ns / bench.answered / 1e3:.0f} | {bench.expire_ns() / 1e3:.0f} |",
            flush=True,
        )
    return 0


def _percentiles(taken_ns: Sequence[int]) -> str:
    ordered = sorted(taken_ns)
    return ", ".join(f"{ordered[int(share * (len(ordered) - 1))] / 1e3:.0f}" for share in (0.5, 0.99))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
