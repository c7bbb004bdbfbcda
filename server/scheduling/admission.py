"""May a request wait, and on which variants? Never? Not now? Then what did it ask for instead?

Three cases are kept apart because a client acts on them differently: no variant could *ever* meet the SLO here
(`Infeasible`); one could on an idle server but not behind this queue (`Overloaded`, with when to try again); or it was
admitted and became hopeless (`DeadlineMissed`, in the scheduler). What a request asked for in `on_infeasible` is tried
in its order before it is refused.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from server.errors import Infeasible, NotFound, Overloaded, ServingError
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue, bits
from server.scheduling.slo import OnInfeasible, Request, Slo
from variants.variant import REFERENCE, State, Variant

QUEUE_FULL_RETRY_NS = 50_000_000

_DEFAULT_PRIORITY = 2
_MOST_PRIORITY = 8
_MOST_FLOORS = 1000


@dataclass(frozen=True, slots=True)
class Defaults:
    """What a request gets that names nothing: the model's own SLO, and the server's latency."""

    latency_ns: int
    max_accuracy_drop: float | None = None
    on_infeasible: tuple[OnInfeasible, ...] | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """The executors at one instant: when each is expected to be free, and the work that waits for other models.

    `late_room` is how many bytes of late work may yet be queued, None where no such request may. `others` are all other
    models; `joins_ns` is the executor time that a model of which nothing waited is taken to have had, at the least.
    """

    now_ns: int
    free_ns: Sequence[int]
    others_backlog_ns: int
    late_room: int | None
    others: Sequence[ModelQueue] = ()
    joins_ns: int = 0


def meets_floor(variant: Variant, slo: Slo) -> bool:
    """Whether what is proven about a variant satisfies the request's accuracy floor."""
    if slo.min_accuracy is not None and variant.proven_accuracy < slo.min_accuracy:
        return False
    if slo.max_accuracy_drop == 0:  # the reference only, even where another is proven better
        return variant.name == REFERENCE
    return slo.max_accuracy_drop is None or variant.proven_drop <= slo.max_accuracy_drop


def make_request(  # noqa: PLR0913 - these are the facts of a request, named at the one call
    model: ModelQueue,
    slo: Slo,
    defaults: Defaults,
    *,
    number: int,
    samples: int,
    size_bytes: int,
    shape: Hashable,
    arrival_ns: int,
    rpc_deadline_ns: int | None = None,
    length: int = 0,
    payload: object = None,
) -> Request:
    """A request with its floor class, deadline and place in the queue settled.

    `length` counts the elements per sample of its inputs where that varies from request to request, else it is 0.

    Raises NotFound for a pinned variant that does not exist, Infeasible when no variant satisfies the floor.
    """
    named_latency = slo.latency_ns is not None or rpc_deadline_ns is not None
    slo = with_floor(slo, defaults)
    deadlines = [arrival_ns + slo.latency_ns] if slo.latency_ns is not None else []
    if rpc_deadline_ns is not None:
        deadlines.append(rpc_deadline_ns)
    deadline_ns = min(deadlines) if deadlines else arrival_ns + defaults.latency_ns
    asked = _floor_class(model, slo)
    level = min(slo.priority or _DEFAULT_PRIORITY, _MOST_PRIORITY)
    budget_ns = max(deadline_ns - arrival_ns, 0)
    step = model.latency.step(length)
    fallback = 0 if slo.hard or slo.variant else model.eligible
    run_ns = model.at_rest_ns(asked, samples, step) or model.at_rest_ns(fallback, samples, step)
    request = Request(
        number=number,
        model=model.key,
        allowed=asked,
        asked=asked,
        fallback=fallback,
        samples=samples,
        size_bytes=size_bytes,
        arrival_ns=arrival_ns,
        deadline_ns=deadline_ns,
        # the latest start, a fixed place: what takes long must start early, and what waits longer ages by itself
        order_ns=arrival_ns + budget_ns * level // _DEFAULT_PRIORITY - run_ns,
        weight=_DEFAULT_PRIORITY / level,
        shape=shape,
        on_infeasible=_on_infeasible(slo, defaults, named_latency=named_latency),
        pinned=slo.variant is not None,
        payload=payload,
        step=step,
    )
    if not asked and not (request.fallback and OnInfeasible.DEGRADE in request.on_infeasible):
        why = "is proven to meet this accuracy floor" if model.eligible else "takes traffic at the moment"
        raise Infeasible(f"no variant of {model.key.name} {why}; {offers(model, samples, request.step)}")
    return request


def with_floor(slo: Slo, defaults: Defaults) -> Slo:
    """The SLO with the model's own floor where it names none; that one is soft unless the request says otherwise."""
    if slo.min_accuracy is not None or slo.max_accuracy_drop is not None:
        return slo if slo.hard is not None else replace(slo, hard=True)
    if defaults.max_accuracy_drop is None:
        return slo
    return replace(slo, max_accuracy_drop=defaults.max_accuracy_drop, hard=bool(slo.hard))


def _floor_class(model: ModelQueue, slo: Slo) -> int:
    if slo.variant is None:
        floor = slo.min_accuracy, slo.max_accuracy_drop
        found = model.floors.get(floor)
        if found is None:
            if len(model.floors) >= _MOST_FLOORS:  # clients choose the numbers
                model.floors.clear()
            found = sum(1 << i for i in bits(model.eligible) if meets_floor(model.variants[i], slo))
            model.floors[floor] = found
        return found
    for place, variant in enumerate(model.variants):
        if variant.name == slo.variant:
            if model.states[variant.name] is State.DISABLED:
                raise Infeasible(f"variant {variant.name} of {model.key.name} is disabled; {offers(model, 1)}")
            return 1 << place
    if slo.variant in model.unmeasured:
        why = model.unmeasured[slo.variant]
        raise Infeasible(f"{slo.variant} of {model.key.name} cannot run here: {why}; {offers(model, 1)}")
    raise NotFound(f"model {model.key.name} has no variant {slo.variant}")


def _on_infeasible(slo: Slo, defaults: Defaults, *, named_latency: bool) -> tuple[OnInfeasible, ...]:
    if slo.on_infeasible is not None:
        return slo.on_infeasible
    if not named_latency:
        return OnInfeasible.DEGRADE, OnInfeasible.LATE
    return defaults.on_infeasible or (OnInfeasible.REJECT,)


def offers(model: ModelQueue, samples: int, step: int = 0) -> str:
    """What could be had on an idle server, for a client that asked for too much."""
    pairs = [
        f"{model.variants[v].name} (accuracy {_proven(model.variants[v])}, {idle_ms:.2f} ms)"
        for v in model.fitting(model.eligible, samples)
        for idle_ms in [_achievable_ms(model, v, samples, step)]
    ]
    return f"achievable here: {', '.join(pairs) or 'nothing'}"


def _proven(variant: Variant) -> str:
    return f"{variant.proven_accuracy:.4f}" if variant.score else "unproven"


def _achievable_ms(model: ModelQueue, variant: int, samples: int, step: int) -> float:
    """The least latency that this variant can promise on an idle server, rounded up to what is printed of it."""
    return -(-(model.latency.idle_ns(variant, samples, step) + REPLY_RESERVE_NS) // 10_000) / 100


def predicted_finish_ns(model: ModelQueue, request: Request, allowed: int, load: Load) -> int | None:
    """When the request would be answered if it queued now on these variants; None when none can run it.

    Work ahead in the order is spread over the executors as a fluid. Other models share the executors fairly, so they
    hold this one up by at most as much work as it has itself.
    """
    quickest_ns = model.quickest_ns(allowed, request.samples, request.step)
    if quickest_ns is None:
        return None
    ahead_ns, own_ns = model.ahead_ns(request, allowed)
    ahead_ns += min(load.others_backlog_ns, ahead_ns)
    start_ns = max(load.now_ns, min(load.free_ns)) + ahead_ns // len(load.free_ns)
    return start_ns + max(quickest_ns, own_ns) + REPLY_RESERVE_NS


def refusal(model: ModelQueue, request: Request, load: Load) -> ServingError | None:
    """Why the request is refused; None when it may wait, perhaps degraded or made late as it asked.

    What is refused only because there is no room for late work is marked late as well.
    """
    error = why_not(model, request, request.allowed, load)
    if error is None:
        return None
    wider = request.allowed
    for action in request.on_infeasible:
        if action is OnInfeasible.REJECT:
            return error
        if action is OnInfeasible.DEGRADE and request.fallback:
            wider |= request.fallback
            still = why_not(model, request, wider, load)
            if still is None:
                request.allowed, request.late = wider, False
                return None
            error = still if isinstance(still, Overloaded) else error  # on an idle server it would be answered
        if action is OnInfeasible.LATE:  # late at the floor it asked for, if any variant reaches it at all
            allowed = request.allowed if model.fitting(request.allowed, request.samples) else wider
            if model.fitting(allowed, request.samples):
                request.late = True
                if load.late_room is not None and request.size_bytes <= load.late_room:
                    request.allowed = allowed
                    return None
                error = Overloaded("the queue of late work is full", QUEUE_FULL_RETRY_NS)
    return error


def why_not(model: ModelQueue, request: Request, allowed: int, load: Load) -> ServingError | None:
    """Why a request cannot be answered in time on these variants; None when it can."""
    name, samples, step = model.key.name, request.samples, request.step
    fitting = model.fitting(allowed, samples)
    if not fitting:
        return Infeasible(f"no variant of {name} that this request allows can run here; {offers(model, samples, step)}")
    finish_ns = predicted_finish_ns(model, request, allowed, load)
    if finish_ns is None or finish_ns <= request.deadline_ns:
        return None
    budget_ns = request.deadline_ns - request.arrival_ns
    at_rest_ns = min(model.latency.idle_ns(v, samples, step) for v in fitting)
    learnt_ns = min(model.latency.full_speed_ns(v, samples, step) for v in fitting)
    if min(at_rest_ns, learnt_ns) + REPLY_RESERVE_NS > budget_ns:
        idle_ms = min(_achievable_ms(model, v, samples, step) for v in fitting)
        return Infeasible(
            f"{name} cannot meet {budget_ns / 1e6:.2f} ms with the variants that this request allows, even when idle: "
            f"they take {idle_ms:.2f} ms; {offers(model, samples, step)}"
        )
    late_ns = finish_ns - request.deadline_ns
    return Overloaded(f"{name} is too busy: this request would be {late_ns / 1e6:.2f} ms late", late_ns)
