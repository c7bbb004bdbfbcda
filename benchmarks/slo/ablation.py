"""Why FitDrain misses what it misses: `python -m benchmarks.slo.ablation [--seeds 10]`.

Each row is one cell of the comparison, run several times with equal arrivals and luck but for one thing.

*Choice.* The fastest variant under its own policy, under FitDrain with no other variant to choose, and FitDrain as it
is. The first step is what the overload rule and admission cost, the second what choosing better variants costs, since
what runs when a burst comes cannot be interrupted.

*Strict.* The strict class of mixed floors, as it is, with `priority` 1, and with nobody else there. What it misses
alone no scheduler of this kind would answer; what it misses beside others is what they gain by it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context

from benchmarks.slo.family import family
from benchmarks.slo.matrix import group_of
from benchmarks.slo.prefix import policy_named
from benchmarks.slo.scenarios import FASTEST, OURS, Scenario, arrivals, cases, setting
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey
from server.simulation.simulation import Simulation, simulate
from server.simulation.summary import summarise
from server.trace import Arrival

_TRACES = ("poisson", "gamma 8", "superserve bursty", "diurnal", "square 2 s", "square 10 s")
_RHOS = (0.6, 0.8, 1.2)
_STRICT = "strict"

Row = tuple[float, ...]


def choice(scenario: Scenario, seed: int) -> Row:
    """Attainment of the fastest variant under its own policy, under FitDrain, and of FitDrain with all variants."""
    trace, whole = arrivals(scenario, seed), setting(scenario)
    model = ModelQueue(ModelKey("model", "1"), family())
    fastest = model.fastest(model.eligible)
    alone = replace(whole, variants=[model.variants[place] for place in (fastest,) if place is not None])
    runs = ((whole, FASTEST), (alone, OURS), (whole, OURS))
    return tuple(summarise(simulate(each, trace, policy_named(name), seed)).attainment for each, name in runs)


def strict(scenario: Scenario, seed: int) -> Row:
    """Attainment of the strict class and of all: as it is, with `priority` 1; then of the strict class alone."""

    def run(trace: Sequence[Arrival]) -> Simulation:
        return simulate(setting(scenario), trace, policy_named(OURS), seed)

    def is_strict(arrival: Arrival) -> bool:
        return group_of(scenario, arrival) == _STRICT

    trace = arrivals(scenario, seed)
    first = [replace(each, slo=replace(each.slo, priority=1)) if is_strict(each) else each for each in trace]
    shares = [share for each in (trace, first) for share in (_share(run(each), is_strict), _share(run(each)))]
    return (*shares, _share(run([each for each in trace if is_strict(each)])))


def _share(simulation: Simulation, counts: Callable[[Arrival], bool] = lambda _: True) -> float:
    """The share in time of the arrivals that count; 1 where none does."""
    pairs = zip(simulation.trace, simulation.ended, strict=True)
    ends = [end is not None and end.in_time for arrival, end in pairs if counts(arrival)]
    return sum(ends) / len(ends) if ends else 1.0


def main(words: Sequence[str]) -> int:
    """Run every cell with every seed and print two tables of means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo.ablation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(words)
    if min(chosen.seeds, chosen.processes) < 1:
        parser.error("--seeds and --processes must be at least 1")
    cells = [case.scenario for case in cases(1, azure=False) if case.policy == OURS]
    with get_context("spawn").Pool(chosen.processes) as pool:

        def means(measure: Callable[[Scenario, int], Row], cell: Scenario) -> Row:
            rows = pool.map(partial(measure, cell), range(chosen.seeds))
            return tuple(sum(column) / len(rows) for column in zip(*rows, strict=True))

        print(f"| cell | {FASTEST} | {OURS}, fastest alone | {OURS} | overload rule | choice of variants |")
        print("|---|---|---|---|---|---|")
        for cell in cells:
            if cell.section == "main" and cell.trace in _TRACES and cell.rho in _RHOS:
                fastest, alone, whole = means(choice, cell)
                costs = f"{100 * (alone - fastest):+.2f} | {100 * (whole - alone):+.2f}"
                print(f"| {cell.trace} ρ {cell.rho:g} | {_four(fastest, alone, whole)} | {costs} |", flush=True)
        print("\n| cell | strict | all | strict, priority 1 | all | strict, nobody else |")
        print("|---|---|---|---|---|---|")
        for cell in cells:
            if cell.section == "floors":
                print(f"| {cell.trace} ρ {cell.rho:g}, {cell.floors} | {_four(*means(strict, cell))} |", flush=True)
    return 0


def _four(*shares: float) -> str:
    return " | ".join(f"{share:.4f}" for share in shares)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
