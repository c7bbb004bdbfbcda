"""Why FitDrain misses where another would not: `python -m benchmarks.slo.ablation [--seeds 10]`.

Three runs of each cell with equal arrivals and luck: the fastest variant alone under its own policy, under FitDrain
with no other variant to choose, and FitDrain as it is. The first step is what the overload rule and admission cost,
the second what choosing better variants costs, since what runs when a burst comes cannot be interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from typing import NamedTuple

from benchmarks.slo.family import family
from benchmarks.slo.prefix import policy_named
from benchmarks.slo.scenarios import FASTEST, OURS, Scenario, arrivals, cases, setting
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey
from server.simulation.simulation import simulate
from server.simulation.summary import summarise

_TRACES = ("gamma 8", "superserve bursty", "diurnal", "square 2 s", "square 10 s")
_RHOS = (0.6, 0.8, 1.2)


class Reached(NamedTuple):
    """Attainment of one cell and seed: of the fastest variant under its own policy and under FitDrain, and of all."""

    fastest: float
    alone: float
    whole: float


def ablate(scenario: Scenario, seed: int) -> Reached:
    """The three runs of a cell with one seed. Raises what `arrivals` raises."""
    trace, whole = arrivals(scenario, seed), setting(scenario)
    model = ModelQueue(ModelKey("model", "1"), family())
    fastest = model.fastest(model.eligible)
    alone = replace(whole, variants=[model.variants[place] for place in (fastest,) if place is not None])
    runs = ((whole, FASTEST), (alone, OURS), (whole, OURS))
    return Reached(*(summarise(simulate(each, trace, policy_named(name), seed)).attainment for each, name in runs))


def main(words: Sequence[str]) -> int:
    """Run every cell with every seed and print a table of means."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.slo.ablation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    chosen = parser.parse_args(words)
    if min(chosen.seeds, chosen.processes) < 1:
        parser.error("--seeds and --processes must be at least 1")
    cells = [
        case.scenario
        for case in cases(1, azure=False)
        if case.policy == OURS and case.scenario.section == "main"
        if case.scenario.trace in _TRACES and case.scenario.rho in _RHOS
    ]
    print(f"| cell | {FASTEST} | {OURS}, fastest alone | {OURS} | overload rule | choice of variants |")
    print("|---|---|---|---|---|---|")
    with get_context("spawn").Pool(chosen.processes) as pool:
        for cell in cells:
            reached = pool.map(partial(ablate, cell), range(chosen.seeds))
            fastest, alone, whole = (sum(values) / len(reached) for values in zip(*reached, strict=True))
            print(
                f"| {cell.trace} ρ {cell.rho:g} | {fastest:.4f} | {alone:.4f} | {whole:.4f} "
                f"| {100 * (alone - fastest):+.2f} | {100 * (whole - alone):+.2f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
