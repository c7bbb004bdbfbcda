"""The decision core's one door: events in, actions out.

Rules: no clock, no IO, no threads; every method takes the instant as an argument and the caller serialises calls.
Every request that `arrived` took ends in exactly one of: an `End` returned from here, a `Run` that the caller reports
as `finished`, a `Run` reported as `failed` (which ends or requeues each of its requests), or `cancelled`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from server.errors import DeadlineMissed, Infeasible, Overloaded, RuntimeFailed, ServingError
from server.scheduling import admission, fitdrain
from server.scheduling.admission import Load
from server.scheduling.fitdrain import Choice
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.slo import ModelKey, OnInfeasible, Outcome, Request
from variants.variant import State

Policy = Callable[[ModelQueue, int, Sequence[int]], Choice]

_LATE_BLOCKS_AT_MOST_NS = 50_000_000


@dataclass(frozen=True, slots=True)
class End:
    """A request ended without running (again)."""

    request: Request
    outcome: Outcome
    error: ServingError


@dataclass(frozen=True, slots=True)
class Run:
    """An executor is to run this batch now."""

    executor: int
    model: ModelKey
    variant: str
    place: int
    requests: tuple[Request, ...]
    samples: int
    predicted_ns: int
    reason: str


class Scheduler:
    """Queues, admission and decisions for every model of the server.

    Invariants: a request waits in at most one queue; a running request waits in none; a batch holds requests of one
    model and one shape; no model's `waiting` and `waiting_bytes` exceed the bounds, but for requests tried again.
    """

    def __init__(self, executors: int, *, max_requests: int, max_bytes: int, policy: Policy = fitdrain.choose) -> None:
        self.models: dict[ModelKey, ModelQueue] = {}
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._policy = policy
        self._free_ns = [0] * executors
        self._running: list[Run | None] = [None] * executors
        self._served_ns = 0
        """How much executor time the model served last had had: where a model that was idle joins the others."""

    @property
    def policy(self) -> Policy:
        """The function that forms batches and chooses variants."""
        return self._policy

    def add_model(self, model: ModelQueue) -> None:
        """Take on a model."""
        self.models[model.key] = model

    def retire_model(self, key: ModelKey) -> None:
        """Nothing more will arrive for a model: so that it can go, its late work takes turns with everybody's work."""
        model = self.models[key]
        model.retired = True
        model.served_ns = max(model.served_ns, self._served_ns)  # having had to wait earns no credit

    def remove_model(self, key: ModelKey) -> None:
        """Let go of a model of which nothing waits."""
        del self.models[key]

    @property
    def waiting(self) -> int:
        """Requests that wait, over all models."""
        return sum(model.waiting for model in self.models.values())

    @property
    def waiting_bytes(self) -> int:
        """Bytes of the requests that wait, over all models."""
        return sum(model.waiting_bytes for model in self.models.values())

    @property
    def busy_executors(self) -> int:
        """Executors that run a batch."""
        return sum(run is not None for run in self._running)

    def runs(self, key: ModelKey) -> bool:
        """Whether an executor runs a batch of this model."""
        return any(run is not None and run.model == key for run in self._running)

    def arrived(self, request: Request, now_ns: int) -> list[End]:
        """Admit a request or refuse it; others that became hopeless meanwhile may end with it."""
        ended = self.tick(now_ns)
        model = self.models[request.model]
        if request.size_bytes > self._max_bytes:
            error: ServingError | None = Overloaded(f"more bytes than may ever wait here ({self._max_bytes})", None)
        elif model.waiting >= self._max_requests or model.waiting_bytes + request.size_bytes > self._max_bytes:
            error = Overloaded("the queue is full", admission.QUEUE_FULL_RETRY_NS)
        elif request.deadline_ns <= request.arrival_ns and OnInfeasible.LATE not in request.on_infeasible:
            error = DeadlineMissed("the deadline had passed on arrival")
        else:
            error = admission.refusal(model, request, self.load(model, now_ns))
        if not request.late and (error is None or isinstance(error, Overloaded)):  # what can never be met is no traffic
            model.note_arrival(request.samples, max(request.deadline_ns - request.arrival_ns, 1), now_ns)
        if error is None:
            if not model.queues:  # it starts level with the others: neither idleness nor late work earns credit
                model.served_ns = max(model.served_ns, self._served_ns)
            model.add(request)
        else:
            ended.append(End(request, _REFUSALS[type(error)], error))
        return ended

    def cancelled(self, request: Request) -> bool:
        """Forget a waiting request; False when it runs or has ended, and its end will come by itself."""
        request.abandoned = True
        if request.queue is None:
            return False
        self.models[request.model].remove(request)
        return True

    def decide(self, executor: int, now_ns: int) -> Run | None:
        """The batch that this idle executor should run now, if any; call `tick` first and act on what it ends."""
        others_free_ns = [max(free, now_ns) for place, free in enumerate(self._free_ns) if place != executor]
        fairly = sorted(self.models.values(), key=lambda model: (model.served_ns, model.key))
        for model in fairly:
            if model.queues and not self._holds_back(model, now_ns):
                return self._run(executor, model, self._policy(model, now_ns, others_free_ns), now_ns)
            if model.retired and model.late and not model.queues and (choice := _late_batch(model, None)):
                return self._run(executor, model, choice, now_ns)
        held_until_ns = [self._held_until_ns(model, now_ns) for model in fairly if model.queues]
        spare_ns = min((until_ns - now_ns for until_ns in held_until_ns if until_ns is not None), default=None)
        for model in fairly:
            if model.late and (choice := _late_batch(model, spare_ns)):
                return self._run(executor, model, choice, now_ns)
        return None

    def finished(self, run: Run, now_ns: int, compute_ns: int) -> None:
        """A batch was answered after `compute_ns` on its executor."""
        model = self.models[run.model]
        model.latency.observe(run.place, run.samples, compute_ns, now_ns)
        model.served_ns += compute_ns - run.predicted_ns
        self._free(run, now_ns)

    def failed(self, run: Run, now_ns: int, incident: str) -> list[End]:
        """A batch failed: each of its requests is tried once more, alone and rather on another variant, or ends.

        Where no other variant is allowed, only a request that had batch-mates is tried again, on the same variant:
        one of them may have poisoned the batch.
        """
        model = self.models[run.model]
        self._free(run, now_ns)
        model.latency.refresh(now_ns)
        ended = []
        for request in run.requests:
            allowed = request.allowed & model.open_to(request)
            remaining = allowed & ~(1 << run.place) or (allowed if len(run.requests) > 1 else 0)
            quickest_ns = model.quickest_ns(remaining, request.samples)
            latest_ns = request.deadline_ns - REPLY_RESERVE_NS
            hopeless = quickest_ns is None or (now_ns + quickest_ns > latest_ns and not request.late)
            if request.retried or request.abandoned or hopeless:
                ended.append(End(request, Outcome.FAILED, RuntimeFailed(incident)))
            else:
                request.allowed, request.solo, request.retried = remaining, True, True
                model.add(request)
        return ended

    def tick(self, now_ns: int) -> list[End]:
        """Take out what can no longer finish in time, as each request asked for that case."""
        ended = []
        for model in self.models.values():
            model.latency.refresh(now_ns)
            while hopeless := model.hopeless(now_ns):
                for request in hopeless:
                    end = self._gave_up(model, request, now_ns)
                    if end is not None:
                        ended.append(end)
        return ended

    def next_event_ns(self, now_ns: int) -> int | None:
        """When to call `tick` and `decide` again even if nothing happens; None when there will be nothing to do."""
        hopeless_ns = [model.soonest_hopeless_ns() for model in self.models.values()]
        instants = [instant + 1 for instant in hopeless_ns if instant is not None]
        if self.busy_executors < len(self._running):
            held_ns = [self._held_until_ns(model, now_ns) for model in self.models.values() if model.queues]
            instants += [instant for instant in held_ns if instant is not None]
        return max(now_ns, min(instants)) if instants else None

    def set_states(self, key: ModelKey, states: dict[str, State]) -> bool:
        """Change which variants may run; False where the model has gone.

        What waits for a variant that is now disabled ends at the next `tick`.
        """
        model = self.models.get(key)
        if model is not None:
            model.set_states(states)
        return model is not None

    def saturation(self, key: ModelKey, now_ns: int) -> float:
        """0 when idle, 1 when the waiting work takes all the time that requests typically allow."""
        model = self.models[key]
        if not model.waiting and not model.typical_budget_ns:
            return 0.0  # nobody has asked it for anything
        busy_ns = sum(max(0, free - now_ns) for free in self._free_ns) + model.backlog_ns() + model.late_backlog_ns()
        allowed_ns = max(model.typical_budget_ns, 1.0) * len(self._free_ns)
        return min(1.0, busy_ns / allowed_ns)

    def load(self, model: ModelQueue, now_ns: int) -> Load:
        """What a newcomer of this model finds."""
        others = sum(
            other.backlog_ns() + (other.late_backlog_ns() if other.retired else 0)
            for other in self.models.values()
            if other is not model
        )
        return Load(now_ns, self._free_ns, others, self._late_room(model))

    def _run(self, executor: int, model: ModelQueue, choice: Choice, now_ns: int) -> Run:
        for request in choice.requests:
            model.remove(request)
        variant = model.variants[choice.variant].name
        run = Run(
            executor,
            model.key,
            variant,
            choice.variant,
            choice.requests,
            choice.samples,
            choice.predicted_ns,
            choice.reason,
        )
        self._running[executor] = run
        self._free_ns[executor] = now_ns + choice.predicted_ns
        self._served_ns = max(self._served_ns, model.served_ns)
        model.served_ns += choice.predicted_ns  # at once, so that executors that decide together take turns
        return run

    def _free(self, run: Run, now_ns: int) -> None:
        self._running[run.executor] = None
        self._free_ns[run.executor] = now_ns

    def _gave_up(self, model: ModelQueue, request: Request, now_ns: int) -> End | None:
        """A waiting request became hopeless: widen it, make it late, or end it, as it asked."""
        model.remove(request)
        for action in request.on_infeasible:
            if action is OnInfeasible.REJECT:
                break
            if action is OnInfeasible.DEGRADE and request.fallback and not request.retried:
                request.allowed |= request.fallback
                request.fallback = 0
                model.add(request)  # still hopeless? then the next round tries the next action
                return None
            late_room = self._late_room(model)
            has_room = late_room is not None and request.size_bytes <= late_room
            if action is OnInfeasible.LATE and has_room and model.fitting(request.allowed, request.samples):
                request.late = True
                model.add(request)
                return None
        if not model.fitting(request.allowed, request.samples):
            return End(request, Outcome.INFEASIBLE, Infeasible("every variant this request allows was disabled"))
        waited_ms = (now_ns - request.arrival_ns) / 1e6
        error = DeadlineMissed(f"after {waited_ms:.2f} ms in the queue the deadline can no longer be met")
        return End(request, Outcome.EXPIRED, error)

    def _late_room(self, model: ModelQueue) -> int | None:
        """Bytes of late work that may yet be queued: half of each bound, for it would keep out who can be in time.

        One such request may always wait, so that it can be served at all. None where no more requests may.
        """
        if not model.late_waiting:
            return self._max_bytes
        if model.late_waiting >= self._max_requests // 2:
            return None
        return self._max_bytes // 2 - model.late_bytes

    def _holds_back(self, model: ModelQueue, now_ns: int) -> bool:
        held_until_ns = self._held_until_ns(model, now_ns)
        return held_until_ns is not None and now_ns < held_until_ns

    def _held_until_ns(self, model: ModelQueue, now_ns: int) -> int | None:
        """Until when a batch may wait to grow: the configured delay, unless it is full or somebody has no time left."""
        if not model.max_queue_delay_ns:
            return None
        fastest = model.fastest(model.eligible)
        if fastest is None or sum(q.samples for q in model.queues.values()) >= model.latency.max_batch_size(fastest):
            return None
        oldest_ns = min(entry[2].arrival_ns for queue in model.queues.values() for entry in queue.entries)
        full_batch_ns = model.latency.predict_ns(fastest, model.latency.max_batch_size(fastest))
        hopeless_ns = model.soonest_hopeless_ns()
        latest_ns = now_ns if hopeless_ns is None else hopeless_ns - full_batch_ns
        return min(oldest_ns + model.max_queue_delay_ns, latest_ns)


def _late_batch(model: ModelQueue, spare_ns: int | None) -> Choice | None:
    """Late work, oldest first, on the fastest variant and in a batch short enough to hold up nobody for long.

    None when not even its first request could be answered within the time that is to spare.
    """
    (allowed, _), queue = min(model.late.items(), key=lambda item: item[1].entries[0][:2])
    first = queue.first()
    fitting = model.fitting(allowed, first.samples)
    variant = model.fastest(sum(1 << v for v in fitting)) if fitting else None
    if variant is None:
        raise AssertionError("late work without a usable variant must have ended. This is a bug.")
    batch, samples = [first], first.samples
    most_ns = _LATE_BLOCKS_AT_MOST_NS if spare_ns is None else min(_LATE_BLOCKS_AT_MOST_NS, spare_ns)
    most = model.latency.largest_batch(variant, most_ns) if model.variants[variant].batchable else 0
    for _, _, request in queue.entries[1:]:
        if samples + request.samples > most:
            break
        batch.append(request)
        samples += request.samples
    predicted_ns = model.latency.predict_ns(variant, samples)
    if spare_ns is not None and predicted_ns > spare_ns:
        return None
    return Choice(variant, tuple(batch), samples, predicted_ns, "late")


_REFUSALS: dict[type[ServingError], Outcome] = {
    Infeasible: Outcome.INFEASIBLE,
    Overloaded: Outcome.REJECTED,
    DeadlineMissed: Outcome.EXPIRED,
}
