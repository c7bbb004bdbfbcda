"""What the runs say: means over seeds, and paired differences between policies with their confidence intervals.

Differences are paired by seed, since a seed gives all policies the same arrivals and luck, and their intervals are
percentile bootstraps over seeds (95 %). The unit is always the fraction; a report makes points of it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.slo.matrix import Result
from benchmarks.slo.scenarios import Scenario

_RESAMPLES = 10_000

ATTAINMENT, MEAN_ACCURACY, EFFECTIVE = "attainment", "mean_accuracy", "effective_accuracy"


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean of paired differences with its 95 % interval, over so many seeds."""

    mean: float
    low: float
    high: float
    seeds: int


class Runs:
    """The results by scenario, policy and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self._figures: dict[tuple[Scenario, str], dict[int, dict[str, Any]]] = defaultdict(dict)
        self.codes = set[str]()
        for result in results:
            self._figures[result.case.scenario, result.case.policy][result.case.seed] = result.figures
            self.codes.add(result.code)

    def __len__(self) -> int:
        return sum(len(seeds) for seeds in self._figures.values())

    def scenarios(self, section: str, keep: Callable[[Scenario], bool] = lambda _: True) -> list[Scenario]:
        """The scenarios of a section in the order in which they were first seen."""
        found = dict.fromkeys(scenario for scenario, _ in self._figures if scenario.section == section)
        return [scenario for scenario in found if keep(scenario)]

    def policies(self, scenario: Scenario) -> list[str]:
        """What ran in a scenario."""
        return [policy for each, policy in self._figures if each == scenario]

    def seeds(self, scenario: Scenario, policy: str) -> dict[int, dict[str, Any]]:
        """The figures by seed; empty where it never ran."""
        return self._figures.get((scenario, policy), {})

    def mean(self, scenario: Scenario, policy: str, name: str) -> float:
        """A figure's mean over the seeds. Raises ValueError where it never ran."""
        values = [float(figures[name]) for figures in self.seeds(scenario, policy).values()]
        if not values:
            raise ValueError(f"{policy} never ran in {scenario}")
        return sum(values) / len(values)

    def total(self, scenario: Scenario, policy: str, group: str) -> tuple[int, int]:
        """How many requests of a group there were over all seeds, and how many were answered in time."""
        counts = [figures["groups"].get(group, (0, 0)) for figures in self.seeds(scenario, policy).values()]
        return sum(count for count, _ in counts), sum(in_time for _, in_time in counts)

    def share(self, scenario: Scenario, policy: str, group: str) -> float:
        """A group's attainment over all seeds; 1 where the group is empty."""
        count, in_time = self.total(scenario, policy, group)
        return in_time / count if count else 1.0

    def paired(self, scenario: Scenario, policy: str, other: str, name: str) -> Difference:
        """A figure of one policy minus the other's. Raises ValueError where they share no seed."""
        ours, theirs = self.seeds(scenario, policy), self.seeds(scenario, other)
        return bootstrap([ours[seed][name] - theirs[seed][name] for seed in sorted(ours.keys() & theirs.keys())])

    def told_early(self, scenario: Scenario, policy: str) -> tuple[float, float]:
        """Requests that were not answered in time over all seeds, and how many of them were told early."""
        missed = told = 0.0
        for figures in self.seeds(scenario, policy).values():
            misses = figures["requests"] * (1 - figures[ATTAINMENT])
            missed += misses
            told += misses * figures["told_early"]
        return missed, told


def bootstrap(differences: list[float]) -> Difference:
    """The mean and its percentile bootstrap interval, repeatable. Raises ValueError for an empty list."""
    if not differences:
        raise ValueError("there is nothing to compare: no seed that both have run")
    values = np.array(differences)
    drawn = np.random.default_rng(0).integers(0, values.size, (_RESAMPLES, values.size))
    low, high = np.quantile(values[drawn].mean(axis=1), [0.025, 0.975])
    return Difference(float(values.mean()), float(low), float(high), values.size)
