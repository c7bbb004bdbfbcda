"""How an end is told: a reply or an error for the client, a record for the listeners.

Rules: pure functions over what is known by then, except `incident`, which logs the exception it names.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping

from server.errors import (
    Cancelled,
    InvalidRequest,
    NotFound,
    PermissionDenied,
    RuntimeFailed,
    ServingError,
    Unauthenticated,
    Unavailable,
)
from server.events import BatchRan, PassedOver, RequestEnded
from server.inference import Inference, Part
from server.scheduling.scheduler import Run
from server.scheduling.slo import Outcome, Request
from server.transport.transport import Call, Reply, Status
from server.wire.inference import MODEL_STREAM_INFER, encode_stream_error
from server.wire.status_codes import to_status

log = logging.getLogger(__name__)

_NO_FACTS: Mapping[str, str] = {}
_UNJUDGED = frozenset({Outcome.INVALID, Outcome.CANCELLED, Outcome.INFEASIBLE})
_BEFORE_QUEUE = {
    InvalidRequest: Outcome.INVALID,
    NotFound: Outcome.INVALID,
    Unauthenticated: Outcome.INVALID,
    PermissionDenied: Outcome.INVALID,
    Cancelled: Outcome.CANCELLED,
    RuntimeFailed: Outcome.FAILED,
    Unavailable: Outcome.REJECTED,
}


def refusal_outcome(error: ServingError) -> Outcome:
    """The outcome of a request that an error kept from being queued."""
    return _BEFORE_QUEUE.get(type(error), Outcome.INFEASIBLE)


def reason_for(request: Request, run: Run) -> str:
    """Why this request got this variant: its own circumstances speak louder than the batch's."""
    if request.late:
        return "late"
    if not request.asked >> run.place & 1:
        return "degraded"
    return "pinned" if request.pinned else run.reason


def incident(doing: str) -> RuntimeFailed:
    """Log the exception being handled under a new id; only the id is for the client."""
    identity = uuid.uuid4().hex[:12]
    log.exception("incident %s while %s", identity, doing)
    return RuntimeFailed(identity)


def error_reply(call: Call, error: ServingError, request_id: str = "", facts: Mapping[str, str] = _NO_FACTS) -> Reply:
    """An error as its rpc wants it: a status, or a message in a stream that stays open for those who may have one."""
    as_status = ("triton_grpc_error", "true") in call.metadata or isinstance(error, Unauthenticated | PermissionDenied)
    if call.method == MODEL_STREAM_INFER and not as_status:
        return Reply(call, encode_stream_error(str(error), request_id))
    trailing = tuple((f"gearshift-{key}", value) for key, value in facts.items())
    return Reply(call, status=Status(*to_status(error)), trailing=trailing)


def batch_record(run: Run, compute_ns: int, *, failed: bool) -> BatchRan:
    """A batch left its executor."""
    return BatchRan(
        model=run.model.name,
        version=run.model.version,
        variant=run.variant,
        executor=run.executor,
        requests=len(run.requests),
        samples=run.samples,
        reason=run.reason,
        compute_ns=compute_ns,
        predicted_ns=run.predicted_ns,
        failed=failed,
        passed_over=_passed_over(run) if run.passed_over else (),
    )


def _passed_over(run: Run) -> tuple[PassedOver, ...]:
    """The more accurate variants that were passed over, by name; those behind the one that ran were never preferred."""
    part: Part = run.requests[0].payload  # type: ignore[assignment]
    ranking = part.inference.model.queue.variants
    better = (passed for passed in run.passed_over if passed.variant < run.place)
    return tuple(PassedOver(ranking[place].name, reason, short) for place, reason, short in better)


def answer_record(inference: Inference, outcome: Outcome, now_ns: int) -> RequestEnded:
    """An inference was answered."""
    model, part, variant = inference.model, inference.least_accurate(), inference.variant()
    return RequestEnded(
        model=model.name,
        version=model.version,
        variant=variant.name,
        outcome=outcome,
        reason=part.reason,
        samples=inference.request.samples,
        slo=inference.request.slo,
        budget_ns=inference.deadline_ns - inference.call.arrival_ns,
        slo_met=outcome is not Outcome.LATE,
        arrival_ns=inference.call.arrival_ns,
        total_ns=now_ns - inference.call.arrival_ns,
        queue_ns=part.queue_ns,
        compute_ns=part.compute_ns,
        accuracy=variant.score.value if variant.score else None,
        request_id=inference.request.id,
        timeout_ns=inference.timeout_ns,
        asked_version=inference.request.version,
        shape=inference.request.shape_key,
    )


def end_record(
    call: Call,
    model: tuple[str, str],
    outcome: Outcome,
    now_ns: int,
    inference: Inference | None = None,
    variant: str = "",
) -> RequestEnded:
    """A request ended without an answer; one that got as far as an inference is known better."""
    total_ns = now_ns - call.arrival_ns
    return RequestEnded(
        model=model[0],
        version=model[1],
        variant=variant or "none",
        outcome=outcome,
        reason=str(outcome),
        samples=inference.request.samples if inference else 0,
        slo=inference.request.slo if inference else None,
        budget_ns=inference.deadline_ns - call.arrival_ns if inference else None,
        slo_met=None if outcome in _UNJUDGED else False,
        arrival_ns=call.arrival_ns,
        total_ns=total_ns,
        queue_ns=total_ns,
        compute_ns=0,
        accuracy=None,
        request_id=inference.request.id if inference else "",
        timeout_ns=inference.timeout_ns if inference else None,
        asked_version=inference.request.version if inference else "",
        shape=inference.request.shape_key if inference else None,
    )
