"""One simulated run: a model's variants, a trace and a policy in, every request's end out.

Rules: the scheduler is the live one. What differs from a server is drawn from one seed: how long batches take around
their profile, how long threads need to wake up, what a reply costs. Noise belongs to the request that leads a batch, so
policies that are compared on one trace and seed meet the same luck. A request above the largest batch runs in parts as
on a server: it ends with its last part, or the first that is not answered; the least accurate part speaks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import exp, prod
from random import Random

from server.errors import ServingError
from server.scheduling.admission import Defaults, make_request
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies import PolicyFactory
from server.scheduling.policy import Run
from server.scheduling.scheduler import End, Scheduler
from server.scheduling.slo import ModelKey, Outcome, Request
from server.simulation.virtual_server import VirtualServer
from server.trace import Arrival
from variants.variant import Variant

MAX_PARTS = 256
"""How many batches one request may fill, as on a server."""


@dataclass(frozen=True, slots=True)
class Noise:
    """How a real host differs from its profile.

    `deviation` is the standard deviation of the logarithm of a batch's latency; with probability `pause_rate` a batch
    is also held up by an exponential pause of mean `pause_ns`; decisions come after an exponential wake-up of mean
    `wake_ns`; an answer reaches its client `reply_ns` after its batch.
    """

    deviation: float = 0.0
    pause_rate: float = 0.0
    pause_ns: int = 0
    wake_ns: int = 0
    reply_ns: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """An executor dies at an instant and is back after a while."""

    at_ns: int
    executor: int
    for_ns: int


@dataclass(slots=True)
class Ended:
    """How one request of the trace ended; `place` is the variant's in the ranking, -1 where none answered."""

    outcome: Outcome
    at_ns: int
    place: int = -1
    batch_size: int = 0
    admitted: bool = False
    in_time: bool = False
    floor_met: bool = False


@dataclass(slots=True, eq=False)
class _Parts:
    """An arrival under way: its parts, how many of them are not answered yet, and what its answers came to so far."""

    number: int
    requests: list[Request] = field(default_factory=list)
    missing: int = 0
    place: int = -1
    batch_size: int = 0
    floor_met: bool = True


@dataclass(frozen=True, slots=True)
class Setting:
    """What a run is made of besides trace and policy."""

    variants: Sequence[Variant]
    executors: int = 1
    defaults: Defaults = Defaults(latency_ns=1_000_000_000)  # noqa: RUF009 - frozen
    noise: Noise = Noise()
    losses: Sequence[Loss] = ()
    max_requests: int = 10_000
    max_bytes: int = 1 << 40
    model: str = "model"


def simulate(setting: Setting, trace: Sequence[Arrival], policy: PolicyFactory, seed: int = 0) -> Simulation:
    """Run a trace to its end; the returned simulation holds every request's end and the batches that ran."""
    return Simulation(setting, trace, policy, seed).run()


class Simulation(VirtualServer):
    """One run. `ended[i]` is how the trace's i-th arrival ended; `runs` are the batches in the order of their start."""

    def __init__(self, setting: Setting, trace: Sequence[Arrival], policy: PolicyFactory, seed: int) -> None:
        scheduler = Scheduler(
            setting.executors, max_requests=setting.max_requests, max_bytes=setting.max_bytes, policy=policy
        )
        random = Random(seed)  # noqa: S311 - repeatable on purpose
        noise = setting.noise
        super().__init__(
            scheduler,
            service=self._taken_ns,
            wake_ns=lambda: int(random.expovariate(1 / noise.wake_ns)) if noise.wake_ns else 0,
        )
        self.model = ModelQueue(ModelKey(setting.model, "1"), setting.variants)
        scheduler.add_model(self.model)
        self.trace = trace
        self.ended: list[Ended | None] = [None] * len(trace)
        self.runs: list[Run] = []
        self.executors = setting.executors
        self.default_latency_ns = setting.defaults.latency_ns
        self.busy_ns = 0
        self.exceeded = 0
        """Batches that took longer than predicted."""
        self._setting = setting
        self._numbers = count()
        self._largest = max(map(self.model.latency.max_batch_size, range(len(self.model.variants))))
        self._luck = [random.gauss(0.0, 1.0) for _ in trace]
        self._pauses_ns = [_pause_ns(noise, random) for _ in trace]
        for loss in setting.losses:
            self.at(loss.at_ns, lambda loss=loss: self.lose(loss.executor, loss.for_ns))  # type: ignore[misc]
        if trace:
            self.at(trace[0].at_ns, lambda: self._arrive(0))

    def _arrive(self, number: int) -> None:
        """One arrival, and the plan for the next: the list of events stays short."""
        arrival = self.trace[number]
        if number + 1 < len(self.trace):
            self.at(self.trace[number + 1].at_ns, lambda: self._arrive(number + 1))
        whole = _Parts(number)
        if -(-arrival.samples // self._largest) > MAX_PARTS:  # before they are listed: a trace may say any number
            self.ended[number] = Ended(Outcome.INVALID, self.now_ns)
            return
        try:
            whole.requests = [self._request(arrival, each, whole) for each in self._samples(arrival)]
        except ServingError:
            self.ended[number] = Ended(Outcome.INFEASIBLE, self.now_ns)
            return
        whole.missing = len(whole.requests)
        for request in list(whole.requests):
            if self.ended[number] is None:
                self.submit(request)

    def _samples(self, arrival: Arrival) -> list[int]:
        """The samples of each part: at most as many as the largest batch holds."""
        most = self._largest
        return [min(most, arrival.samples - start) for start in range(0, max(1, arrival.samples), most)]

    def _request(self, arrival: Arrival, samples: int, whole: _Parts) -> Request:
        """One part. Raises what `make_request` raises."""
        return make_request(
            self.model,
            arrival.slo,
            self._setting.defaults,
            number=next(self._numbers),
            samples=samples,
            size_bytes=0,
            shape=arrival.shape,
            arrival_ns=self.now_ns,
            rpc_deadline_ns=None if arrival.timeout_ns is None else self.now_ns + arrival.timeout_ns,
            payload=whole,
            length=sum(prod(shape) for shape in arrival.shape or ()),
        )

    def _taken_ns(self, run: Run, profiled_ns: int) -> int:
        leader = _whole(run.requests[0]).number
        factor = exp(self._setting.noise.deviation * self._luck[leader])
        taken_ns = max(1, int(profiled_ns * factor)) + self._pauses_ns[leader]
        self.busy_ns += taken_ns
        self.exceeded += taken_ns > run.predicted_ns
        return taken_ns

    def on_started(self, run: Run) -> None:
        """Keep the batch."""
        self.runs.append(run)

    def on_answered(self, run: Run, requests: Sequence[Request]) -> None:
        """Judge each answer by when its client has it."""
        at_ns = self.now_ns + self._setting.noise.reply_ns
        for request in requests:
            whole = _whole(request)
            whole.missing -= 1
            whole.floor_met &= bool(request.asked >> run.place & 1)
            if run.place > whole.place:
                whole.place, whole.batch_size = run.place, run.samples
            if whole.missing == 0:
                in_time = at_ns <= request.deadline_ns
                outcome = Outcome.LATE if not in_time else Outcome.OK if whole.floor_met else Outcome.DEGRADED
                self._end(whole, Ended(outcome, at_ns, whole.place, whole.batch_size, True, in_time, whole.floor_met))

    def on_ended(self, ends: Iterable[End]) -> None:
        """Keep the refusals; what was admitted ends expired or failed."""
        for end in ends:
            admitted = end.outcome in (Outcome.EXPIRED, Outcome.FAILED)
            self._end(_whole(end.request), Ended(end.outcome, self.now_ns, admitted=admitted))

    def _end(self, whole: _Parts, end: Ended) -> None:
        """The one end of an arrival: nobody waits for its other parts any more."""
        if self.ended[whole.number] is None:
            self.ended[whole.number] = end
            for request in whole.requests:
                self.scheduler.cancelled(request)
            whole.requests = []  # a cycle would keep them until Python looks for cycles


def _whole(request: Request) -> _Parts:
    return request.payload  # type: ignore[return-value]


def _pause_ns(noise: Noise, random: Random) -> int:
    return int(random.expovariate(1 / noise.pause_ns)) if random.random() < noise.pause_rate else 0
