"""What a run came to, or several together, in the field's measures.

Attainment is the share of *all* arrivals that were answered in time: refusals miss. *Mean accuracy* is over the answers
in time (SuperServe, NSDI'25); *effective accuracy* divides the same sum by all arrivals (Model-Switching, HotCloud'20).
Accuracies are the variants' measured scores.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from server.scheduling.slo import Slo
from server.simulation.simulation import Ended, Simulation
from variants.variant import Variant

_LATE_KNOWLEDGE = 0.1
"""A request that will miss should be told within this share of its SLO."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures; shares are of all arrivals unless their name says otherwise."""

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


def summarise(*simulations: Simulation) -> Summary:
    """The figures of runs of one model, such as its replicas', all together. Raises ValueError without requests."""
    ended = [end for simulation in simulations for end in _ended(simulation)]
    runs = [run for simulation in simulations for run in simulation.runs]
    if not ended:
        raise ValueError("there are no requests")
    variants = simulations[0].model.variants
    scores = [variant.score.value if variant.score else 0.0 for variant in variants]
    in_time = [end for end in ended if end.in_time]
    admitted = [end for end in ended if end.admitted]
    earned = sum(scores[end.place] for end in in_time)
    trace = [arrival for simulation in simulations for arrival in simulation.trace]
    latencies_ms = sorted(
        (end.at_ns - arrival.at_ns) / 1e6 for end, arrival in zip(ended, trace, strict=True) if end.place >= 0
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
        told_early=_told_early(simulations),
        floors_broken=sum(map(_floors_broken, simulations)),
        p50_ms=_percentile(latencies_ms, 50),
        p99_ms=_percentile(latencies_ms, 99),
        mean_batch=_mean([run.samples for run in runs]),
        utilisation=_utilisation(simulations),
        prediction_exceeded=sum(simulation.exceeded for simulation in simulations) / max(1, len(runs)),
        outcomes=dict(Counter(end.outcome.value for end in ended)),
        shares={variants[place].name: count / len(in_time) for place, count in sorted(served.items())},
    )


def _ended(simulation: Simulation) -> list[Ended]:
    """How each request ended. Raises ValueError for a run that has not come to its end."""
    ended = [end for end in simulation.ended if end is not None]
    if len(ended) != len(simulation.trace):
        raise ValueError(f"{len(simulation.trace) - len(ended)} of {len(simulation.trace)} requests never ended")
    return ended


def _told_early(simulations: Sequence[Simulation]) -> float:
    missed = told = 0
    for simulation in simulations:
        for arrival, end in zip(simulation.trace, _ended(simulation), strict=True):
            if not end.in_time:
                budget_ns = arrival.latency_ns or simulation.default_latency_ns
                missed += 1
                told += end.place < 0 and end.at_ns - arrival.at_ns <= _LATE_KNOWLEDGE * budget_ns
    return told / missed if missed else 1.0


def _floors_broken(simulation: Simulation) -> int:
    pairs = zip(simulation.trace, _ended(simulation), strict=True)
    return sum(
        _breaks_floor(arrival.slo, simulation.model.variants[end.place]) for arrival, end in pairs if end.place >= 0
    )


def _breaks_floor(slo: Slo, variant: Variant) -> bool:
    """Whether a hard floor was broken, judged from what the trace asked and not from what the scheduler kept."""
    if slo.variant is not None or slo.hard is False:
        return False
    below = slo.min_accuracy is not None and variant.proven_accuracy < slo.min_accuracy
    return below or (slo.max_accuracy_drop is not None and variant.proven_drop > slo.max_accuracy_drop)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _percentile(ordered: Sequence[float], percent: int) -> float:
    """By nearest rank, so that it is a value that occurred."""
    return ordered[-(-len(ordered) * percent // 100) - 1] if ordered else 0.0


def _utilisation(simulations: Sequence[Simulation]) -> float:
    available_ns = sum((each.now_ns - each.trace[0].at_ns) * each.executors for each in simulations if each.trace)
    return sum(each.busy_ns for each in simulations) / max(1, available_ns)
