"""INFaaS (ATC'21): every request has its variant chosen by itself, from what it asks and from how loaded variants are.

In its code, of the variants that satisfy the request's accuracy floor and whose latency meets its SLO, those that are
running and not overloaded are looked at, and the one with the least ``SLO - latency`` is taken: the slowest that still
fits, as that is the cheapest. A variant is overloaded when its load exceeds 0.95 of its peak throughput. If all are,
Proteus (ASPLOS'24), which re-implements INFaaS as a baseline, takes the least loaded one.

Adapted: every variant is resident and may use every executor, so each is asked whether it could carry the whole load
(of the last second) by itself, and the least loaded is the one of the highest throughput. Without overload the slowest
that fits is mostly also the most accurate; two that are equally slow go by accuracy. Batches have a fixed size per
variant, what fits half of the SLO, and a batch may be predicted to miss; whoever waits may join the head's batch if it
allows the variant. As the paper says nothing of queues, the choice is not changed by what waits.
"""

from __future__ import annotations

from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.batches import Line, Pick, Rule, fastest_for, largest, throughput_batch
from server.scheduling.policies.load import WindowedLoad
from server.scheduling.policy import Moment
from server.scheduling.slo import Request

_WINDOW_NS = 1_000_000_000
_OVERLOADED = 0.95


class Infaas(Rule):
    """The slowest variant that meets the request's SLO and can carry the load."""

    def __init__(self) -> None:
        self._load = WindowedLoad(_WINDOW_NS)

    def arrived(self, request: Request, now_ns: int) -> None:
        """Measure the load."""
        self._load.arrived(request.samples, now_ns)

    def pick(self, head: Request, line: Line, moment: Moment) -> Pick | None:
        """A batch of the variant's own size."""
        variant = self._choose(line.model, head, len(moment.others_free_ns) + 1)
        if variant is None:
            return None
        if not largest(line.model, variant, head, moment.now_ns):
            return Pick(variant, 0, (variant, 0))
        keeps = throughput_batch(line.model, variant)
        return Pick(variant, max(head.samples, keeps[1]), keeps)

    def _choose(self, model: ModelQueue, head: Request, executors: int) -> int | None:
        budget_ns = head.deadline_ns - head.arrival_ns - REPLY_RESERVE_NS
        latencies_ns = {
            variant: latency_ns
            for variant in model.fitting(head.allowed, head.samples)
            if (latency_ns := model.latency.crowded_ns(variant, head.samples, head.step)) <= budget_ns
            and self._load.rate <= _OVERLOADED * executors * peak(model, variant)
        }
        if not latencies_ns:
            return fastest_for(model, head)
        return max(latencies_ns, key=lambda variant: (latencies_ns[variant], -variant))


def peak(model: ModelQueue, variant: int) -> float:
    """Samples per second that one executor serves with a variant's batches."""
    _, size = throughput_batch(model, variant)
    return size * 1e9 / model.latency.crowded_ns(variant, size)
