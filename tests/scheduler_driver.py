"""The bare scheduler under an explicit clock, with a ledger that reckons for itself what must hold.

Every method is one step: it does what the engine would do, then checks conservation, bounds, floors and structure from
what the requests asked, not from what the scheduler made of it. Equal steps must give equal logs. Some checks are
FitDrain's own: published policies may hold back or overrun a deadline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from scheduling_models import MS

from server.errors import Infeasible, NotFound
from server.scheduling.admission import Defaults, make_request
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies import policy_factory
from server.scheduling.policy import Run
from server.scheduling.scheduler import End, Scheduler
from server.scheduling.slo import ModelKey, OnInfeasible, Outcome, Request, Slo
from server.scheduling.waiting import Waiting
from variants.variant import REFERENCE, State, Variant

DEFAULTS = Defaults(40 * MS, max_accuracy_drop=0.05)
LENGTHS = {"short": 10, "brief": 10, "long": 45}
"""Shapes, and how many elements a sample of that shape has."""
_AGED_NS, _LATE_SHARE = 500 * MS, 10


@dataclass(frozen=True, slots=True)
class Setup:
    """A server: the variants and queue delay of models m and n, executors, bounds, and the policy's name."""

    families: tuple[tuple[Variant, ...], tuple[Variant, ...]]
    delays_ms: tuple[int, int]
    executors: int
    max_requests: int
    max_bytes: int
    policy: str = "fitdrain"


@dataclass(frozen=True, slots=True)
class Ask:
    """One request as a client sends it; it was received `ago_ns` before the scheduler heard of it."""

    slo: Slo
    model: str = "m"
    samples: int = 1
    size_bytes: int = 10
    shape: str = "short"
    rpc_ms: int | None = None
    ago_ns: int = 0


class Driver:
    """A scheduler, its executors and its clients, moved step by step."""

    def __init__(self, setup: Setup) -> None:
        self.now_ns = 1000 * MS
        self.setup = setup
        bounds = {"max_requests": setup.max_requests, "max_bytes": setup.max_bytes}
        self.scheduler = Scheduler(setup.executors, **bounds, policy=policy_factory(setup.policy))
        self.requests: dict[int, Request] = {}
        self.asks: dict[int, Ask] = {}
        self.ended: dict[int, str] = {}
        self.running: dict[int, Run] = {}
        self.dead: set[int] = set()
        self.log: list[object] = []
        self._keys: dict[str, ModelKey] = {}
        self._tries: Counter[int] = Counter()
        self._gone: set[int] = set()
        self._late_again_ns = 0
        self._drains = setup.policy == "fitdrain"
        for name in "mn":
            self._add(ModelKey(name, "1"))

    @property
    def idle(self) -> list[int]:
        """Executors that could run a batch."""
        return [e for e in range(self.setup.executors) if e not in self.running and e not in self.dead]

    @property
    def open(self) -> list[int]:
        """Requests that have not ended."""
        return [number for number in self.requests if number not in self.ended]

    def arrive(self, ask: Ask) -> None:
        """A request comes in."""
        model, number, arrival_ns = self._model(ask.model), len(self.asks), self.now_ns - ask.ago_ns
        self.asks[number] = ask
        try:
            request = make_request(
                model,
                ask.slo,
                DEFAULTS,
                number=number,
                samples=ask.samples,
                size_bytes=ask.size_bytes,
                shape=ask.shape,
                length=LENGTHS[ask.shape],
                arrival_ns=arrival_ns,
                rpc_deadline_ns=None if ask.rpc_ms is None else arrival_ns + ask.rpc_ms * MS,
            )
        except (Infeasible, NotFound) as error:
            self.log.append((number, str(error)))
        else:
            self.requests[number] = request
            self._end(self.scheduler.arrived(request, self.now_ns))
        self._check()

    def wait(self, for_ns: int) -> None:
        """Time passes and nobody looks."""
        self.now_ns += for_ns

    def settle(self) -> None:
        """Every idle executor asks for work, until nothing is left to do at this instant."""
        for _ in range(3 * len(self.open) + 3):
            self._tick()
            for executor in self.idle:
                self.decide(executor)
            wake_ns = self.scheduler.next_event_ns(self.now_ns)
            self.log.append(wake_ns)
            if wake_ns is None or wake_ns > self.now_ns:
                return
        raise AssertionError(f"at {self.now_ns} it asks again and again")

    def follow(self, early_ns: int = 0) -> None:
        """Come back when the scheduler asked for it, or just before."""
        self.settle()
        wake_ns = self.scheduler.next_event_ns(self.now_ns)
        if wake_ns is not None:
            self.now_ns = max(self.now_ns, wake_ns - early_ns)
            self.settle()

    def decide(self, executor: int) -> None:
        """One idle executor asks for work."""
        self._tick()
        run, given_up = self.scheduler.decide(executor, self.now_ns)
        self._end(given_up)
        if run is not None:
            self._start(run)
        elif self._drains:
            self._check_idleness()
        self._check()

    def finish(self, executor: int, share: float) -> None:
        """A batch is done after this share of the time predicted for it, or now if that has passed."""
        run = self.running.pop(executor)
        self.now_ns = max(self.now_ns, run.started_ns + int(run.predicted_ns * share))
        expected = self.scheduler.pool.running[executor] is run
        waited = {request for request in run.requests if request.queue is not None}
        answered = self.scheduler.finished(run, self.now_ns, max(1, self.now_ns - run.started_ns))
        assert set(answered) >= (set(run.requests) if expected else waited)
        assert set(answered) <= set(run.requests)
        assert not self.scheduler.pool.lost[executor]
        for request in answered:
            self._ends(request, "answered")
        self._check()

    def fail(self, executor: int) -> None:
        """A batch fails."""
        run = self.running.pop(executor)
        self._end(self._of(run, self.scheduler.failed(run, self.now_ns, "incident")))
        assert not self.scheduler.pool.lost[executor]
        self._check()

    def lose(self, executor: int) -> None:
        """An executor dies, with what it runs."""
        run = self.running.pop(executor, None)
        self.dead.add(executor)
        ends = self.scheduler.lost(executor, self.now_ns, "incident")
        self._end(ends if run is None else self._of(run, ends))
        self._check()

    def regain(self, executor: int) -> None:
        """A dead executor is back."""
        self.dead.discard(executor)
        self.scheduler.regained(executor)

    def cancel(self, number: int) -> None:
        """A client goes away."""
        request = self.requests[number]
        waited = request.queue is not None
        assert self.scheduler.cancelled(request) == waited
        if waited:
            self._ends(request, "cancelled")
        else:
            self._gone.add(number)
        self._check()

    def set_state(self, name: str, variant: str, state: State) -> None:
        """An operator or the audit changes what may run."""
        model = self._model(name)
        if variant in model.states:
            self.scheduler.set_states(model.key, {**model.states, variant: state})
            self._check()

    def reload(self, name: str) -> None:
        """A model is replaced; the old one goes once it has answered everybody."""
        key = self._keys[name]
        self.scheduler.retire_model(key)
        self._add(key._replace(load=key.load + 1))
        self.tidy()

    def tidy(self) -> None:
        """Let replaced models go of which nothing is left."""
        needed = {self.requests[number].model for number in self.open} | set(self._keys.values())
        for key in list(self.scheduler.models):
            if key not in needed and not self.scheduler.runs(key):
                self.scheduler.remove_model(key)

    def drain(self) -> None:
        """Everything goes well from now on and nobody comes: all who wait must end, and nothing may stay behind."""
        for executor in sorted(self.dead):
            self.regain(executor)
        for _ in range(10 * len(self.open) + 10):
            self.settle()
            if self.running:
                self.finish(
                    min(self.running, key=lambda e: self.running[e].started_ns + self.running[e].predicted_ns), 1
                )
            elif self.open:
                self.follow()
        assert not self.open, f"never ended: {self.open}"
        self.tidy()
        assert set(self.scheduler.models) == set(self._keys.values())
        assert (self.scheduler.waiting, self.scheduler.waiting_bytes, self.scheduler.busy_executors) == (0, 0, 0)
        assert self.scheduler.next_event_ns(self.now_ns) is None

    def _add(self, key: ModelKey) -> None:
        place = "mn".index(key.name)
        self._keys[key.name] = key
        self.scheduler.add_model(ModelQueue(key, self.setup.families[place], self.setup.delays_ms[place] * MS))

    def _model(self, name: str) -> ModelQueue:
        return self.scheduler.models[self._keys[name]]

    def _tick(self) -> None:
        self._end(self.scheduler.tick(self.now_ns))

    def _of(self, run: Run, ends: list[End]) -> list[End]:
        assert all(end.request in run.requests and end.outcome is Outcome.FAILED for end in ends)
        return ends

    def _end(self, ends: Iterable[End]) -> None:
        for end in ends:
            could_wait = end.request.deadline_ns > end.request.arrival_ns and end.request.number not in self._gone
            if end.outcome is Outcome.EXPIRED and self._drains and could_wait:
                model = self.scheduler.models[end.request.model]
                assert not in_time(model, end.request, self.now_ns), f"{end.request.number} was given up too early"
            self._ends(end.request, end.outcome.value)

    def _ends(self, request: Request, how: str) -> None:
        number = request.number
        assert number not in self.ended, f"request {number} ended twice: {self.ended[number]}, then {how}"
        assert request.queue is None, f"request {number} ended ({how}) and still waits"
        self.ended[number] = how
        self.log.append((self.now_ns, number, how))

    def _start(self, run: Run) -> None:
        self.log.append((replace(run, requests=()), [request.number for request in run.requests]))
        model, members = self.scheduler.models[run.model], run.requests
        used = model.variants[run.place]
        assert run.executor in self.idle
        assert (run.started_ns, run.variant) == (self.now_ns, used.name)
        assert run.samples == sum(request.samples for request in members) <= model.latency.max_batch_size(run.place)
        assert len({(request.model, request.shape, request.step, request.late) for request in members}) == 1
        assert len(members) == 1 or (used.batchable and not any(self._tries[r.number] for r in members))
        assert run.predicted_ns == model.latency.predict_ns(run.place, run.samples, members[0].step)
        for request in members:
            number = request.number
            assert number not in self.ended
            assert number not in self._gone, f"request {number} runs again though its client has gone"
            assert self._tries[number] < 2, f"request {number} is tried a third time"
            self._tries[number] += 1
            pinned = self.asks[number].slo.variant is not None
            assert model.states[used.name] is State.ELIGIBLE or (pinned and model.states[used.name] != State.DISABLED)
            assert may_answer(used, self.asks[number]), f"request {number} runs on {used.name}, which it does not allow"
        if members[0].late:
            self._check_late(run, model)
        elif self._drains:
            assert self.now_ns + run.predicted_ns + REPLY_RESERVE_NS <= min(r.deadline_ns for r in members)
        self.running[run.executor] = run

    def _check_late(self, run: Run, model: ModelQueue) -> None:
        """Late work goes where nobody can be in time, or as seldom as promised; and it costs nobody the deadline."""
        feasible = list(self._feasible())
        if model.retired or not self._drains:
            return
        free_ns = min([self.now_ns + run.predicted_ns, *self.scheduler.pool.free_ns(self.now_ns, but=run.executor)])
        for other, request in feasible:
            assert in_time(other, request, free_ns), f"late work costs request {request.number} its deadline"
        if any(not other.max_queue_delay_ns for other, _ in feasible):
            assert self.now_ns >= self._late_again_ns, "late work goes first again too soon"
            assert self.now_ns >= run.requests[0].deadline_ns + _AGED_NS, "late work goes first too young"
            self._late_again_ns = self.now_ns + _LATE_SHARE * run.predicted_ns

    def _check_idleness(self) -> None:
        """An executor idles only beside what it could not answer in time, or what waits for its batch to grow."""
        wake_ns = self.scheduler.next_event_ns(self.now_ns)
        held = list(self._feasible())
        for model, request in held:
            assert model.max_queue_delay_ns, f"an executor idles beside request {request.number}"
            assert wake_ns is not None
            assert self.now_ns < wake_ns <= request.arrival_ns + model.max_queue_delay_ns
            assert in_time(model, request, wake_ns), f"the delay costs request {request.number} its deadline"
            assert model.regular.samples < max(v.profile.max_batch_size for v in model.variants if v.profile)
        if not held:
            assert not any(model.late for model in self.scheduler.models.values()), "an executor idles beside late work"

    def _feasible(self) -> Iterator[tuple[ModelQueue, Request]]:
        """Who waits and could be answered in time by the executor that has just decided."""
        for model in self.scheduler.models.values():
            for queue in model.queues.values():
                for _, _, request in queue.entries:
                    if in_time(model, request, self.now_ns):
                        yield model, request

    def _check(self) -> None:
        """Everybody who has not ended waits or runs; what waits is counted, in order and within the bounds."""
        at_work = {request.number for run in self.running.values() for request in run.requests}
        for number in self.open:
            assert self.requests[number].queue is not None or number in at_work, f"request {number} was forgotten"
        for model in self.scheduler.models.values():
            waiting = [*_entries(model.regular, late=False), *_entries(model.late, late=True)]
            assert all(request.model == model.key and request.number not in self.ended for request in waiting)
            assert sum(map(len, model._by_deadline.values())) == len(waiting) == model.waiting
            assert all(model._by_deadline.values())
            new = [request for request in waiting if not self._tries[request.number]]
            late_bytes = [request.size_bytes for request in new if request.late]
            assert len(new) <= self.setup.max_requests
            assert sum(request.size_bytes for request in new) <= self.setup.max_bytes
            assert len(late_bytes) <= max(1, self.setup.max_requests // 2)
            assert len(late_bytes) < 2 or sum(late_bytes) <= self.setup.max_bytes // 2


def _entries(waiting: Waiting, *, late: bool) -> list[Request]:
    """All who wait; raises AssertionError where the four orders disagree or something empty is kept."""
    found = [request for queue in waiting.queues.values() for _, _, request in queue.entries]
    of_classes = [request for each in waiting.classes.values() for _, _, request in each.entries]
    assert sorted(request.number for request in found) == sorted(request.number for request in of_classes)
    assert all(waiting.queues.values())
    assert all(waiting.classes.values())
    assert all(waiting.by_shape.values())
    shaped = {(allowed, shape): queue for shape, each in waiting.by_shape.items() for allowed, queue in each.items()}
    assert shaped == waiting.queues
    for queue in (*waiting.queues.values(), *waiting.classes.values()):
        places = [entry[:2] for entry in queue.entries]
        assert places == sorted(places)
        assert queue.samples == sum(request.samples for _, _, request in queue.entries)
    for (allowed, step), each in waiting.classes.items():
        assert each.shapes == len({r.queue_key for _, _, r in each.entries})
        assert {(request.allowed, request.step) for _, _, request in each.entries} == {(allowed, step)}
    assert all(request.queue is waiting.queues[request.queue_key] and request.late is late for request in found)
    assert len(waiting) == len(found)
    assert waiting.samples == sum(request.samples for request in found)
    assert waiting.size_bytes == sum(request.size_bytes for request in found)
    return found


def in_time(model: ModelQueue, request: Request, start_ns: int) -> bool:
    """Whether a variant that is still open to the request would answer it in time, started then where it was asked."""
    latency = model.latency
    return any(
        start_ns + latency.predict_ns(place, request.samples, request.step) + REPLY_RESERVE_NS <= request.deadline_ns
        for place, each in enumerate(model.variants)
        if request.allowed >> place & 1
        and model.states[each.name] is not State.DISABLED
        and request.samples <= latency.max_batch_size(place)
    )


def may_answer(used: Variant, ask: Ask) -> bool:
    """Whether a variant satisfies what was asked, from its proven bounds; a soft floor only where it may be left."""
    slo = ask.slo
    if slo.variant is not None:
        return used.name == slo.variant
    floor, drop, hard = slo.min_accuracy, slo.max_accuracy_drop, slo.hard is not False
    if floor is None and drop is None:
        drop, hard = DEFAULTS.max_accuracy_drop, slo.hard is True
    low = used.score.low if used.score else 0.0
    most = 0.0 if used.name == REFERENCE else used.drop.high if used.drop else 1.0
    kept = (floor is None or low >= floor) and (drop is None or most <= drop)
    if kept and drop == 0:
        kept = used.name == REFERENCE
    return kept or (not hard and OnInfeasible.DEGRADE in _actions(ask))


def _actions(ask: Ask) -> tuple[OnInfeasible, ...]:
    """What is tried before the refusal."""
    actions = ask.slo.on_infeasible
    if actions is None:
        unnamed = ask.slo.latency_ns is None and ask.rpc_ms is None
        return (OnInfeasible.DEGRADE, OnInfeasible.LATE) if unnamed else ()
    return actions[: actions.index(OnInfeasible.REJECT)] if OnInfeasible.REJECT in actions else actions
