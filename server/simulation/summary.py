"""What a run came to, in the field's measures.

Attainment is the share of *all* arrivals that were answered in time: refusals miss. *Mean accuracy* is over the answers
in time (SuperServe, NSDI'25); *effective accuracy* divides the same sum by all arrivals (Model-Switching, HotCloud'20).
Accuracies are the variants' measured scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from server.simulation.simulation import Ended, Simulation

_LATE_KNOWLEDGE = 0.1
"""A request that will miss should be told within this share of its SLO."""


@dataclass(frozen=True, slots=True)
class Summary:
    """One run's figures; shares are of all arrivals unless their name says otherwise."""

    requests: int
    attainment: float
    mean_accuracy: float
    mean_proven_accuracy: float
    """As `mean_accuracy`, of the lower bounds that answers promise."""
    effective_accuracy: float
    attainment_admitted: float
    admitted_then_failed: float
    told_early: float
    """Of the requests that were not answered in time, the share that knew within a tenth of their SLO."""
    floors_broken: int
    p50_ms: float
    p99_ms: float
    mean_batch: float
    utilisation: float
    prediction_exceeded: float
    """The share of batches that took longer than predicted."""
    outcomes: dict[str, int]
    shares: dict[str, float]
    """Each variant's share of the answers in time."""


def summarise(simulation: Simulation) -> Summary:
    """The figures of a run that has come to its end. Raises ValueError for a run without requests."""
    ended = [end for end in simulation.ended if end is not None]
    if len(ended) != len(simulation.trace) or not ended:
        raise ValueError(f"{len(simulation.trace) - len(ended)} of {len(simulation.trace)} requests never ended")
    variants = simulation.model.variants
    scores = [variant.score.value if variant.score else 0.0 for variant in variants]
    in_time = [end for end in ended if end.in_time]
    admitted = [end for end in ended if end.admitted]
    earned = sum(scores[end.place] for end in in_time)
    latencies_ms = sorted(
        (end.at_ns - arrival.at_ns) / 1e6
        for end, arrival in zip(ended, simulation.trace, strict=True)
        if end.place >= 0
    )
    served = Counter(end.place for end in in_time)
    return Summary(
        requests=len(ended),
        attainment=len(in_time) / len(ended),
        mean_accuracy=earned / len(in_time) if in_time else 0.0,
        mean_proven_accuracy=_mean([variants[end.place].proven_accuracy for end in in_time]),
        effective_accuracy=earned / len(ended),
        attainment_admitted=len(in_time) / len(admitted) if admitted else 0.0,
        admitted_then_failed=(len(admitted) - len(in_time)) / len(ended),
        told_early=_told_early(simulation, ended),
        floors_broken=sum(_breaks_floor(simulation, number, end) for number, end in enumerate(ended)),
        p50_ms=_percentile(latencies_ms, 0.5),
        p99_ms=_percentile(latencies_ms, 0.99),
        mean_batch=sum(run.samples for run in simulation.runs) / max(1, len(simulation.runs)),
        utilisation=_utilisation(simulation),
        prediction_exceeded=simulation.exceeded / max(1, len(simulation.runs)),
        outcomes=dict(Counter(end.outcome.value for end in ended)),
        shares={variants[place].name: count / len(in_time) for place, count in sorted(served.items())},
    )


def merged(summaries: Sequence[Summary]) -> Summary:
    """The figures of several runs as one, weighed by their requests; percentiles are the means of the runs'."""
    total = sum(summary.requests for summary in summaries)
    if len(summaries) == 1:
        return summaries[0]

    def mean(name: str, weigh: str = "") -> float:
        weights = [s.requests * (getattr(s, weigh) if weigh else 1.0) for s in summaries]
        values = [getattr(s, name) * weight for s, weight in zip(summaries, weights, strict=True)]
        return sum(values) / sum(weights) if sum(weights) else 0.0

    shares: dict[str, float] = {}
    for summary in summaries:
        for name, share in summary.shares.items():
            shares[name] = shares.get(name, 0.0) + share * summary.attainment * summary.requests
    in_time = sum(shares.values())
    return Summary(
        requests=total,
        attainment=mean("attainment"),
        mean_accuracy=mean("mean_accuracy", "attainment"),
        mean_proven_accuracy=mean("mean_proven_accuracy", "attainment"),
        effective_accuracy=mean("effective_accuracy"),
        attainment_admitted=mean("attainment_admitted"),
        admitted_then_failed=mean("admitted_then_failed"),
        told_early=mean("told_early"),
        floors_broken=sum(summary.floors_broken for summary in summaries),
        p50_ms=mean("p50_ms"),
        p99_ms=mean("p99_ms"),
        mean_batch=mean("mean_batch"),
        utilisation=mean("utilisation"),
        prediction_exceeded=mean("prediction_exceeded"),
        outcomes=dict(sum((Counter(summary.outcomes) for summary in summaries), Counter())),
        shares={name: share / in_time for name, share in shares.items()} if in_time else {},
    )


def _told_early(simulation: Simulation, ended: Sequence[Ended]) -> float:
    missed = told = 0
    for arrival, end in zip(simulation.trace, ended, strict=True):
        if not end.in_time:
            budget_ns = arrival.latency_ns or simulation.default_latency_ns
            missed += 1
            told += end.place < 0 and end.at_ns - arrival.at_ns <= _LATE_KNOWLEDGE * budget_ns
    return told / missed if missed else 1.0


def _breaks_floor(simulation: Simulation, number: int, end: Ended) -> bool:
    """Whether a hard floor was broken, judged from what the trace asked and not from what the scheduler kept."""
    slo = simulation.trace[number].slo
    if end.place < 0 or slo.variant is not None or slo.hard is False:
        return False
    variant = simulation.model.variants[end.place]
    below = slo.min_accuracy is not None and variant.proven_accuracy < slo.min_accuracy
    return below or (slo.max_accuracy_drop is not None and variant.proven_drop > slo.max_accuracy_drop)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percentile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def _utilisation(simulation: Simulation) -> float:
    span_ns = simulation.now_ns - simulation.trace[0].at_ns
    return simulation.busy_ns / max(1, span_ns * simulation.executors)
