"""Proteus (ASPLOS'24): a variant for each executor, planned anew in every period, and batches that wait to fill up.

Its data path ("accscale" in the released simulator) does not conserve work. Every executor has its own queue. A batch
waits until it is full or until the head's deadline leaves just the time to run it; a newcomer that would make the head
late lets the batch run without it. Where that instant passed while the executor was busy, the queue runs as it stands.
For the control path see `proteus_plan`; its demand is an exponential average (the code's com = 0.7, for bursts) of
windows of one second.

Adapted: which executor's queue a request is in follows from its number and the plan, so a new plan (and the loss of an
executor) moves those who wait; the code leaves them. A full batch runs at once; the code waits for one more. The first
plans are made after 0.1 s and 1 s. Switching variants is free, as it is in the simulator. A request whose variants no
executor serves runs on its fastest one. With early drop, heads that would be late in the batch which the queue makes
are always dropped; the code drops them on arrivals, but not when the queue runs as it stands.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.batches import fastest_for, largest, lines, may_run, needed_ns
from server.scheduling.policies.proteus_plan import Plan, make_plan
from server.scheduling.policy import Choice, Decision, Moment, Run
from server.scheduling.slo import Request

_WINDOW_NS = 1_000_000_000
_FIRST_NS = 100_000_000
_GAIN = 1 / (1 + 0.7)
_NEGLIGIBLE = 0.1  # samples per second


class Proteus:
    """Plans with this period."""

    admits = False

    def __init__(self, period_ns: int, *, early_drop: bool) -> None:
        self._period_ns = period_ns
        self._early_drop = early_drop
        self._window_ns: int | None = None
        self._counts: Counter[int] = Counter()
        self._average: dict[int, float] = {}
        self._demand: dict[int, float] = {}
        self._planned_ns = 0
        self._plans: dict[int, Plan] = {}
        self._last_ns: dict[int, int] = {}

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:  # noqa: ARG002
        """Measure the demand; a plan is due after every period, and soon after the start."""
        if self._window_ns is None:
            self._window_ns = now_ns
        elapsed_ns = now_ns - self._window_ns
        if elapsed_ns >= _WINDOW_NS:
            first = not self._average
            self._close_window(elapsed_ns // _WINDOW_NS)
            self._window_ns += elapsed_ns // _WINDOW_NS * _WINDOW_NS
            if first or now_ns - self._planned_ns >= self._period_ns:
                self._plan_for(self._average, now_ns)
        elif not self._average and not self._demand and elapsed_ns >= _FIRST_NS:
            self._plan_for({allowed: count * 1e9 / elapsed_ns for allowed, count in self._counts.items()}, now_ns)
        self._counts[request.allowed] += request.samples

    def finished(self, model: ModelQueue, run: Run, compute_ns: int, now_ns: int) -> None:  # noqa: ARG002
        """Remember which executors there are."""
        self._last_ns[run.executor] = now_ns

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        """The batch of this executor's queue, if it waits no longer."""
        plan = self._plan(model, len(moment.others_free_ns) + 1)
        place = self._place(moment.executor, len(plan.variants))
        given_up: list[Request] = []
        wakes_ns: list[int] = []
        for line in lines(model):
            queue = [request for request in line if plan.executor(request) == place]
            decision = self._next_batch(model, queue, plan.variants[place], moment.now_ns)
            given_up += decision.give_up
            if decision.choice is not None:
                return Decision(decision.choice, tuple(given_up))
            if decision.wake_ns is not None:
                wakes_ns.append(decision.wake_ns)
        if given_up:
            wakes_ns.append(moment.now_ns + 1)  # they may come back on other variants
        return Decision(None, tuple(given_up), min(wakes_ns, default=None))

    def _next_batch(self, model: ModelQueue, queue: Sequence[Request], planned: int, now_ns: int) -> Decision:
        """What becomes of the queue of one shape: the batch that runs now, or until when it waits."""
        given_up: list[Request] = []
        for head in queue:
            variant = planned if may_run(model, planned, head) else fastest_for(model, head)
            if variant is None or not largest(model, variant, head, now_ns):
                given_up.append(head)
                continue
            batch, full = _batch(model, variant, head, [r for r in queue if r is not head and r not in given_up])
            latest_ns = head.deadline_ns - _needed_ns(model, variant, batch)
            if now_ns < latest_ns and not full:
                return Decision(None, tuple(given_up), latest_ns)
            if now_ns > latest_ns and len(batch) > 1 and not full:
                without_ns = _needed_ns(model, variant, batch[:-1])
                batch = batch[:-1] if now_ns + without_ns <= head.deadline_ns else batch
            if self._early_drop and now_ns + _needed_ns(model, variant, batch) > head.deadline_ns:
                given_up.append(head)
                continue
            samples = sum(request.samples for request in batch)
            predicted_ns = model.latency.predict_ns(variant, samples, head.step)
            return Decision(Choice(variant, tuple(batch), samples, predicted_ns, "policy"), tuple(given_up))
        return Decision(None, tuple(given_up))

    def _plan_for(self, demand: dict[int, float], now_ns: int) -> None:
        self._demand = {allowed: rate for allowed, rate in demand.items() if rate >= _NEGLIGIBLE}
        self._planned_ns = now_ns
        self._plans.clear()

    def _plan(self, model: ModelQueue, executors: int) -> Plan:
        if executors not in self._plans:
            self._plans[executors] = make_plan(model, self._demand, executors)
        return self._plans[executors]

    def _close_window(self, windows: int) -> None:
        """Average in the counts of a window, and the empty windows after it."""
        for allowed in {*self._counts, *self._average}:
            rate = self._counts[allowed] * 1e9 / _WINDOW_NS
            average = self._average.get(allowed, rate)
            self._average[allowed] = (average + _GAIN * (rate - average)) * (1.0 - _GAIN) ** (windows - 1)
        self._counts.clear()

    def _place(self, executor: int, executors: int) -> int:
        """Which executor of the plan this is: executors are known by number, or else by having finished last."""
        known = dict.fromkeys(range(executors), -1) | self._last_ns
        others = sorted((number for number in known if number != executor), key=lambda number: -known[number])
        return sorted([executor, *others[: executors - 1]]).index(executor)


def _batch(model: ModelQueue, variant: int, head: Request, others: Sequence[Request]) -> tuple[list[Request], bool]:
    """The head and who joins it, and whether the batch is full."""
    if not model.variants[variant].batchable:
        return [head], True
    most = max(head.samples, model.throughput_batch(variant))
    batch, samples = [head], head.samples
    for request in others:
        if samples >= most:
            break
        if not may_run(model, variant, request):
            continue
        if samples + request.samples > most:
            return batch, True
        batch.append(request)
        samples += request.samples
    return batch, samples >= most


def _needed_ns(model: ModelQueue, variant: int, batch: Sequence[Request]) -> int:
    return needed_ns(model, variant, sum(request.samples for request in batch), batch[0].step)
