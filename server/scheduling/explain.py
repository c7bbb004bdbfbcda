"""Which variant a request would get at this moment, why not each of the others, and what it would take for them.

The question is put to the very policy that decides: the request is queued behind those who wait, what goes first of its
model is played forward, and everything is put back. Other models stay as they are: the policy makes room for them, but
their batches are not played. For the variants that are passed over for the sake of others the policy is asked again at
lower rates of arrival.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass

from server.errors import Infeasible
from server.scheduling.admission import Defaults, Load, make_request, meets_floor, refusal, with_floor
from server.scheduling.forecast import ArrivalForecast
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Choice, Moment, PassedOver, Policy
from server.scheduling.slo import Request, Slo
from server.scheduling.turns import load_of, rivals
from variants.variant import State, Variant

_ANY_SHAPE = ("explain",)
_NEWEST = 1 << 62
"""The number of a request that came after all others."""
_RATE_STEPS = 10
_MOST_BATCHES = 32
"""How many batches are played forward until it is the request's turn."""


@dataclass(frozen=True, slots=True)
class Standing:
    """One variant's standing for an SLO. `latency_ns` is predicted for one sample on an idle executor, if measured."""

    variant: str
    allowed: bool
    why: str
    latency_ns: int | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """The variant that would answer, or None and the reason for the refusal; then every variant's standing."""

    variant: str | None
    reason: str
    standings: tuple[Standing, ...]


@dataclass(frozen=True, slots=True)
class _Question:
    """What is asked: a request for one sample, as long as most of those that wait, if any do."""

    slo: Slo
    budget_ns: int
    usual: Request | None
    now_ns: int

    @property
    def step(self) -> int:
        """The step of its length."""
        return 0 if self.usual is None else self.usual.step


@dataclass(frozen=True, slots=True)
class _Answer:
    """What became of the request, and the more accurate variants that were passed over for it."""

    variant: str | None
    reason: str
    passed_over: dict[int, PassedOver]
    most_rate: dict[int, float]
    """For variants passed over for what is to come: the arrivals per second up to which they would be chosen."""


def explain(
    model: ModelQueue, variants: Sequence[Variant], slo: Slo, defaults: Defaults, load: Load, policy: Policy
) -> Explanation:
    """What would happen to a request for one sample that arrived now. Raises NotFound for an unknown pinned variant."""
    slo = with_floor(slo, defaults)
    budget_ns = slo.latency_ns if slo.latency_ns is not None else defaults.latency_ns
    question = _Question(slo, budget_ns, _usual(model), load.now_ns)
    answer = _ask(model, question, defaults, load, policy)
    places = {variant.name: place for place, variant in enumerate(model.variants)}
    standings = [_standing(model, places.get(v.name), v, question, answer) for v in variants]
    return Explanation(answer.variant, answer.reason, tuple(standings))


def _ask(model: ModelQueue, question: _Question, defaults: Defaults, load: Load, policy: Policy) -> _Answer:
    usual = question.usual
    try:
        request = make_request(
            model,
            question.slo,
            defaults,
            number=_NEWEST,
            samples=1,
            size_bytes=0,
            shape=_ANY_SHAPE if usual is None else usual.shape,  # as it may share a batch with the others
            arrival_ns=load.now_ns,
            length=model.latency.longest(question.step),
        )
    except Infeasible as error:
        return _Answer(None, str(error), {}, {})
    refused = refusal(model, request, load) if policy.admits else None
    if refused is not None:
        return _Answer(None, str(refused), {}, {})
    if request.late:
        fastest = model.fastest(request.allowed)
        return _Answer(None if fastest is None else model.variants[fastest].name, "late", {}, {})
    with _rehearsal(model, request, load, policy) as rehearsal:
        return _rehearsed(rehearsal, request)


def _usual(model: ModelQueue) -> Request | None:
    """One of those whose shape most of what waits has; None where nobody waits, or the first is to run alone."""
    waiting = max(model.queues.values(), key=lambda queue: queue.samples, default=None)
    return None if waiting is None or waiting.first().solo else waiting.first()


def _rehearsed(rehearsal: _Rehearsal, request: Request) -> _Answer:
    choice, batches = rehearsal.turn_of(request)
    if choice is None:
        return _Answer(None, "wait", {}, {})
    reason = "queue" if batches else choice.reason
    if not request.asked >> choice.variant & 1:
        reason = "degraded"
    passed_over = {passed.variant: passed for passed in choice.passed_over}
    drained = [place for place, passed in passed_over.items() if passed.reason == "drain" and place < choice.variant]
    rates = {place: rehearsal.most_rate(request, place) for place in drained}
    return _Answer(rehearsal.model.variants[choice.variant].name, reason, passed_over, rates)


@contextmanager
def _rehearsal(model: ModelQueue, request: Request, load: Load, policy: Policy) -> Iterator[_Rehearsal]:
    """The queue with the request in it, to be played forward; left, everybody is back in his place."""
    rehearsal = _Rehearsal(model, load, policy)
    try:
        rehearsal.begin(request, load)
        yield rehearsal
    finally:
        rehearsal.undo(request)


class _Rehearsal:
    """What would be decided, one batch after the other, if nobody else came; the forecast stays what it is now."""

    def __init__(self, model: ModelQueue, load: Load, policy: Policy) -> None:
        self.model = model
        self._policy = policy
        self._others = load.others
        self._before = model.forecast, model.typical_budget_ns, model.served_ns
        self._patience = [(each, each.patience) for each in (model, *load.others)]
        self._others_load = load_of(load.others, load.now_ns, len(load.free_ns))
        self._free_ns = sorted(max(free, load.now_ns) for free in load.free_ns)
        self._out: list[Request] = []

    def begin(self, request: Request, load: Load) -> None:
        """Let the request arrive; whatever becomes of that, `undo` puts everything back."""
        model = self.model
        noted = copy(model)
        noted.forecast = copy(model.forecast)
        noted.note_arrival(request.samples, max(request.deadline_ns - load.now_ns, 1), load.now_ns, request.step)
        self._forecast = model.forecast = _AsNow(noted.forecast, load.now_ns)
        model.typical_budget_ns = noted.typical_budget_ns
        for each, patience in self._patience:
            each.patience = patience.copy()  # asked about an instant to come, it forgets what is old by then
        model.patience.arrived(request, load.now_ns)
        if not model.queues:
            model.served_ns = max(model.served_ns, load.joins_ns)
        model.add(request)

    def undo(self, request: Request) -> None:
        """Put back who was taken out, but for the request that was asked about."""
        for each in self._out:
            self.model.add(each)
        if request.queue is not None:
            self.model.remove(request)
        self.model.forecast, self.model.typical_budget_ns, self.model.served_ns = self._before
        for model, patience in self._patience:
            model.patience = patience

    def turn_of(self, request: Request) -> tuple[Choice | None, int]:
        """The batch that the request is in, and how many go first; None if it gives up or none comes up."""
        for batches in range(_MOST_BATCHES):
            self._end_hopeless()
            if request in self._out:
                break
            choice = self._decide()
            if choice is None or request in choice.requests:
                return choice, batches
            self._take(choice.requests)
            self.model.served_ns += choice.predicted_ns
            self._free_ns = sorted([self._free_ns[0] + choice.predicted_ns, *self._free_ns[1:]])
        return None, _MOST_BATCHES

    def most_rate(self, request: Request, place: int) -> float:
        """The arrivals per second up to which this variant, or a better one, would be chosen; 0 if at none."""
        now = self._forecast
        least, most = 0.0, 1.0
        for _ in range(_RATE_STEPS):
            share = (least + most) / 2
            self.model.forecast = _AsNow(now.forecast, now.now_ns, share)
            choice = self._decide()
            if choice is not None and choice.variant <= place and request in choice.requests:
                least = share
            else:
                most = share
        self.model.forecast = now
        return least * now.rate(now.now_ns)

    def _decide(self) -> Choice | None:
        now_ns, *others_free_ns = self._free_ns
        competing = rivals(self.model, self._others)
        moment = Moment(now_ns, 0, others_free_ns, competing, self._others, self._others_load)
        return self._policy.decide(self.model, moment).choice

    def _end_hopeless(self) -> None:
        """Take out whoever can no longer be in time once an executor is free; the policy must not see them."""
        while hopeless := self.model.hopeless(self._free_ns[0]):
            self._take(hopeless)

    def _take(self, requests: Iterable[Request]) -> None:
        for request in requests:
            self.model.remove(request)
            self._out.append(request)


class _AsNow(ArrivalForecast):
    """A share of another forecast, as bursty as it, and as it was at one instant."""

    def __init__(self, forecast: ArrivalForecast, now_ns: int, share: float = 1.0) -> None:
        super().__init__()
        self.forecast, self.now_ns, self._share = forecast, now_ns, share

    def rate(self, now_ns: int) -> float:  # noqa: ARG002 - it stands still
        """Samples per second."""
        return self._share * self.forecast.rate(self.now_ns)

    def expected(self, duration_ns: int, now_ns: int, load: float = 0.0) -> float:  # noqa: ARG002 - it stands still
        """Samples to reckon with: the mean grows with the share, the margin for burstiness with its root."""
        mean = self.forecast.rate(self.now_ns) * duration_ns / 1e9
        margin = self.forecast.expected(duration_ns, self.now_ns, load) - mean
        return float(self._share * mean + self._share**0.5 * margin)


def _standing(model: ModelQueue, place: int | None, variant: Variant, question: _Question, answer: _Answer) -> Standing:
    if place is None:
        return Standing(variant.name, allowed=False, why=f"{variant.state}: {variant.reason}", latency_ns=None)
    latency_ns = model.latency.predict_ns(place, 1, question.step) + REPLY_RESERVE_NS
    why_not = _excluded(model, variant, question.slo)
    if variant.name == answer.variant:
        return Standing(variant.name, allowed=True, why="chosen", latency_ns=latency_ns)
    if why_not:
        return Standing(variant.name, allowed=False, why=why_not, latency_ns=latency_ns)
    if latency_ns > question.budget_ns:
        why = f"too slow: predicted {latency_ns / 1e6:.2f} ms, the budget is {question.budget_ns / 1e6:.2f} ms"
    elif place in answer.passed_over:
        why = _counterfactual(
            answer.passed_over[place], answer.most_rate.get(place), model.forecast.rate(question.now_ns)
        )
    elif answer.variant is None:
        why = "in time on an idle server"
    elif answer.reason == "late":
        why = "late: when nothing can be in time any more, the fastest one answers"
    elif place < [ranked.name for ranked in model.variants].index(answer.variant):
        why = "in time, but the policy took another"
    else:
        why = "in time, but less accurate than the one chosen"
    return Standing(variant.name, allowed=True, why=why, latency_ns=latency_ns)


def _excluded(model: ModelQueue, variant: Variant, slo: Slo) -> str:
    """Why the request may not run on a variant at all; empty where it may."""
    state = model.states[variant.name]
    if slo.variant is not None:
        return "" if slo.variant == variant.name else f"the request pins {slo.variant}"
    if state is not State.ELIGIBLE:
        return f"{state}: {variant.reason}"
    if not meets_floor(variant, slo):
        proven = f"proven accuracy {variant.proven_accuracy:.4f}, proven drop {variant.proven_drop:.4f}"
        return f"below the floor: {proven}"
    return ""


def _counterfactual(passed: PassedOver, most_rate: float | None, rate: float) -> str:
    """What was missing for a variant that was passed over, and what would have had to be true."""
    if passed.reason == "slack":
        return f"slack: with {passed.short / 1e6:.2f} ms more it would be in time"
    if passed.reason == "batch":
        return f"batch: it can take {passed.short} samples too few of those that run together now"
    if passed.reason == "reserve":
        return f"reserve: tight requests that are to be expected would wait {passed.short / 1e6:.2f} ms too long for it"
    short = f"drain: those behind it would be {passed.short / 1e6:.2f} ms late"
    if not most_rate:
        return f"{short}; it needs a shorter queue"
    return f"{short}; it would be chosen at up to {most_rate:,.1f} samples/s, now {rate:,.1f}/s arrive"
