"""What the scheduler knows of one model: its ranked variants, what each costs here, and who is waiting.

The *ranking* orders variants by what is proven: least proven drop against the reference first, so the reference
leads unless another variant is proven better. Sets of variants are bit sets over the ranking; bit 0 is the best.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from server.scheduling.deadline_queue import DeadlineList, DeadlineQueue
from server.scheduling.forecast import ArrivalForecast
from server.scheduling.latency import UNIT, LatencyModel
from server.scheduling.patience import Patience
from server.scheduling.slo import ModelKey, Request
from server.scheduling.waiting import FloorClass, QueueKey, Waiting
from variants.variant import REFERENCE, State, Variant

REPLY_RESERVE_NS = 300_000
"""Held back from every deadline for encoding and sending the answer."""

_BUDGET_GAIN = 0.05
_BUDGET_HALF_LIFE_NS = 500_000_000  # so that a burst's deadlines are forgotten within a second or two of its end

_Kind = tuple[int, int, int, bool]
"""What decides how fast a request can be: floor class, samples, step of length, and whether it is late."""
_Urgency = tuple[int, int, Request]
"""When a request becomes hopeless, its number, and itself."""


class Chunk(NamedTuple):
    """A batch of a class that drains: the variant, how many requests and samples, and its time in a crowd."""

    variant: int
    requests: int
    samples: int
    batch_ns: int


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
    """One model's waiting requests, regular and late, and the knowledge to choose among its variants.

    `unmeasured` are the variants that cannot run here, with the reason; `usable` those that may run at all, `eligible`
    those that take traffic which does not pin. `served_ns` is the executor time this model has had, the measure of
    fairness between models. A `retired` model only finishes what it has.
    """

    def __init__(self, key: ModelKey, variants: Sequence[Variant], max_queue_delay_ns: int = 0) -> None:
        self.key = key
        self.variants = tuple(rank(variants))
        self.unmeasured = {variant.name: variant.reason for variant in variants if variant.profile is None}
        self.latency = LatencyModel(self.variants)
        self.forecast = ArrivalForecast()
        self.patience = Patience()
        self.max_queue_delay_ns = max_queue_delay_ns
        self.regular, self.late = Waiting(), Waiting()
        self.retired = False
        self.served_ns = 0
        self.typical_budget_ns = 0.0
        self.usable = 0
        self.eligible = 0
        self.floors: dict[tuple[float | None, float | None], int] = {}
        """The variants that satisfy a floor (least accuracy, largest drop), as far as somebody asked."""
        self._budget_ns = 0  # when the typical budget was last updated
        self._by_deadline: dict[_Kind, DeadlineList] = {}
        self._urgent: dict[_Kind, _Urgency] = {}
        self._stale: set[_Kind] = set()
        self._urgent_for: object = None
        self._fastest: dict[tuple[int, int], int | None] = {}
        self._fitting: dict[tuple[int, int], tuple[int, ...]] = {}
        self._quickest: dict[tuple[int, int, int, int], int | None] = {}
        self._quickest_version = 0
        self._at_rest: dict[tuple[int, int, int], int] = {}
        self.set_states({variant.name: variant.state for variant in self.variants})

    def set_states(self, states: dict[str, State]) -> None:
        """Say anew which variants may run; what waits keeps only the variants that are still open to it."""
        self.states = states
        self.usable = sum(1 << i for i, v in enumerate(self.variants) if states[v.name] is not State.DISABLED)
        self.eligible = sum(1 << i for i, v in enumerate(self.variants) if states[v.name] is State.ELIGIBLE)
        self.floors.clear()
        self._fastest.clear()
        self._fitting.clear()
        self._quickest.clear()
        self._at_rest.clear()
        for floor_class in [*self.regular.classes.values(), *self.late.classes.values()]:
            for _, _, request in list(floor_class.entries):
                self.remove(request)
                request.allowed &= self.open_to(request)
                request.fallback &= self.eligible
                self.add(request)

    def open_to(self, request: Request) -> int:
        """The variants that may still run a request: only a pin reaches one that is not eligible."""
        return self.usable if request.pinned else self.eligible

    @property
    def waiting(self) -> int:
        """Requests that wait, late ones included."""
        return len(self.regular) + len(self.late)

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the requests that wait, late ones included."""
        return self.regular.size_bytes + self.late.size_bytes

    @property
    def queues(self) -> Mapping[QueueKey, DeadlineQueue]:
        """The requests that may still be in time, by class and shape."""
        return self.regular.queues

    def add(self, request: Request) -> None:
        """Queue a request in its class."""
        (self.late if request.late else self.regular).add(request)
        kind = _kind(request)
        self._by_deadline.setdefault(kind, DeadlineList()).add(request)
        self._stale.add(kind)

    def remove(self, request: Request) -> None:
        """Take a waiting request out."""
        (self.late if request.late else self.regular).remove(request)
        kind = _kind(request)
        self._by_deadline[kind].discard(request)
        self._stale.add(kind)
        if not self._by_deadline[kind]:
            del self._by_deadline[kind]

    def note_arrival(self, samples: int, budget_ns: int, now_ns: int, step: int = 0) -> None:
        """Feed the forecast, and the geometric mean of the time requests allow, which few patient ones hardly move.

        A long input counts as as many short ones as take its time.
        """
        fastest = self.fastest(self.eligible) if step else None
        weight = 1.0
        if fastest is not None:
            weight = self.latency.profiled_ns(fastest, 1, step) / self.latency.profiled_ns(fastest, 1)
        self.forecast.arrived(samples * weight, now_ns)
        gain = max(_BUDGET_GAIN, 1.0 - 0.5 ** ((now_ns - self._budget_ns) / _BUDGET_HALF_LIFE_NS))
        typical_ns = self.typical_budget_ns or float(budget_ns)
        self.typical_budget_ns = typical_ns * (budget_ns / typical_ns) ** gain
        self._budget_ns = now_ns

    def missed(self, request: Request) -> None:
        """A request could not be in time, told once; one that allowed much less than usual would have missed anyhow."""
        self.latency.doubt()
        if not request.missed and 2 * (request.deadline_ns - request.arrival_ns) >= self.typical_budget_ns:
            self.forecast.spread.judged(mistake=True)
        request.missed = True

    def fastest(self, allowed: int, samples: int = 1) -> int | None:
        """The usable variant of a set with the highest throughput that can run so many samples; None if none can."""
        key = allowed & self.usable, samples
        if key not in self._fastest:
            fitting = self.fitting(*key)
            self._fastest[key] = min(fitting, key=lambda v: (self._cost_per_sample(v), v)) if fitting else None
        return self._fastest[key]

    def quickest_ns(self, allowed: int, samples: int, step: int = 0) -> int | None:
        """The least time in which any usable variant of the set is predicted to run this many samples here."""
        latency = self.latency
        if self._quickest_version != latency.version:
            self._quickest_version = latency.version
            self._quickest.clear()
        here = latency.here
        key = allowed, samples, step, here.busy
        if key not in self._quickest:
            times = (latency.full_speed_ns(v, samples, step) for v in self.fitting(allowed, samples))
            self._quickest[key] = min(times, default=None)
        quickest = self._quickest[key]
        return None if quickest is None else quickest * here.slowdown // UNIT

    def at_rest_ns(self, allowed: int, samples: int, step: int = 0) -> int:
        """The same on an idle host, which does not change with what is learnt; 0 where none can run so many samples.

        As `fitting`, it may be asked while `set_states` forgets what was found before.
        """
        key = allowed & self.usable, samples, step
        found = self._at_rest.get(key)
        if found is None:
            times = (self.latency.idle_ns(v, samples, step) for v in self.fitting(key[0], samples))
            found = self._at_rest[key] = min(times, default=0)
        return found

    def fitting(self, allowed: int, samples: int) -> tuple[int, ...]:
        """The usable variants of a set that were measured at batches of at least this size, best first."""
        key = allowed & self.usable, samples
        found = self._fitting.get(key)
        if found is None:
            found = self._fitting[key] = tuple(v for v in bits(key[0]) if samples <= self.latency.max_batch_size(v))
        return found

    def throughput_batch(self, variant: int) -> int:
        """The batch to reckon with when a backlog drains: what fits half of the typical budget (Nexus, SOSP'19)."""
        if not self.variants[variant].batchable:
            return 1
        return max(1, self.latency.largest_crowded(variant, int(self.typical_budget_ns / 2)))

    def least_cost_ns(self) -> float:
        """Executor time of a sample on the fastest variant, in batches of the size that a backlog drains in."""
        fastest = self.fastest(self.eligible)
        if fastest is None:
            return 0.0
        batch = self.throughput_batch(fastest)
        return self.latency.crowded_ns(fastest, batch) / batch

    def utilisation(self, now_ns: int, executors: int) -> float:
        """The share of all executor time that this model's arrivals take at least, at the rate of late."""
        return self.forecast.rate(now_ns) * self.least_cost_ns() / 1e9 / executors

    def chunk(self, allowed: int, step: int, waiting: FloorClass) -> Chunk | None:
        """How a class drains on its fastest variant; None where it has none left.

        A batch is of one shape, so it is no larger than what waits of an average one.
        """
        average = waiting.average
        fastest = self.fastest(allowed, average)
        if fastest is None:
            return None
        samples = max(average, min(self.throughput_batch(fastest), waiting.samples // waiting.shapes))
        samples = min(samples, self.latency.max_batch_size(fastest))
        return Chunk(fastest, samples // average, samples, self.latency.crowded_ns(fastest, samples, step))

    def backlog_ns(self) -> int:
        """Executor time of the work that waits."""
        return self._drain_ns(self.regular)

    def ahead_ns(self, request: Request, own: int) -> tuple[int, int]:
        """Executor time that the work ahead of a newcomer is expected to take, and that of the batch it runs in itself.

        `own` is the floor class that it would wait in. Behind a full batch of that, its own will be full too: to reckon
        with less would admit requests that leave no time for a full batch, so that batches shrink just when throughput
        is short. Only its own batch has a margin: the errors of many cancel out.
        """
        ahead_ns = own_ns = 0
        for (allowed, step), floor_class in self.regular.classes.items():
            ahead = floor_class.ahead_of(request.order_ns)
            chunk = self.chunk(allowed, step, floor_class) if ahead else None
            if chunk is not None:
                ahead_ns += self.latency.expected_ns(chunk.variant, chunk.samples, step) * ahead // chunk.requests
                if ahead >= chunk.requests and (allowed, step) == (own, request.step):
                    own_ns = chunk.batch_ns
        return ahead_ns, own_ns

    def late_backlog_ns(self) -> int:
        """Executor time of the late work that waits."""
        return self._drain_ns(self.late)

    def _drain_ns(self, waiting: Waiting) -> int:
        total_ns = 0
        for (allowed, step), floor_class in waiting.classes.items():
            chunk = self.chunk(allowed, step, floor_class)
            if chunk is not None:
                total_ns += -(-len(floor_class) // chunk.requests) * chunk.batch_ns
        return total_ns

    def most_urgent(self, now_ns: int) -> Request | None:
        """The waiting request with the least laxity among those that this executor can finish in time; or None.

        Laxity is the time left beyond the fastest run. On a slower executor than the best, some may be out of reach.
        """
        least = min(self._in_reach(now_ns), default=None)
        return None if least is None else least[2]

    def anchor(self, now_ns: int) -> Request | None:
        """The request to form a batch around: the most urgent one, reckoned by batches where several classes wait.

        Laxity is then the time left beyond the batch in which a class drains: whoever starts at the last moment runs
        alone, which a class that only a slow variant serves can least afford.
        """
        if len(self.regular.classes) < 2:
            return self.most_urgent(now_ns)
        chunks = {key: self.chunk(*key, waiting) for key, waiting in self.regular.classes.items()}
        least: _Urgency | None = None
        for instant_ns, number, request in self._in_reach(now_ns):
            chunk = chunks[request.allowed, request.step]
            alone_ns = request.deadline_ns - REPLY_RESERVE_NS - instant_ns
            urgency = instant_ns - max(0, chunk.batch_ns - alone_ns if chunk else 0), number, request
            if least is None or urgency < least:
                least = urgency
        return None if least is None else least[2]

    def _in_reach(self, now_ns: int) -> Iterator[_Urgency]:
        """Of each kind the request that becomes hopeless first among those that this executor can finish in time."""
        for (allowed, samples, step, _), urgency in self._urgencies().items():
            if urgency[0] < now_ns:
                quickest_ns = self.quickest_ns(allowed, samples, step)
                if quickest_ns is None:
                    continue
                needed_ns = REPLY_RESERVE_NS + quickest_ns
                later = self._by_deadline[allowed, samples, step, False].soonest(now_ns + needed_ns)
                if later is None:
                    continue
                urgency = later.deadline_ns - needed_ns, later.number, later  # noqa: PLW2901 - the first in reach
            yield urgency

    def soonest_hopeless_ns(self) -> int | None:
        """The instant after which the first waiting request is hopeless unless it has started; None if none waits."""
        return min(self._urgencies().values(), default=(None,))[0]

    def hopeless(self, now_ns: int) -> list[Request]:
        """All who wait and could not finish in time even if they started now, kind by kind, the most hopeless first."""
        found = sorted((urgency, kind) for kind, urgency in self._urgencies().items() if urgency[0] < now_ns)
        requests = []
        for _, kind in found:
            quickest_ns = self.quickest_ns(*kind[:3])
            in_reach_ns = None if quickest_ns is None else now_ns + REPLY_RESERVE_NS + quickest_ns
            requests += self._by_deadline[kind].before(in_reach_ns)
        return requests

    def _urgencies(self) -> Mapping[_Kind, _Urgency]:
        """Of each kind the request that becomes hopeless first, and when; only what has changed is looked at again.

        Late work can wait for ever; whoever may run on nothing any more is hopeless at once.
        """
        circumstances = self.latency.version, self.latency.here, self.usable
        if circumstances != self._urgent_for:
            self._urgent_for = circumstances
            self._urgent.clear()
            self._stale.update(self._by_deadline)
        for kind in self._stale:
            self._urgent.pop(kind, None)
            waiting = self._by_deadline.get(kind)
            request = waiting.soonest() if waiting is not None else None
            if request is not None:
                allowed, samples, step, late = kind
                quickest_ns = self.quickest_ns(allowed, samples, step)
                if quickest_ns is None:
                    self._urgent[kind] = -1, request.number, request
                elif not late:
                    instant_ns = request.deadline_ns - REPLY_RESERVE_NS - quickest_ns
                    self._urgent[kind] = instant_ns, request.number, request
        self._stale.clear()
        return self._urgent

    def _cost_per_sample(self, variant: int) -> float:
        size = self.latency.max_batch_size(variant) if self.variants[variant].batchable else 1
        return self.latency.profiled_ns(variant, size) / size


def _kind(request: Request) -> _Kind:
    return request.allowed, request.samples, request.step, request.late
