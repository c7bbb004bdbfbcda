"""What the scheduler knows of one model: its ranked variants, what each costs here, and who is waiting.

The *ranking* orders variants by what is proven: least proven drop against the reference first, so the reference
leads unless another variant is proven better. Sets of variants are bit sets over the ranking; bit 0 is the best.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence

from server.scheduling.deadline_queue import DeadlineHeap, DeadlineQueue
from server.scheduling.forecast import ArrivalForecast
from server.scheduling.latency import LatencyModel
from server.scheduling.slo import ModelKey, Request
from variants.variant import REFERENCE, State, Variant

REPLY_RESERVE_NS = 300_000
"""Held back from every deadline for encoding and sending the answer."""

_BUDGET_GAIN = 0.05
_BUDGET_HALF_LIFE_NS = 500_000_000  # so that a burst's deadlines are forgotten within a second or two of its end

QueueKey = tuple[int, Hashable]


def rank(variants: Iterable[Variant]) -> list[Variant]:
    """Variants that were measured here, most accurate (by proof) first."""
    measured = [variant for variant in variants if variant.profile is not None]
    return sorted(measured, key=lambda v: (v.proven_drop, -v.proven_accuracy, v.name != REFERENCE, v.name))


def bits(variants: int) -> Iterator[int]:
    """The places in the ranking that a bit set holds, best first."""
    place = 0
    while variants:
        if variants & 1:
            yield place
        variants >>= 1
        place += 1


class ModelQueue:
    """One model's waiting requests and the knowledge to choose among its variants.

    `unmeasured` are the variants that cannot run here, with the reason; `usable` those that may run at all, `eligible`
    those that take traffic which does not pin. `served_ns` is the executor time this model has had, the measure of
    fairness between models. A `retired` model only finishes what it has.
    """

    def __init__(self, key: ModelKey, variants: Sequence[Variant], max_queue_delay_ns: int = 0) -> None:
        self.key = key
        self.variants = tuple(rank(variants))
        self.unmeasured = {variant.name: variant.reason for variant in variants if variant.profile is None}
        self.latency = LatencyModel([variant.profile for variant in self.variants if variant.profile])
        self.forecast = ArrivalForecast()
        self.max_queue_delay_ns = max_queue_delay_ns
        self.queues: dict[QueueKey, DeadlineQueue] = {}
        self.late: dict[QueueKey, DeadlineQueue] = {}
        self.retired = False
        self.waiting = 0
        self.waiting_bytes = 0
        self.late_waiting = 0
        self.late_bytes = 0
        self.served_ns = 0
        self.typical_budget_ns = 0.0
        self.usable = 0
        self.eligible = 0
        self._budget_ns = 0  # when the typical budget was last updated
        self._by_deadline: dict[tuple[int, int, bool], DeadlineHeap] = {}  # by floor class, size and whether late
        self._fastest: dict[int, int] = {}
        self.set_states({variant.name: variant.state for variant in self.variants})

    def set_states(self, states: dict[str, State]) -> None:
        """Say anew which variants may run; what waits keeps only the variants that are still open to it."""
        self.states = states
        self.usable = sum(1 << i for i, v in enumerate(self.variants) if states[v.name] is not State.DISABLED)
        self.eligible = sum(1 << i for i, v in enumerate(self.variants) if states[v.name] is State.ELIGIBLE)
        self._fastest.clear()
        for queue in [*self.queues.values(), *self.late.values()]:
            for _, _, request in list(queue.entries):
                self.remove(request)
                request.allowed &= self.open_to(request)
                request.fallback &= self.eligible
                self.add(request)

    def open_to(self, request: Request) -> int:
        """The variants that may still run a request: only a pin reaches one that is not eligible."""
        return self.usable if request.pinned else self.eligible

    def add(self, request: Request) -> None:
        """Queue a request in its class."""
        queues = self.late if request.late else self.queues
        queues.setdefault(request.queue_key, DeadlineQueue()).add(request)
        self._by_deadline.setdefault((request.allowed, request.samples, request.late), DeadlineHeap()).add(request)
        self.waiting += 1
        self.waiting_bytes += request.size_bytes
        if request.late:
            self.late_waiting += 1
            self.late_bytes += request.size_bytes

    def remove(self, request: Request) -> None:
        """Take a waiting request out; an empty class is forgotten, so hostile shapes leave nothing behind."""
        queues = self.late if request.late else self.queues
        queue = queues[request.queue_key]
        queue.discard(request)
        if not queue:
            del queues[request.queue_key]
        heap = self._by_deadline[request.allowed, request.samples, request.late]
        heap.discard(request)
        if not heap:
            del self._by_deadline[request.allowed, request.samples, request.late]
        self.waiting -= 1
        self.waiting_bytes -= request.size_bytes
        if request.late:
            self.late_waiting -= 1
            self.late_bytes -= request.size_bytes

    def note_arrival(self, samples: int, budget_ns: int, now_ns: int) -> None:
        """Feed the forecast, and the geometric mean of the time requests allow, which few patient ones hardly move."""
        self.forecast.arrived(samples, now_ns)
        gain = max(_BUDGET_GAIN, 1.0 - 0.5 ** ((now_ns - self._budget_ns) / _BUDGET_HALF_LIFE_NS))
        typical_ns = self.typical_budget_ns or float(budget_ns)
        self.typical_budget_ns = typical_ns * (budget_ns / typical_ns) ** gain
        self._budget_ns = now_ns

    def fastest(self, allowed: int) -> int | None:
        """The usable variant of a set with the highest throughput, or None when the set has none left."""
        allowed &= self.usable
        if not allowed:
            return None
        if allowed not in self._fastest:
            self._fastest[allowed] = min(bits(allowed), key=lambda v: (self._cost_per_sample(v), v))
        return self._fastest[allowed]

    def quickest_ns(self, allowed: int, samples: int) -> int | None:
        """The least predicted time in which any usable variant of the set can run this many samples."""
        return min((self.latency.predict_ns(v, samples) for v in self.fitting(allowed, samples)), default=None)

    def fitting(self, allowed: int, samples: int) -> list[int]:
        """The usable variants of a set that were measured at batches of at least this size, best first."""
        return [v for v in bits(allowed & self.usable) if samples <= self.latency.max_batch_size(v)]

    def throughput_batch(self, variant: int) -> int:
        """The batch to reckon with when a backlog drains: what fits half of the typical budget (Nexus, SOSP'19)."""
        if not self.variants[variant].batchable:
            return 1
        budget_ns = self.typical_budget_ns / 2
        return max(1, self.latency.largest_batch(variant, int(budget_ns)))

    def chunk(self, allowed: int, queue: DeadlineQueue) -> tuple[int, int]:
        """How a class drains on its fastest variant: how many requests at a time, and for how long each time."""
        fastest = self.fastest(allowed)
        if fastest is None:
            return 1, 0
        average = max(1, queue.samples // len(queue))
        samples = max(average, min(self.throughput_batch(fastest), queue.samples))
        samples = min(samples, self.latency.max_batch_size(fastest))
        return max(1, samples // average), self.latency.predict_ns(fastest, samples)

    def backlog_ns(self, order_ns: int | None = None) -> int:
        """Executor time of the work that waits, or of that part which is ahead of a newcomer with this order."""
        return self._drain_ns(self.queues, order_ns)

    def late_backlog_ns(self) -> int:
        """Executor time of the late work that waits."""
        return self._drain_ns(self.late, None)

    def _drain_ns(self, queues: Mapping[QueueKey, DeadlineQueue], order_ns: int | None) -> int:
        total_ns = 0
        for (allowed, _), queue in queues.items():
            ahead = len(queue) if order_ns is None else queue.ahead_of(order_ns)
            if ahead:
                requests, chunk_ns = self.chunk(allowed, queue)
                total_ns += -(-ahead // requests) * chunk_ns
        return total_ns

    def most_urgent(self) -> Request:
        """The waiting request with the least laxity, time left beyond its fastest run; ValueError if none waits."""
        return min(self._urgent())[2]

    def soonest_hopeless_ns(self) -> int | None:
        """The instant after which the first waiting request is hopeless unless it has started; None if none waits."""
        return min(self._urgent(), default=(None,))[0]

    def hopeless(self, now_ns: int) -> list[Request]:
        """Waiting requests that could not finish in time even if they started now, the most hopeless first.

        Only the first of each class and size is looked at; the caller takes it out and asks again.
        """
        return [request for instant_ns, _, request in sorted(self._urgent()) if instant_ns < now_ns]

    def _urgent(self) -> Iterator[tuple[int, int, Request]]:
        """Of each class and size the request that becomes hopeless first, after when; late work can wait for ever."""
        for (allowed, samples, late), heap in self._by_deadline.items():
            request = heap.soonest()
            quickest_ns = self.quickest_ns(allowed, samples)
            if quickest_ns is None:  # every variant it may run on went while it waited
                yield -1, request.number, request
            elif not late:
                yield request.deadline_ns - REPLY_RESERVE_NS - quickest_ns, request.number, request

    def _cost_per_sample(self, variant: int) -> float:
        size = self.latency.max_batch_size(variant) if self.variants[variant].batchable else 1
        return self.latency.profiled_ns(variant, size) / size
