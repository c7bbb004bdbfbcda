"""What scheduler tests are about: models, variants and requests in milliseconds, seeded arrival processes."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random

from server.scheduling.admission import Defaults, make_request
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policy import Choice, Moment
from server.scheduling.slo import ModelKey, OnInfeasible, Request, Slo
from variants.variant import REFERENCE, Interval, LatencyProfile, State, Variant

MS = 1_000_000
SIZES = (1, 2, 4, 8, 16)


def variant(
    name: str,
    accuracy: float,
    fixed_ms: float,
    per_sample_ms: float,
    *,
    sizes: Sequence[int] = SIZES,
    batchable: bool = True,
    state: State = State.ELIGIBLE,
    reference_accuracy: float = 0.913,
) -> Variant:
    """A variant whose batch takes ``fixed + per_sample * n``; its proven bounds equal the accuracy given."""
    drop = max(0.0, reference_accuracy - accuracy)
    latencies = tuple(int((fixed_ms + per_sample_ms * size) * MS) for size in sizes)
    return Variant(
        name=name,
        state=state,
        reason="",
        precision=name,
        runtime="virtual",
        device="cpu",
        score=Interval(accuracy, accuracy, accuracy),
        drop=None if name == REFERENCE else Interval(drop, drop, drop),
        profile=LatencyProfile(tuple(sizes), latencies),
        batchable=batchable,
    )


def five_variants() -> list[Variant]:
    """The family of the published comparison: 0.913 at 6+4n ms down to 0.872 at 2+0.7n ms."""
    return [
        variant(REFERENCE, 0.913, 6, 4),
        variant("amp", 0.912, 5, 2.6),
        variant("int8-static", 0.905, 4, 1.8),
        variant("pruned", 0.893, 4, 1.4),
        variant("distilled", 0.872, 2, 0.7),
    ]


_NOTHING_ASKED = Slo()


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request as a client sends it; `cancel_at_ns` is when the client goes away, if it does."""

    at_ns: int
    slo: Slo = _NOTHING_ASKED
    model: str = "m"
    samples: int = 1
    size_bytes: int = 100
    shape: Hashable = (8, 8)
    rpc_deadline_ns: int | None = None
    cancel_at_ns: int | None = None


def model_of(*variants: Variant, name: str = "m", delay_ms: int = 0) -> ModelQueue:
    """A model with these variants, or the usual five."""
    return ModelQueue(ModelKey(name, "1"), variants or five_variants(), max_queue_delay_ns=delay_ms * MS)


def slo(latency_ms: float, floor: float | None = None, *on_infeasible: OnInfeasible, **facts: object) -> Slo:
    """An SLO in milliseconds."""
    return Slo(int(latency_ms * MS), floor, on_infeasible=on_infeasible or None, **facts)  # type: ignore[arg-type]


def ask(model: ModelQueue, arrival: Arrival, number: int = 0, defaults: Defaults | None = None) -> Request:
    """The request that an arrival becomes, not yet queued."""
    return make_request(
        model,
        arrival.slo,
        defaults or Defaults(latency_ns=1000 * MS),
        number=number,
        samples=arrival.samples,
        size_bytes=arrival.size_bytes,
        shape=arrival.shape,
        arrival_ns=arrival.at_ns,
        rpc_deadline_ns=arrival.rpc_deadline_ns,
    )


def queue_up(model: ModelQueue, *arrivals: Arrival) -> list[Request]:
    """Queue requests past all admission, numbered in order."""
    requests = [ask(model, arrival, number) for number, arrival in enumerate(arrivals)]
    for request in requests:
        model.note_arrival(request.samples, request.deadline_ns - request.arrival_ns, request.arrival_ns)
        model.add(request)
    return requests


def choose(model: ModelQueue, now_ns: int, others_free_ns: Sequence[int]) -> Choice:
    """What FitDrain would run now on an idle executor."""
    choice = FitDrain().decide(model, Moment(now_ns, 0, others_free_ns)).choice
    assert choice is not None
    return choice


def gamma_arrivals(seed: int, rate: float, cv2: float, seconds: float, slo: Slo) -> list[Arrival]:
    """A renewal process with gamma gaps: `rate` per second, squared coefficient of variation `cv2` (1 is Poisson)."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    instant, arrivals = 0.0, list[Arrival]()
    while True:
        instant += random.gammavariate(1 / cv2, cv2 / rate)
        if instant >= seconds:
            return arrivals
        arrivals.append(Arrival(int(instant * 1e9), slo))
