"""gearshift.v1.VariantService between bytes and values.

Rules: durations are nanoseconds on our side and microseconds or milliseconds, by name, on the wire. What is not known
is absent there, never zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from protos import gearshift_pb2 as pb
from server.errors import InvalidRequest
from server.scheduling.admission import Defaults
from server.scheduling.explain import Explanation
from server.scheduling.slo import Slo
from server.wire.messages import parse
from server.wire.parameters import fraction, hard_floor, latency_ns, on_infeasible, pinned_variant, priority
from variants.variant import Interval, LatencyProfile, Variant

SERVICE = pb.DESCRIPTOR.services_by_name["VariantService"].full_name
LIST_VARIANTS = f"/{SERVICE}/ListVariants"
EXPLAIN_ROUTE = f"/{SERVICE}/ExplainRoute"
SET_VARIANT_STATE = f"/{SERVICE}/SetVariantState"
METHODS: Mapping[str, str] = {LIST_VARIANTS: "unary", EXPLAIN_ROUTE: "unary", SET_VARIANT_STATE: "unary"}
"""Full path -> kind, for the transport."""


@dataclass(frozen=True, slots=True)
class Described:
    """A variant as the scheduler sees it, with what only its card knows."""

    variant: Variant
    recipe: str
    gate_verdict: str


class Explain(NamedTuple):
    """What ExplainRoute asks."""

    model: str
    version: str
    slo: Slo


class SetState(NamedTuple):
    """What SetVariantState asks."""

    model: str
    version: str
    variant: str
    enabled: bool


def read_list_variants(message: bytes) -> tuple[str, str]:
    """The model and version asked about. Raises InvalidRequest."""
    request = parse(pb.ListVariantsRequest, message)
    return request.model, request.version


def read_explain_route(message: bytes) -> Explain:
    """The model, version and SLO asked about. Raises InvalidRequest, naming the field that is wrong."""
    request = parse(pb.ExplainRouteRequest, message)
    return Explain(request.model, request.version, read_slo(request.slo))


def read_set_variant_state(message: bytes) -> SetState:
    """The variant and whether it shall take traffic. Raises InvalidRequest when that is not said."""
    request = parse(pb.SetVariantStateRequest, message)
    if request.state not in (request.ENABLED, request.DISABLED):
        raise InvalidRequest("state must be ENABLED or DISABLED")
    return SetState(request.model, request.version, request.variant, request.state == request.ENABLED)


def read_slo(slo: pb.Slo) -> Slo:
    """An SLO under the rules of the request parameters of the same names. Raises InvalidRequest."""
    drop = "max_accuracy_drop"
    return Slo(
        latency_ns=latency_ns("latency_ms", slo.latency_ms) if slo.HasField("latency_ms") else None,
        min_accuracy=fraction("min_accuracy", slo.min_accuracy) if slo.HasField("min_accuracy") else None,
        max_accuracy_drop=fraction(drop, slo.max_accuracy_drop) if slo.HasField(drop) else None,
        hard=hard_floor("floor", slo.floor) if slo.floor else None,
        on_infeasible=on_infeasible("on_infeasible", slo.on_infeasible) or None,
        variant=pinned_variant("variant", slo.variant) if slo.variant else None,
        priority=priority("priority", slo.priority),
    )


def encode_variants(
    model: str,
    version: str,
    variants: Sequence[Described],
    executors: int = 0,
    defaults: Defaults | None = None,
) -> bytes:
    """The answer to ListVariants, in the order given; `defaults` is what a request gets that names nothing."""
    response = pb.ListVariantsResponse(model=model, version=version, executors=executors)
    response.variants.extend(_info(described) for described in variants)
    if defaults is not None:
        response.default_slo.latency_ms = defaults.latency_ns / 1e6
        response.default_slo.on_infeasible.extend(defaults.on_infeasible or ())
        if defaults.max_accuracy_drop is not None:
            response.default_slo.max_accuracy_drop = defaults.max_accuracy_drop
    return response.SerializeToString()


def encode_explanation(model: str, version: str, explanation: Explanation) -> bytes:
    """The answer to ExplainRoute; an empty variant says that the request would be refused."""
    chosen = explanation.variant or ""
    response = pb.ExplainRouteResponse(model=model, version=version, variant=chosen, reason=explanation.reason)
    for standing in explanation.standings:
        candidate = response.candidates.add(variant=standing.variant, allowed=standing.allowed, why=standing.why)
        if standing.latency_ns is not None:
            candidate.predicted_latency_us = standing.latency_ns / 1_000
    return response.SerializeToString()


def encode_variant_state(described: Described) -> bytes:
    """The answer to SetVariantState: the variant as it stands now."""
    return pb.SetVariantStateResponse(info=_info(described)).SerializeToString()


def _info(described: Described) -> pb.VariantInfo:
    variant = described.variant
    info = pb.VariantInfo(
        variant=variant.name,
        recipe=described.recipe,
        state=variant.state,
        reason=variant.reason,
        precision=variant.precision,
        runtime=variant.runtime,
        device=variant.device,
        accuracy=_interval(variant.score),
        accuracy_drop=_interval(variant.drop),
        size_bytes=variant.size_bytes,
        gate_verdict=described.gate_verdict,
        batchable=variant.batchable,
        latency=_latencies(variant.profile),
        crowded_latency=_latencies(variant.crowded),
    )
    for elements, profile in variant.lengths:
        info.lengths.add(elements=elements, latency=_latencies(profile))
    if info.latency:
        info.samples_per_second = max(point.batch_size * 1e6 / point.latency_us for point in info.latency)
    return info


def _latencies(profile: LatencyProfile | None) -> list[pb.BatchLatency]:
    if profile is None:
        return []
    measured = zip(profile.batch_sizes, profile.latencies_ns, strict=True)
    return [pb.BatchLatency(batch_size=size, latency_us=nanoseconds / 1_000) for size, nanoseconds in measured]


def _interval(interval: Interval | None) -> pb.Interval | None:
    return pb.Interval(value=interval.value, low=interval.low, high=interval.high) if interval else None
