"""Proteus' control path (ASPLOS'24): which variant each executor serves, and which share of the requests it gets.

The released simulator solves a mixed-integer program (Gurobi) every 10 to 20 s: one variant per accelerator, shares of
every request type for every accelerator, so as to maximise the accuracy of the demand, weighted by it, subject to
capacities that exceed the demand by beta = 1.05; where that is infeasible, beta falls in steps of 0.05, down to 0.2,
and throughput is shed. A variant's capacity on an accelerator is that of its largest batch with ``L(b) < SLO / 2``.

Adapted: for the few executors of one machine, all assignments of variants to executors are enumerated and the best
shares computed for each (the most accurate first, the pickiest requests first, which is optimal where floors are
nested), so the plan is exact. Request types are the floor classes of one model. Executors with the same variant share
alike, and demand beyond capacity is spread as the demand within it. Enumeration suits up to about sixteen executors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate, combinations_with_replacement

from server.scheduling.model_queue import ModelQueue, bits
from server.scheduling.slo import Request

Demand = Mapping[int, float]
"""Samples per second by the set of variants that they allow."""
_Flows = dict[int, dict[int, float]]  # allowed -> variant -> samples per second

_BETA = 1.05
_BETA_STEP = 0.05
_BETA_LEAST = 0.2
_GOLDEN = 2654435769  # 2 ** 32 over the golden ratio: consecutive requests spread evenly over any shares


@dataclass(frozen=True, slots=True)
class Plan:
    """The variant of each executor; for each floor class where each executor's share of it ends, in [0, 1]."""

    variants: tuple[int, ...]
    ends: Mapping[int, tuple[float, ...]]

    def executor(self, request: Request) -> int:
        """Who serves a request: always the same under one plan."""
        ends = self.ends.get(request.allowed) or self._even(request.allowed)
        point = (request.number * _GOLDEN & 0xFFFFFFFF) / 2**32
        return min(bisect_right(ends, point * ends[-1]), len(ends) - 1)

    def _even(self, allowed: int) -> tuple[float, ...]:
        """Equal shares for those who serve a class that was not planned for; for all of them if nobody does."""
        able = [allowed >> variant & 1 for variant in self.variants]
        return tuple(accumulate(able if any(able) else [1] * len(able)))


def make_plan(model: ModelQueue, demand: Demand, executors: int) -> Plan:
    """The most accurate assignment that carries the demand, or else the largest share of it."""
    capacity = _capacities(model, demand)
    options = list(combinations_with_replacement(sorted(capacity), executors))
    serving = [option for option in options if all(any(a >> v & 1 for v in option) for a in demand)]
    total = sum(demand.values())
    beta = _BETA
    while True:
        flows = {option: _flows(option, capacity, demand, max(beta, 1.0)) for option in serving or options}
        able = [option for option in flows if _served(flows[option]) >= beta * total - 1e-9]
        if able or beta < _BETA_LEAST:
            break
        beta -= _BETA_STEP
    best = max(able or flows, key=lambda option: _accuracy(model, flows[option]))
    return Plan(best, {allowed: _ends(best, shares) for allowed, shares in flows[best].items() if sum(shares.values())})


def _capacities(model: ModelQueue, demand: Demand) -> dict[int, float]:
    """Samples per second that an executor serves with each variant that could be wanted."""
    wanted = 0
    for allowed in demand:
        wanted |= allowed & model.usable
    half_ns = int(model.typical_budget_ns / 2)
    variants = list(bits(wanted or model.eligible or model.usable))
    in_time = [v for v in variants if model.latency.largest_crowded(v, half_ns)] or variants
    sizes = {variant: model.throughput_batch(variant) for variant in in_time}
    return {variant: size * 1e9 / model.latency.crowded_ns(variant, size) for variant, size in sizes.items()}


def _flows(option: tuple[int, ...], capacity: Mapping[int, float], demand: Demand, scale: float) -> _Flows:
    """Who serves what: every class from the most accurate executors that have capacity left."""
    left = {variant: count * capacity[variant] for variant, count in Counter(option).items()}
    flows: _Flows = {}
    for allowed in sorted(demand, key=int.bit_count):
        wanted = demand[allowed] * scale
        flows[allowed] = {}
        for variant in sorted(left):
            if allowed >> variant & 1:
                flows[allowed][variant] = min(wanted, left[variant])
                wanted -= flows[allowed][variant]
                left[variant] -= flows[allowed][variant]
    return flows


def _served(flows: _Flows) -> float:
    return sum(flow for shares in flows.values() for flow in shares.values())


def _accuracy(model: ModelQueue, flows: _Flows) -> float:
    return sum(model.variants[v].proven_accuracy * flow for shares in flows.values() for v, flow in shares.items())


def _ends(option: tuple[int, ...], shares: Mapping[int, float]) -> tuple[float, ...]:
    counts, total = Counter(option), sum(shares.values())
    return tuple(accumulate(shares.get(variant, 0.0) / counts[variant] / total for variant in option))
