"""The decision core's one door: events in, actions out.

Rules: no clock, no IO, no threads; every method takes the instant as an argument and the caller serialises calls.
Every request that `arrived` took ends in exactly one of: an `End` returned from here, a `Run` that the caller reports
as `finished`, a `Run` reported as `failed` (which ends or requeues each of its requests), or `cancelled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from server.errors import DeadlineMissed, Infeasible, Overloaded, RuntimeFailed, ServingError
from server.scheduling import admission
from server.scheduling.admission import Load
from server.scheduling.ends import End, give_up, second_chance
from server.scheduling.late import LATE_PAUSE, aged_late_batch, late_batch, late_room
from server.scheduling.latency import Spot
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policy import Choice, Moment, Policy, Run
from server.scheduling.pool import Pool
from server.scheduling.slo import ModelKey, Outcome, Request
from server.scheduling.turns import held_until_ns, in_turn, load_of, rivals
from variants.variant import State

__all__ = ["End", "Run", "Scheduler"]


class Scheduler:
    """Queues, admission and decisions for every model of the server.

    Invariants: a request waits in at most one queue; a running request waits in none; a batch holds requests of one
    model and one shape; no model's `waiting` and `waiting_bytes` exceed the bounds, but for requests tried again.
    """

    def __init__(
        self, executors: int, *, max_requests: int, max_bytes: int, policy: Callable[[], Policy] = FitDrain
    ) -> None:
        self.models: dict[ModelKey, ModelQueue] = {}
        self.pool = Pool(executors)
        self._max_requests = max_requests
        self._max_bytes = max_bytes
        self._make_policy = policy
        self._policies: dict[ModelKey, Policy] = {}
        self._wakes_ns: dict[ModelKey, dict[int, int]] = {}
        """When a policy that chose to wait wants to be asked again, by the executor that it let wait."""
        self._hoped: dict[int, list[Request]] = {}
        """Of executors that seem stuck or have just failed, the requests that can be answered by nobody else."""
        self._ended: list[End] = []
        """Who ended and was not handed over yet: it outlives an exception, and goes out with the next call."""
        self._late_again_ns = 0
        """Until when no late work goes first."""
        self._served_ns = 0
        """How much executor time the model served last had had: where a model that was idle joins the others."""

    def policy(self, key: ModelKey) -> Policy:
        """What forms a model's batches and chooses among its variants."""
        return self._policies[key]

    def add_model(self, model: ModelQueue) -> None:
        """Take on a model."""
        model.latency.set_executors(len(self.pool))
        self.models[model.key] = model
        self._policies[model.key] = self._make_policy()

    def retire_model(self, key: ModelKey) -> None:
        """Nothing more will arrive for a model: so that it can go, its late work takes turns with everybody's work."""
        model = self.models[key]
        model.retired = True
        model.served_ns = max(model.served_ns, self._served_ns)  # having had to wait earns no credit

    def remove_model(self, key: ModelKey) -> None:
        """Let go of a model of which nothing waits."""
        del self.models[key]
        del self._policies[key]
        self._wakes_ns.pop(key, None)

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
        return self.pool.busy

    def runs(self, key: ModelKey) -> bool:
        """Whether an executor runs a batch of this model."""
        return any(run is not None and run.model == key for run in self.pool.running)

    def arrived(self, request: Request, now_ns: int) -> list[End]:
        """Admit a request or refuse it; others that became hopeless meanwhile may end with it."""
        self._tick(now_ns)
        model = self.models[request.model]
        error = self._refusal(model, request, now_ns)
        is_possible = error is None or (isinstance(error, Overloaded) and request.size_bytes <= self._max_bytes)
        if is_possible and not request.late:  # what can never be met is no traffic
            budget_ns = max(request.deadline_ns - request.arrival_ns, 1)
            model.note_arrival(request.samples, budget_ns, now_ns, request.step)
        if error is not None:
            self._ended.append(End(request, _REFUSALS[type(error)], error))
            return self._hand_over()
        if not request.late:
            model.forecast.spread.judged(mistake=False)
            model.patience.arrived(request, now_ns)
        if not model.queues:  # it starts level with the others: neither idleness nor late work earns credit
            model.served_ns = max(model.served_ns, self._served_ns)
        model.add(request)
        self._policies[model.key].arrived(model, request, now_ns)
        return self._hand_over()

    def _refusal(self, model: ModelQueue, request: Request, now_ns: int) -> ServingError | None:
        if request.size_bytes > self._max_bytes:
            return Overloaded(f"more bytes than may ever wait here ({self._max_bytes})", None)
        if model.waiting >= self._max_requests or model.waiting_bytes + request.size_bytes > self._max_bytes:
            drained_ns = model.backlog_ns() // len(self.pool)
            return Overloaded("the queue is full", max(drained_ns, admission.QUEUE_FULL_RETRY_NS))
        if request.deadline_ns <= request.arrival_ns and not request.may_be_late:
            return DeadlineMissed("the deadline had passed on arrival")
        load = self.load(model, now_ns)
        if self._policies[model.key].admits:
            error = admission.refusal(model, request, load)
            if isinstance(error, Overloaded) and not request.late:
                model.missed(request)
            return error
        error = admission.why_not(model, request, request.allowed, load)
        return error if isinstance(error, Infeasible) else None

    def cancelled(self, request: Request) -> bool:
        """Forget a waiting request; False when it runs or has ended, and its end will come by itself."""
        request.abandoned = True
        if request.queue is None:
            return False
        self.models[request.model].remove(request)
        return True

    def decide(self, executor: int, now_ns: int) -> tuple[Run | None, list[End]]:
        """The batch that this idle executor should run now, if any, and who was given up for it.

        Call `tick` first and act on what it ends.
        """
        run = self._decide(executor, now_ns)
        return run, self._hand_over()

    def _decide(self, executor: int, now_ns: int) -> Run | None:
        here, (_, crowd) = self.pool.spot(executor, now_ns), self.pool.spots(now_ns)
        self._refresh(now_ns, here, crowd)
        others_free_ns = self.pool.free_ns(now_ns, but=executor)
        waiting = in_turn(self.models.values(), now_ns)
        for model in waiting:
            if model.retired and model.late and not model.queues and (choice := late_batch(model, None)):
                return self._run(executor, model, choice, here, now_ns)
            if not model.queues or self._holds_back(model, now_ns):
                continue
            others = [other for other in self.models.values() if other is not model]
            busy = load_of(others, now_ns, len(others_free_ns) + 1)
            moment = Moment(now_ns, executor, others_free_ns, rivals(model, others), others, busy)
            if now_ns >= self._late_again_ns and (aged := aged_late_batch(model, waiting, moment)):
                self._late_again_ns = now_ns + LATE_PAUSE * aged[1].predicted_ns
                return self._run(executor, *aged, here, now_ns)
            decision = self._policies[model.key].decide(model, moment)
            self._give_up(model, decision.give_up, now_ns)
            if decision.choice is not None:
                return self._run(executor, model, decision.choice, here, now_ns)
            if decision.wake_ns is not None:
                self._wakes_ns.setdefault(model.key, {})[executor] = decision.wake_ns
        late = self._late(waiting, now_ns)
        return self._run(executor, *late, here, now_ns) if late else None

    def _late(self, waiting: Sequence[ModelQueue], now_ns: int) -> tuple[ModelQueue, Choice] | None:
        """Late work for an executor that has nothing else to do, short enough not to hold up what is held back."""
        asks_ns = [self._asks_again_ns(model, now_ns) for model in waiting if model.queues]
        spare_ns = min((instant - now_ns for instant in asks_ns if instant is not None), default=None)
        for model in waiting:
            if model.late and (choice := late_batch(model, spare_ns)):
                return model, choice
        return None

    def finished(self, run: Run, now_ns: int, compute_ns: int) -> Sequence[Request]:
        """A batch was answered after `compute_ns`; returns the requests whose answers count.

        Of a batch whose executor had been given up on, these are the ones that had to wait for it all the same, those
        that still wait to be tried again, and those whose second executor seems stuck as well.
        """
        answered: Sequence[Request] = run.requests
        if not self.pool.end(run, now_ns):
            answered = [request for request in run.requests if self._withdraw(request)]
            self._hoped.pop(run.executor, None)
        model = self.models.get(run.model)
        if model is not None:
            spot, step = Spot(run.busy, run.slowdown), run.requests[0].step
            ratio = model.latency.observe(run.place, run.samples, compute_ns, now_ns, spot, step)
            self.pool.observe(run, ratio, now_ns)
            model.served_ns += compute_ns - run.predicted_ns
            self._policies[run.model].finished(model, run, compute_ns, now_ns)
        return answered

    def _withdraw(self, request: Request) -> bool:
        """Take out a request that waits, in a queue or for a stuck executor; False if it does neither."""
        if request.queue is not None:
            self.models[request.model].remove(request)
            return True
        hoping = next((hoped for hoped in self._hoped.values() if request in hoped), None)
        if hoping is not None:
            hoping.remove(request)
        return hoping is not None

    def failed(self, run: Run, now_ns: int, incident: str) -> list[End]:
        """A batch failed: each of its requests is tried once more, alone and rather on another variant, or ends.

        Where no other variant is allowed, only a request that had batch-mates is tried again, on the same variant:
        one of them may have poisoned the batch.
        """
        try:
            if self.pool.end(run, now_ns):
                self._try_again(run, now_ns, blames_variant=True)
        finally:
            self._end_hoped(run.executor, incident)
        return self._hand_over()

    def lost(self, executor: int, now_ns: int, incident: str) -> list[End]:
        """An executor died, until it is `regained`; its requests are tried once more."""
        run = self.pool.lose(executor)
        try:
            if run is not None:  # else it was idle, or had been given up on
                self._try_again(run, now_ns, blames_variant=False)
        finally:
            self._end_hoped(executor, incident)
        return self._hand_over()

    def _end_hoped(self, executor: int, incident: str) -> None:
        hoped = self._hoped.pop(executor, ())
        self._ended += [End(request, Outcome.FAILED, RuntimeFailed(incident)) for request in hoped]

    def regained(self, executor: int) -> None:
        """A lost executor is back."""
        self.pool.regain(executor)

    def _try_again(self, run: Run, now_ns: int, *, blames_variant: bool) -> None:
        """Requeue whom that may help; the others, and after an exception all who are left, hope for the executor."""
        hoped = self._hoped[run.executor] = list(run.requests)
        model = self.models[run.model]
        model.latency.refresh(now_ns, *self.pool.spots(now_ns))
        for request in run.requests:
            room = self._late_room(model)
            if second_chance(model, request, run, now_ns, room, blames_variant=blames_variant):
                hoped.remove(request)

    def tick(self, now_ns: int) -> list[End]:
        """Take out what can no longer finish in time, as each request asked for that case."""
        self._tick(now_ns)
        return self._hand_over()

    def _tick(self, now_ns: int) -> None:
        self._give_up_overdue(now_ns)
        self._expire_hoped(now_ns)
        self._refresh(now_ns, *self.pool.spots(now_ns))
        for model in self.models.values():
            while hopeless := model.hopeless(now_ns):
                self._give_up(model, hopeless, now_ns)

    def _hand_over(self) -> list[End]:
        ended, self._ended = self._ended, []
        return ended

    def _expire_hoped(self, now_ns: int) -> None:
        """Who waits for a stuck executor in vain ends at the deadline, unless it is late already.

        Where that was the second try, who may be late goes on waiting; at the first there was no room for late work, or
        nothing left to try it on.
        """
        for requests in self._hoped.values():
            for request in [each for each in requests if each.abandoned or _has_expired(each, now_ns)]:
                if request.retried and request.may_be_late and not request.abandoned:
                    request.late = True
                    continue
                requests.remove(request)
                error = DeadlineMissed("the executor that ran it did not come back in time")
                self._ended.append(End(request, Outcome.EXPIRED, error))

    def _give_up_overdue(self, now_ns: int) -> None:
        """Try again what an executor that seems stuck took along; what cannot be tried goes on waiting for it."""
        for executor in self.pool.overdue(now_ns):
            run = self.pool.lose(executor)
            if run is not None:
                self._try_again(run, now_ns, blames_variant=False)

    def next_event_ns(self, now_ns: int) -> int | None:
        """When to call `tick` and `decide` again even if nothing happens; None when there will be nothing to do."""
        self._refresh(now_ns, *self.pool.spots(now_ns))
        hopeless_ns = [model.soonest_hopeless_ns() for model in self.models.values()]
        hoped_ns = [each.deadline_ns for requests in self._hoped.values() for each in requests if not each.late]
        soonest = (*hopeless_ns, *hoped_ns, self.pool.soonest_loss_ns())
        instants = [instant + 1 for instant in soonest if instant is not None]
        if self.pool.idle:
            asks_ns = [self._asks_again_ns(model, now_ns) for model in self.models.values() if model.queues]
            instants += [instant for instant in asks_ns if instant is not None]
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
        free_ns = self.pool.all_free_ns(now_ns)
        busy_ns = sum(free - now_ns for free in free_ns) + model.backlog_ns() + model.late_backlog_ns()
        return min(1.0, busy_ns / (max(model.typical_budget_ns, 1.0) * len(free_ns)))

    def load(self, model: ModelQueue, now_ns: int) -> Load:
        """What a newcomer of this model finds."""
        model.latency.refresh(now_ns, *self.pool.spots(now_ns))
        others = [other for other in self.models.values() if other is not model]
        backlog_ns = sum(
            other.backlog_ns() + (other.late_backlog_ns() if other.retired else 0) for other in others if other.waiting
        )
        free_ns = self.pool.all_free_ns(now_ns)
        return Load(now_ns, free_ns, backlog_ns, self._late_room(model), others, self._served_ns)

    def _refresh(self, now_ns: int, here: Spot, crowd: Spot) -> None:
        for model in self.models.values():
            model.latency.refresh(now_ns, here, crowd)

    def _run(self, executor: int, model: ModelQueue, choice: Choice, spot: Spot, now_ns: int) -> Run:
        for request in choice.requests:
            model.remove(request)
        run = Run(
            executor=executor,
            model=model.key,
            variant=model.variants[choice.variant].name,
            place=choice.variant,
            requests=choice.requests,
            samples=choice.samples,
            predicted_ns=choice.predicted_ns,
            reason=choice.reason,
            started_ns=now_ns,
            busy=spot.busy,
            slowdown=spot.slowdown,
            passed_over=choice.passed_over,
        )
        self.pool.start(run)
        self._wakes_ns.get(model.key, {}).pop(executor, None)
        self._served_ns = max(self._served_ns, model.served_ns)
        model.served_ns += choice.predicted_ns  # at once, so that executors that decide together take turns
        return run

    def _give_up(self, model: ModelQueue, requests: Iterable[Request], now_ns: int) -> None:
        for request in requests:
            end = give_up(model, request, now_ns, self._late_room(model))
            if end is not None:
                self._ended.append(end)

    def _late_room(self, model: ModelQueue) -> int | None:
        return late_room(model, self._max_requests, self._max_bytes)

    def _asks_again_ns(self, model: ModelQueue, now_ns: int) -> int | None:
        """When to look at what a model has waiting again: what is held back, and what its policy lets wait."""
        instants = (held_until_ns(model, now_ns), *self._wakes_ns.get(model.key, {}).values())
        return min((instant for instant in instants if instant is not None and instant > now_ns), default=None)

    def _holds_back(self, model: ModelQueue, now_ns: int) -> bool:
        until_ns = held_until_ns(model, now_ns)
        return until_ns is not None and now_ns < until_ns


def _has_expired(request: Request, now_ns: int) -> bool:
    """Whether an answer is of no use any more."""
    return now_ns > request.deadline_ns and not request.late


_REFUSALS: dict[type[ServingError], Outcome] = {
    Infeasible: Outcome.INFEASIBLE,
    Overloaded: Outcome.REJECTED,
    DeadlineMissed: Outcome.EXPIRED,
}
