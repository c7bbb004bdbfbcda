"""The simulator's virtual server with a log, cancellations and failures, and the invariants that always hold.

`Arrival`, `Batch` and `Ended` are the frozen request and outcome log. After every instant `World` checks the invariants
that hold whatever the traffic; it raises AssertionError with the broken state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from random import Random

from scheduling_models import MS, Arrival, ask

from server.errors import Infeasible, NotFound
from server.scheduling.admission import Defaults
from server.scheduling.deadline_queue import DeadlineQueue
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies import PolicyFactory
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.scheduler import End, Run, Scheduler
from server.scheduling.slo import Outcome, Request
from server.simulation.virtual_server import Fails, Service, VirtualServer, exact
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


def noisy(seed: int, deviation: float) -> Service:
    """Gaussian service noise around the profile, from its own seeded stream."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    return lambda _, profiled_ns: max(1, int(profiled_ns * random.gauss(1.0, deviation)))


class World(VirtualServer):
    """A virtual server to drive with `arrive`, `at` and `run`; read the log. Some invariants are FitDrain's own."""

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
        policy: PolicyFactory = FitDrain,
    ) -> None:
        scheduler = Scheduler(executors, max_requests=max_requests, max_bytes=max_bytes, policy=policy)
        super().__init__(scheduler, service=service, fails=fails)
        for model in models:
            self.scheduler.add_model(model)
        self.arrivals: list[Arrival] = []
        self.requests: dict[int, Request] = {}
        self.batches: list[Batch] = []
        self.ended: dict[int, Ended] = {}
        self._keys = {model.key[0]: model.key for model in models}
        self._defaults = defaults or Defaults(latency_ns=1000 * MS)
        self._bounds = max_requests, max_bytes
        self._check, self._drains = check, isinstance(policy(), FitDrain)
        self._gone: set[int] = set()

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
        self.submit(request)

    def on_settled(self) -> None:
        """Check what holds at every instant."""
        if self._check:
            self._check_invariants()

    def on_started(self, run: Run) -> None:
        """Log and check a batch."""
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

    def on_answered(self, run: Run, requests: Sequence[Request]) -> None:
        """Log the answers."""
        for request in requests:
            self._end(request.number, self._answered(request, run.place), run.variant)

    def _answered(self, request: Request, place: int) -> Outcome:
        if request.number in self._gone:
            return Outcome.CANCELLED
        if self.now_ns > request.deadline_ns:
            return Outcome.LATE
        return Outcome.OK if request.asked >> place & 1 else Outcome.DEGRADED

    def on_ended(self, ends: Iterable[End]) -> None:
        """Log the other ends."""
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
        if not batch.members[0].late and self._drains:
            least_ns = min(member.deadline_ns for member in batch.members)
            assert batch.at_ns + batch.predicted_ns + REPLY_RESERVE_NS <= least_ns, batch
        assert not any(member.number in self.ended for member in batch.members), batch

    def _check_invariants(self) -> None:
        """Counts add up, classes are what their keys say, nothing empty is kept, no executor idles beside work."""
        retried = 0
        for model in self.scheduler.models.values():
            queued = [*model.regular.queues.items(), *model.late.queues.items()]
            for key, queue in queued:
                assert queue.entries, f"an empty class was kept: {key}"
                self._check_queue(key, queue)
            requests = [request for _, queue in queued for _, _, request in queue.entries]
            assert model.waiting == len(requests)
            assert model.waiting_bytes == sum(request.size_bytes for request in requests)
            assert all(request.number not in self.ended for request in requests)
            assert all(not request.late for queue in model.queues.values() for _, _, request in queue.entries)
            retried += sum(request.solo for request in requests)
            if self.idle and not model.max_queue_delay_ns and self._drains:
                assert not model.queues, f"executors {self.idle} idle beside {model.queues}"
            if self.idle and model.queues:
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
