"""A good schedule made with full knowledge: a lower bound of the best possible effective accuracy.

The search knows every arrival and every batch's exact latency. It serves one latency SLO, one sample per request and
every variant allowed, and forms batches first come, first served: a batch is a run of consecutive requests, and a
request left out is dropped. What it returns is a real schedule, so the optimum lies between its value and the upper
bound of `server.simulation.bound` (given the same requests); a policy that beats it shows that the beam was narrow.

It goes through the requests in order. A state is (next request, when each executor is free) with the value
so far, the sum of the accuracies of answers in time. From each state it may drop the request or start it as the first
of a batch of b on variant v, on the executor that is free first and as soon as the batch's last request is there, if
the batch ends by its first request's deadline. Of the states with equal next request and equal free instants (rounded
for the comparison only) the best is kept, and of those the ones that no other beats in both value and executor time
left; where more remain than the beam is wide, they are thinned out evenly over executor time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ROUNDINGS = 64  # steps of an SLO in which free instants count as different

_DROP = -1


@dataclass(frozen=True, slots=True)
class PlannedBatch:
    """`size` consecutive requests from `first` on, run on one executor in [start, finish)."""

    executor: int
    variant: int
    first: int
    size: int
    start_ns: int
    finish_ns: int


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the search found: its batches by first request, and what they reach over all requests."""

    batches: tuple[PlannedBatch, ...]
    attainment: float
    effective_accuracy: float


@dataclass(frozen=True, slots=True)
class _States:
    """States with the same next request, one per row: executors' free instants, value, and how each came about.

    `origin` holds (request before, row there, variant or `_DROP`).
    """

    free_ns: NDArray[np.int64]
    value: NDArray[np.float64]
    origin: NDArray[np.int64]


def clairvoyant(
    arrivals_ns: Sequence[int] | NDArray[np.int64],
    slo_ns: int,
    variants: Sequence[tuple[float, Sequence[int]]],
    executors: int,
    beam: int = 64,
) -> Schedule:
    """Search for the schedule of greatest effective accuracy; time grows with requests, beam, variants and batch sizes.

    `arrivals_ns` rise; each variant is (accuracy, latencies in ns of batches of 1, 2, 3 … requests). Raises ValueError
    without arrivals, variants, executors or beam, or where arrivals fall.
    """
    arrivals = np.asarray(arrivals_ns, dtype=np.int64)
    if not arrivals.size or not variants or executors < 1 or beam < 1 or bool((np.diff(arrivals) < 0).any()):
        raise ValueError("a search needs rising arrivals and at least one variant, one executor and a beam of one")
    actions = _actions(variants, slo_ns)
    step_ns = max(1, slo_ns // _ROUNDINGS)
    start = _States(np.full((1, executors), arrivals[0]), np.zeros(1), np.full((1, 3), _DROP, dtype=np.int64))
    coming: list[list[_States]] = [[] for _ in range(arrivals.size + 1)]
    coming[0] = [start]
    kept = []
    for request in range(arrivals.size + 1):
        now_ns = int(arrivals[min(request, arrivals.size - 1)])
        kept.append(_prune(coming[request], now_ns, step_ns, beam))
        coming[request] = []
        if request < arrivals.size:
            for size, states in _expand(kept[-1], request, arrivals, slo_ns, actions):
                coming[request + size].append(states)
    return _replay(_path(kept), arrivals, variants, executors)


@dataclass(frozen=True, slots=True)
class _Actions:
    """The batches that fit an idle executor and the SLO, one per row: variant, size, latency and accuracy gained."""

    variant: NDArray[np.int64]
    size: NDArray[np.int64]
    latency_ns: NDArray[np.int64]
    gain: NDArray[np.float64]


def _actions(variants: Sequence[tuple[float, Sequence[int]]], slo_ns: int) -> _Actions:
    rows = [
        (variant, size, latency, accuracy * size)
        for variant, (accuracy, latencies) in enumerate(variants)
        for size, latency in enumerate(latencies, 1)
        if latency <= slo_ns
    ]
    columns = np.array(rows, dtype=np.float64).reshape(-1, 4).T
    return _Actions(columns[0].astype(np.int64), columns[1].astype(np.int64), columns[2].astype(np.int64), columns[3])


def _expand(
    states: _States, request: int, arrivals: NDArray[np.int64], slo_ns: int, actions: _Actions
) -> list[tuple[int, _States]]:
    """Every state that one step leads to, with the number of requests the step took."""
    rows = np.arange(states.value.size)
    origin = np.column_stack([np.full_like(rows, request), rows, np.full_like(rows, _DROP)])
    reached = [(1, _States(states.free_ns, states.value, origin))]
    last = np.minimum(request + actions.size, arrivals.size) - 1
    finish_ns = np.maximum(states.free_ns[:, :1], arrivals[last]) + actions.latency_ns
    fits = (finish_ns <= arrivals[request] + slo_ns) & (request + actions.size <= arrivals.size)
    for size in np.unique(actions.size[fits.any(axis=0)]):
        row, action = np.nonzero(fits & (actions.size == size))
        free_ns = states.free_ns[row]
        free_ns[:, 0] = finish_ns[row, action]
        origin = np.column_stack([np.full_like(row, request), row, actions.variant[action]])
        reached.append((int(size), _States(free_ns, states.value[row] + actions.gain[action], origin)))
    return reached


def _prune(reached: list[_States], now_ns: int, step_ns: int, beam: int) -> _States:
    """The states worth following, free instants sorted; being free before `now_ns` is worth nothing."""
    free_ns = np.sort(np.maximum(np.concatenate([states.free_ns for states in reached]), now_ns), axis=1)
    value = np.concatenate([states.value for states in reached])
    origin = np.concatenate([states.origin for states in reached])
    keys = (free_ns - now_ns) // step_ns
    ties = np.lexsort((-value, *keys.T))
    alike = (np.diff(keys[ties], axis=0) == 0).all(axis=1)
    best = ties[np.concatenate([[True], ~alike])]
    used_ns = free_ns[best].sum(axis=1)
    best = best[np.lexsort((-value[best], used_ns))]  # from the most executor time left to the least
    above = value[best] > np.concatenate([[-np.inf], np.maximum.accumulate(value[best])[:-1]])
    best = best[above]
    if best.size > beam:
        best = best[np.unique(np.linspace(best.size - 1, 0, beam).round().astype(np.int64))]
    return _States(free_ns[best], value[best], origin[best])


def _path(kept: list[_States]) -> list[tuple[int, int, int]]:
    """The batches (first request, size, variant) that led to the best last state."""
    batches = []
    request, row = len(kept) - 1, int(kept[-1].value.argmax())
    while request > 0:
        before, row_before, variant = (int(value) for value in kept[request].origin[row])
        if variant != _DROP:
            batches.append((before, request - before, variant))
        request, row = before, row_before
    return batches[::-1]


def _replay(
    path: list[tuple[int, int, int]],
    arrivals: NDArray[np.int64],
    variants: Sequence[tuple[float, Sequence[int]]],
    executors: int,
) -> Schedule:
    """The schedule with its instants, each batch on the executor that is free first."""
    free_ns = [int(arrivals[0])] * executors
    batches = []
    for first, size, variant in path:
        executor = free_ns.index(min(free_ns))
        start_ns = max(free_ns[executor], int(arrivals[first + size - 1]))
        free_ns[executor] = start_ns + variants[variant][1][size - 1]
        batches.append(PlannedBatch(executor, variant, first, size, start_ns, free_ns[executor]))
    answered = sum(batch.size for batch in batches)
    worth = sum(batch.size * variants[batch.variant][0] for batch in batches)
    return Schedule(tuple(batches), answered / arrivals.size, worth / arrivals.size)
