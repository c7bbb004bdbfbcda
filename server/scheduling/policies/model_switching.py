"""Model-Switching (HotCloud'20): the whole service runs on one variant, chosen anew in every window.

Offline, each model's tail latency is profiled against the load; online, the load of the last window selects the most
accurate model whose tail latency at that load meets the deadline.

Adapted: instead of profiling every variant at every load, the tail at a load comes from the latency as profiled. With
batches of b an executor set carries ``capacity = executors * b / L(b)``; a request waits at most for a batch under way
and then for its own, 2 L(b), and for the backlog in front, whose 99th percentile under Poisson arrivals is
``ln(100) / 2 * load / (capacity - load)`` requests (the diffusion approximation of heavy traffic). The batch size is
the one with the least tail. A request that does not allow the service's variant runs on the one which would be chosen
among those that it allows. Batches are as in `fixed`.
"""

from __future__ import annotations

from math import log

from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.batches import Line, Pick, Rule, fastest_for, largest, throughput_batch
from server.scheduling.policies.load import WindowedLoad
from server.scheduling.policy import Moment
from server.scheduling.slo import Request

_TAIL = log(100) / 2


class ModelSwitching(Rule):
    """One variant at a time, for windows of this length."""

    def __init__(self, window_ns: int) -> None:
        self._load = WindowedLoad(window_ns)
        self._chosen: dict[tuple[int, int, int], int | None] = {}

    def arrived(self, request: Request, now_ns: int) -> None:
        """Measure the load; a window's end, or a new load before the first one's, opens the choice again."""
        before = self._load.rate
        if self._load.arrived(request.samples, now_ns) or self._load.rate != before:
            self._chosen.clear()

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """The largest batch of the service's variant that fits the head's slack."""
        executors = len(moment.others_free_ns) + 1
        key = head.allowed, head.samples, executors
        if key not in self._chosen:
            self._chosen[key] = self._choose(line.model, head, executors)
        variant = self._chosen[key]
        if variant is None:
            return None
        size = largest(line.model, variant, head, moment.now_ns)
        return Pick(variant, size, throughput_batch(line.model, variant))

    def _choose(self, model: ModelQueue, head: Request, executors: int) -> int | None:
        objective_ns = model.typical_budget_ns - REPLY_RESERVE_NS
        for variant in model.fitting(head.allowed, head.samples):
            if tail_ns(model, variant, self._load.rate, executors) <= objective_ns:
                return variant
        return fastest_for(model, head)


def tail_ns(model: ModelQueue, variant: int, rate: float, executors: int) -> float:
    """The 99th percentile of latency, waiting included, at `rate` samples per second; infinite where that overloads."""
    most = model.latency.max_batch_size(variant) if model.variants[variant].batchable else 1
    least_ns = float("inf")
    for size in range(1, most + 1):
        batch_ns = model.latency.profiled_ns(variant, size, busy=executors - 1)
        capacity = executors * size * 1e9 / batch_ns
        if capacity > rate:
            backlog = _TAIL * rate / (capacity - rate)
            least_ns = min(least_ns, 2 * batch_ns + backlog / capacity * 1e9)
    return least_ns
