"""How a request that waits or failed can go on, or must end, as it asked for that case.

Rules: what a request asked for in `on_infeasible` is tried in its order; a request is tried again at most once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from server.errors import DeadlineMissed, Infeasible, ServingError
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Run
from server.scheduling.slo import OnInfeasible, Outcome, Request


@dataclass(frozen=True, slots=True)
class End:
    """A request ended without running (again)."""

    request: Request
    outcome: Outcome
    error: ServingError


def give_up(model: ModelQueue, request: Request, now_ns: int, late_room: int | None) -> End | None:
    """A waiting request became hopeless: widen it, make it late, or end it, as it asked."""
    model.remove(request)
    if model.fitting(request.allowed, request.samples):
        model.missed(request)
    for action in request.on_infeasible:
        if action is OnInfeasible.REJECT:
            break
        if action is OnInfeasible.DEGRADE and request.fallback and not request.retried:
            request.allowed |= request.fallback
            request.fallback = 0
            model.add(request)  # still hopeless? then the next round tries the next action
            return None
        has_room = _has_room(request, late_room)
        if action is OnInfeasible.LATE and has_room and model.fitting(request.allowed, request.samples):
            request.late = True
            model.add(request)
            return None
    if not model.fitting(request.allowed, request.samples):
        return End(request, Outcome.INFEASIBLE, Infeasible("every variant this request allows was disabled"))
    waited_ms = (now_ns - request.arrival_ns) / 1e6
    error = DeadlineMissed(f"after {waited_ms:.2f} ms in the queue the deadline can no longer be met")
    return End(request, Outcome.EXPIRED, error)


def second_chance(
    model: ModelQueue, request: Request, run: Run, now_ns: int, late_room: int | None, *, blames_variant: bool
) -> bool:
    """Let a request of a failed batch wait to be tried again, alone; False where that makes no sense.

    Where the variant is to blame, another is taken; where there is none, only a request with batch-mates is tried on
    the same: one of them may have poisoned the batch. Where the executor is to blame, any will do. Who cannot be tried
    so, or not in time, is degraded or tried again late, as it asked.
    """
    if request.retried or request.abandoned:
        return False
    blamed = 1 << run.place if blames_variant else 0
    for allowed, late in _ways(request):
        usable = allowed & model.open_to(request)
        remaining = usable & ~blamed or (usable if len(run.requests) > 1 else 0)
        quickest_ns = model.quickest_ns(remaining, request.samples, request.step)
        if quickest_ns is None:
            continue
        in_time = now_ns + quickest_ns <= request.deadline_ns - REPLY_RESERVE_NS
        if in_time or request.late or (late and _has_room(request, late_room)):
            request.allowed, request.late, request.solo, request.retried = remaining, late, True, True
            model.add(request)
            return True
    return False


def _ways(request: Request) -> Iterator[tuple[int, bool]]:
    """On which variants, and whether late, a request may be tried: as it is, then as it asked, in its order."""
    allowed, late = request.allowed, request.late
    yield allowed, late
    for action in request.on_infeasible:
        if action is OnInfeasible.REJECT:
            break
        if action is OnInfeasible.DEGRADE:
            allowed |= request.fallback
        yield allowed, late or action is OnInfeasible.LATE
    yield allowed, late or request.may_be_late  # both, in whichever order


def _has_room(request: Request, late_room: int | None) -> bool:
    return late_room is not None and request.size_bytes <= late_room
