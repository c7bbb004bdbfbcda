"""A small seeded discrete-event driver over the Scheduler: virtual executors, service noise, cancels and failures.

It does what an engine must: make the request at its arrival, `tick` before every `decide`, sleep until `next_event_ns`.
What it does not do is decide. `Arrival`, `Batch` and `Ended` are the frozen request and outcome log. After every
instant `World` checks the invariants that hold whatever the traffic; it raises AssertionError with the broken state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from heapq import heappop, heappush
from random import Random

from scheduling_models import MS, Arrival, ask

from server.errors import Infeasible, NotFound
from server.scheduling.admission import Defaults
from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.scheduler import End, Run, Scheduler
from server.scheduling.slo import Outcome, Request
from variants.variant import State


@dataclass(frozen=True, slots=True)
class Member:
    """A request as it stood when its batch was formed."""

    number: int
    samples: int
    shape: Hashable
    allowed: int
    asked: int
    deadline_ns: int
    late: bool
    retried: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch that started; `usable` is the set of variants that might run at that instant."""

    at_ns: int
    executor: int
    model: str
    variant: str
    place: int
    members: tuple[Member, ...]
    samples: int
    predicted_ns: int
    reason: str
    usable: int


@dataclass(frozen=True, slots=True)
class Ended:
    """The one end of a request; `variant` is "none" where none answered."""

    number: int
    outcome: Outcome
    at_ns: int
    variant: str = "none"
    error: str = ""


Service = Callable[[Run, int], int]
"""How long a batch really takes: the run and the profiled latency in, nanoseconds out."""
Fails = Callable[[Run], bool]


def exact(run: Run, profiled_ns: int) -> int:
    """Every batch takes what its profile says."""
    return profiled_ns


def noisy(seed: int, deviation: float) -> Service:
    """Gaussian service noise around the profile, from its own seeded stream."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    return lambda _, profiled_ns: max(1, int(profiled_ns * random.gauss(1.0, deviation)))


class World:
    """A scheduler, its executors and a virtual clock. Drive it with `arrive`, `at` and `run`; read the log."""

    def __init__(
        self,
        *models: ModelQueue,
        executors: int = 1,
        defaults: Defaults | None = None,
        max_requests: int = 10_000,
        max_bytes: int = 1 << 40,
        service: Service = exact,
        fails: Fails = lambda _: False,
        check: bool = True,
    ) -> None:
        self.scheduler = Scheduler(executors, max_requests=max_requests, max_bytes=max_bytes)
        for model in models:
            self.scheduler.add_model(model)
        self.now_ns = 0
        self.arrivals: list[Arrival] = []
        self.requests: dict[int, Request] = {}
        self.batches: list[Batch] = []
        self.ended: dict[int, Ended] = {}
        self._keys = {model.key[0]: model.key for model in models}
        self._defaults = defaults or Defaults(latency_ns=1000 * MS)
        self._bounds = max_requests, max_bytes
        self._service, self._fails, self._check = service, fails, check
        self._idle = set(range(executors))
        self._gone: set[int] = set()
        self._events: list[tuple[int, int, Callable[[], None]]] = []
        self._planned = 0
        self._wake_ns: int | None = None

    def arrive(self, *arrivals: Arrival) -> list[int]:
        """Plan arrivals; returns their numbers."""
        numbers = []
        for arrival in arrivals:
            number = len(self.arrivals)
            self.arrivals.append(arrival)
            numbers.append(number)
            self.at(arrival.at_ns, lambda number=number: self._arrived(number))  # type: ignore[misc]
            if arrival.cancel_at_ns is not None:
                self.at(arrival.cancel_at_ns, lambda number=number: self.cancel(number))  # type: ignore[misc]
        return numbers

    def at(self, instant_ns: int, action: Callable[[], None]) -> None:
        """Plan an action; ties run in the order in which they were planned."""
        heappush(self._events, (instant_ns, self._planned, action))
        self._planned += 1

    def set_state(self, name: str, state: State, model: str = "m") -> None:
        """Change one variant's state now."""
        queue = self.scheduler.models[self._keys[model]]
        self.scheduler.set_states(queue.key, {**queue.states, name: state})

    def cancel(self, number: int) -> None:
        """The client goes away."""
        if number in self.ended:
            return
        if number in self.requests and self.scheduler.cancelled(self.requests[number]):
            self._end(number, Outcome.CANCELLED)
        else:
            self._gone.add(number)

    def run(self, until_ns: int | None = None) -> World:
        """Let time pass, to the end of everything or to an instant; returns itself."""
        while self._events and (until_ns is None or self._events[0][0] <= until_ns):
            self.now_ns = self._events[0][0]
            while self._events and self._events[0][0] == self.now_ns:
                heappop(self._events)[2]()
            self._settle()
        return self

    def outcome(self, number: int) -> Outcome:
        """How a request ended."""
        return self.ended[number].outcome

    def outcomes(self) -> Counter[str]:
        """How many requests ended in which way."""
        return Counter(ended.outcome.value for ended in self.ended.values())

    def variants_used(self, numbers: Iterable[int] | None = None) -> list[str]:
        """The variant that answered each request, in order of number."""
        return [self.ended[number].variant for number in (sorted(self.ended) if numbers is None else numbers)]

    def _arrived(self, number: int) -> None:
        arrival = self.arrivals[number]
        model = self.scheduler.models[self._keys[arrival.model]]
        if number in self._gone:
            self._end(number, Outcome.CANCELLED)
            return
        try:
            request = ask(model, arrival, number, self._defaults)
        except Infeasible as error:
            self._end(number, Outcome.INFEASIBLE, error=str(error))
            return
        except NotFound as error:
            self._end(number, Outcome.INVALID, error=str(error))
            return
        self.requests[number] = request
        self._end_all(self.scheduler.arrived(request, self.now_ns))

    def _settle(self) -> None:
        self._end_all(self.scheduler.tick(self.now_ns))
        for executor in sorted(self._idle):
            run = self.scheduler.decide(executor, self.now_ns)
            if run is not None:
                self._start(run)
        if self._check:
            self._check_invariants()
        wake_ns = self.scheduler.next_event_ns(self.now_ns)
        assert wake_ns is None or wake_ns > self.now_ns, f"nothing is left to do at {self.now_ns}, yet asked again"
        if wake_ns is not None and (self._wake_ns is None or wake_ns < self._wake_ns):
            self._wake_ns = wake_ns
            self.at(wake_ns, lambda: self._woke(wake_ns))

    def _woke(self, instant_ns: int) -> None:
        if self._wake_ns == instant_ns:
            self._wake_ns = None

    def _start(self, run: Run) -> None:
        model = self.scheduler.models[run.model]
        members = tuple(
            Member(r.number, r.samples, r.shape, r.allowed, r.asked, r.deadline_ns, r.late, r.solo)
            for r in run.requests
        )
        batch = Batch(
            self.now_ns,
            run.executor,
            run.model[0],
            run.variant,
            run.place,
            members,
            run.samples,
            run.predicted_ns,
            run.reason,
            model.usable,
        )
        self.batches.append(batch)
        if self._check:
            self._check_batch(batch, model)
        self._idle.remove(run.executor)
        taken_ns = self._service(run, model.latency.profiled_ns(run.place, run.samples))
        self.at(self.now_ns + taken_ns, lambda: self._completed(run, taken_ns))

    def _completed(self, run: Run, taken_ns: int) -> None:
        self._idle.add(run.executor)
        if self._fails(run):
            self._end_all(self.scheduler.failed(run, self.now_ns, "incident"))
            return
        self.scheduler.finished(run, self.now_ns, taken_ns)
        for request in run.requests:
            self._end(request.number, self._answered(request, run.place), run.variant)

    def _answered(self, request: Request, place: int) -> Outcome:
        if request.number in self._gone:
            return Outcome.CANCELLED
        if self.now_ns > request.deadline_ns:
            return Outcome.LATE
        return Outcome.OK if request.asked >> place & 1 else Outcome.DEGRADED

    def _end_all(self, ends: Iterable[End]) -> None:
        for end in ends:
            outcome = Outcome.CANCELLED if end.request.number in self._gone else end.outcome
            self._end(end.request.number, outcome, error=str(end.error))

    def _end(self, number: int, outcome: Outcome, name: str = "none", error: str = "") -> None:
        assert number not in self.ended, f"request {number} ended twice: {self.ended[number]}, then {outcome}"
        self.ended[number] = Ended(number, outcome, self.now_ns, name, error)

    def _check_batch(self, batch: Batch, model: ModelQueue) -> None:
        """A batch is of one shape, inside everybody's class, no larger than measured, and in time unless late."""
        assert batch.samples == sum(member.samples for member in batch.members), batch
        assert batch.samples <= model.latency.max_batch_size(batch.place), batch
        assert len({member.shape for member in batch.members}) == 1, batch
        assert all(member.allowed & batch.usable & 1 << batch.place for member in batch.members), batch
        alone = any(member.retried for member in batch.members) or not model.variants[batch.place].batchable
        assert len(batch.members) == 1 or not alone, batch
        assert len({member.late for member in batch.members}) == 1, batch
        if not batch.members[0].late:
            least_ns = min(member.deadline_ns for member in batch.members)
            assert batch.at_ns + batch.predicted_ns + REPLY_RESERVE_NS <= least_ns, batch
        assert not any(member.number in self.ended for member in batch.members), batch

    def _check_invariants(self) -> None:
        """Counts add up, classes are what their keys say, nothing empty is kept, no executor idles beside work."""
        retried = 0
        for model in self.scheduler.models.values():
            queued = [*model.queues.items(), *model.late.items()]
            for key, queue in queued:
                assert queue.entries, f"an empty class was kept: {key}"
                self._check_queue(key, queue)
            requests = [request for _, queue in queued for _, _, request in queue.entries]
            assert model.waiting == len(requests)
            assert model.waiting_bytes == sum(request.size_bytes for request in requests)
            assert all(request.number not in self.ended for request in requests)
            assert all(not request.late for queue in model.queues.values() for _, _, request in queue.entries)
            retried += sum(request.solo for request in requests)
            if self._idle and not model.max_queue_delay_ns:
                assert not model.queues, f"executors {self._idle} idle beside {model.queues}"
            if self._idle and model.queues:
                assert self.scheduler.next_event_ns(self.now_ns) is not None
        for model in self.scheduler.models.values():
            assert model.waiting <= self._bounds[0] + retried
            assert retried or model.waiting_bytes <= self._bounds[1]

    def _check_queue(self, key: tuple[int, Hashable], queue: DeadlineQueue) -> None:
        requests = [request for _, _, request in queue.entries]
        places = [(request.order_ns, request.number) for request in requests]
        assert places == sorted(places)
        assert all(request.queue is queue and request.queue_key == key for request in requests)
        assert queue.samples == sum(request.samples for request in requests)
