"""Which variant a request would get at this moment, and why not each of the others.

The question is put to the very policy that decides: the request is queued, the policy asked, the request taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from server.errors import Infeasible
from server.scheduling.admission import Defaults, Load, make_request, meets_floor, refusal, with_floor
from server.scheduling.fitdrain import Choice
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.slo import Request, Slo
from variants.variant import State, Variant


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


def explain(
    model: ModelQueue,
    variants: Sequence[Variant],
    slo: Slo,
    defaults: Defaults,
    load: Load,
    policy: Callable[[ModelQueue, int, Sequence[int]], Choice],
) -> Explanation:
    """What would happen to a request for one sample that arrived now. Raises NotFound for an unknown pinned variant."""
    model.latency.refresh(load.now_ns)
    slo = with_floor(slo, defaults)
    chosen, reason = _ask(model, slo, defaults, load, policy)
    budget_ns = slo.latency_ns if slo.latency_ns is not None else defaults.latency_ns
    places = {variant.name: place for place, variant in enumerate(model.variants)}
    standings = [_standing(model, places.get(v.name), v, slo, budget_ns, chosen) for v in variants]
    return Explanation(chosen, reason, tuple(standings))


def _ask(
    model: ModelQueue,
    slo: Slo,
    defaults: Defaults,
    load: Load,
    policy: Callable[[ModelQueue, int, Sequence[int]], Choice],
) -> tuple[str | None, str]:
    try:
        request = make_request(
            model, slo, defaults, number=-1, samples=1, size_bytes=0, shape=_ANY_SHAPE, arrival_ns=load.now_ns
        )
    except Infeasible as error:
        return None, str(error)
    refused = refusal(model, request, load)
    if refused is not None:
        return None, str(refused)
    if request.late:
        fastest = model.fastest(request.allowed)
        return (None, "late") if fastest is None else (model.variants[fastest].name, "late")
    if model.hopeless(load.now_ns):  # their end is due, and the policy must not see them
        model = _alone(model)
    choice = _with_request(model, request, load, policy)
    reason = choice.reason
    if request not in choice.requests:  # others go first: what it gets when its turn comes
        choice, reason = _with_request(_alone(model), request, _after(model, request, load), policy), "queue"
    if not request.asked >> choice.variant & 1:
        reason = "degraded"
    return model.variants[choice.variant].name, reason


_ANY_SHAPE = ("explain",)
"""A shape of its own: the question is about the variant, not about who would share the batch."""


def _alone(model: ModelQueue) -> ModelQueue:
    """The same model with nobody waiting."""
    alone = ModelQueue(model.key, model.variants)
    alone.set_states(model.states)
    alone.latency, alone.forecast = model.latency, model.forecast
    alone.typical_budget_ns = model.typical_budget_ns
    return alone


def _after(model: ModelQueue, request: Request, load: Load) -> Load:
    """The load once the work ahead of the request has been done."""
    ahead_ns = model.backlog_ns(request.order_ns) // len(load.free_ns)
    now_ns = max(load.now_ns, min(load.free_ns)) + ahead_ns
    return replace(load, now_ns=now_ns, free_ns=[max(free, now_ns) for free in load.free_ns])


def _with_request(
    model: ModelQueue,
    request: Request,
    load: Load,
    policy: Callable[[ModelQueue, int, Sequence[int]], Choice],
) -> Choice:
    budget_ns = model.typical_budget_ns
    model.typical_budget_ns = budget_ns or float(request.deadline_ns - request.arrival_ns)
    model.add(request)
    try:
        others_free_ns = sorted(max(free, load.now_ns) for free in load.free_ns)[1:]
        return policy(model, load.now_ns, others_free_ns)
    finally:
        model.remove(request)
        model.typical_budget_ns = budget_ns


def _standing(
    model: ModelQueue, place: int | None, variant: Variant, slo: Slo, budget_ns: int, chosen: str | None
) -> Standing:
    if place is None:
        return Standing(variant.name, allowed=False, why=f"{variant.state}: {variant.reason}", latency_ns=None)
    latency_ns = model.latency.predict_ns(place, 1) + REPLY_RESERVE_NS
    allowed, why = _why(model, variant, slo, budget_ns, latency_ns, chosen)
    return Standing(variant.name, allowed=allowed, why=why, latency_ns=latency_ns)


def _why(
    model: ModelQueue, variant: Variant, slo: Slo, budget_ns: int, latency_ns: int, chosen: str | None
) -> tuple[bool, str]:
    state = model.states[variant.name]
    late = f"predicted {latency_ns / 1e6:.2f} ms, the budget is {budget_ns / 1e6:.2f} ms"
    if variant.name == chosen:
        return True, "chosen"
    if slo.variant is not None:
        return False, f"the request pins {slo.variant}"
    if state is not State.ELIGIBLE:
        return False, f"{state}: {variant.reason}"
    if not meets_floor(variant, slo):
        proven = f"proven accuracy {variant.proven_accuracy:.4f}, proven drop {variant.proven_drop:.4f}"
        return False, f"below the floor: {proven}"
    if latency_ns > budget_ns:
        return True, f"too slow: {late}"
    return True, "in time, but not the most accurate that keeps the queue drainable"
