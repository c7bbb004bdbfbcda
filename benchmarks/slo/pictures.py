"""The comparison's pictures, as small SVG files that are equal for equal results.

matplotlib is loaded when the first picture is drawn: whoever only measures does without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.slo.analysis import ATTAINMENT, MEAN_ACCURACY, Runs
from benchmarks.slo.family import family
from benchmarks.slo.prefix import policy_named
from benchmarks.slo.scenarios import APART, BOUND, BY_CLASS, OURS, Scenario, arrivals, setting
from server.simulation.simulation import Simulation, simulate

_BINS_PER_S = 4
_LEAST_MISSED = 1e-5  # the log scale's floor: none missed is drawn here
_SHOWN = (
    OURS, "slackfit+ed", "maxbatch+ed", "fixed-fastest+ed", "proteus-1s+ed", "proteus-10s+ed",
    "model-switching-1s+ed", "model-switching-0.1s+ed", "infaas+ed",
)  # fmt: skip


def draw(runs: Runs, folder: Path) -> list[tuple[str, str]]:
    """Draw what the results allow; returns (what it shows, file name) for each picture."""
    folder.mkdir(parents=True, exist_ok=True)
    return [
        (shows, _save(figure, folder / f"{file}.svg"))
        for draw_one in (_by_load, _accuracy, _timeline, _floors)
        for shows, file, figure in draw_one(runs)
    ]


_Picture = Iterator[tuple[str, str, Any]]


def _by_load(runs: Runs) -> _Picture:
    """Attainment against load."""
    cells = runs.scenarios("main", lambda cell: cell.trace == "gamma 8")
    if not cells:
        return
    figure, (axes,) = _figure(1, 3.4)
    for policy in (*_SHOWN, BOUND):
        there = sorted((cell for cell in cells if runs.seeds(cell, policy)), key=lambda cell: cell.rho)
        values = [100 * runs.mean(cell, policy, ATTAINMENT) for cell in there]
        axes.plot([cell.rho for cell in there], values, label=policy, **_style(policy))
    axes.set(xlabel="load ρ", ylabel="answered in time, %", title="gamma arrivals, CV² 8")
    _legend(figure, axes)
    yield "Attainment by load, gamma arrivals of CV² 8", "attainment-by-load", figure


def _accuracy(runs: Runs) -> _Picture:
    """Accuracy against misses, averaged over the traces that all policies ran."""
    rhos = sorted({cell.rho for cell in runs.scenarios("main") if 0.6 <= cell.rho <= 0.8})
    if not rhos:
        return
    figure, panels = _figure(len(rhos), 3.2)
    for axes, rho in zip(panels, rhos, strict=True):
        cells = runs.scenarios("main", lambda cell, rho=rho: cell.rho == rho)  # type: ignore[misc]
        axes.set(xscale="log", xlim=(_LEAST_MISSED / 2, 1))
        for policy in _SHOWN:
            if not all(runs.seeds(cell, policy) for cell in cells):
                continue
            missed = 1 - np.mean([runs.mean(cell, policy, ATTAINMENT) for cell in cells])
            accuracy = np.mean([runs.mean(cell, policy, MEAN_ACCURACY) for cell in cells])
            axes.plot([max(missed, _LEAST_MISSED)], [100 * accuracy], "o", label=policy, color=_colour(policy))
        axes.set(
            xlabel="missed, share of all requests",
            title=f"ρ {rho:g}, mean of all traces",
        )
    panels[0].set_ylabel("mean accuracy in time, %")
    _legend(figure, panels[0])
    yield "Accuracy against misses (up and left is better)", "accuracy-against-misses", figure


def _timeline(runs: Runs) -> _Picture:
    """Which variants answer while the rate jumps, for ours and a periodic planner."""
    cells = runs.scenarios("main", lambda cell: cell.trace.startswith("square") and cell.rho == 0.6)
    if not cells:
        return
    scenario = cells[-1]
    figure, panels = _figure(2, 3.2, share_y=True)
    trace = arrivals(scenario, 0)
    for axes, policy in zip(panels, (OURS, "proteus-10s+ed"), strict=True):
        simulation = simulate(setting(scenario), trace, policy_named(policy), 0)
        edges, counts, missed = _per_bin(simulation, scenario)
        names = [variant.name for variant in simulation.model.variants]
        colours = _colour_map("viridis", len(names))
        axes.stackplot(edges, [*counts, missed], labels=[*names, "missed"], colors=[*colours, "#d62728"], step="post")
        axes.set(xlabel="time, s", title=policy)
    panels[0].set_ylabel("requests per s")
    _legend(figure, panels[0])
    yield f"Which variant answers while the rate jumps ({scenario.trace}, ρ {scenario.rho:g})", "timeline", figure


def _per_bin(simulation: Simulation, scenario: Scenario) -> tuple[Any, list[Any], Any]:
    """Rates by the time of arrival: bins' starts in s, answered in time by each variant, and missed."""
    bins = scenario.seconds * _BINS_PER_S
    at = np.array([arrival.at_ns / 1e9 for arrival in simulation.trace])
    place = np.array([end.place if end is not None and end.in_time else -1 for end in simulation.ended])

    def rate(which: int) -> Any:
        return np.histogram(at[place == which], bins=bins, range=(0, scenario.seconds))[0] * _BINS_PER_S

    return np.arange(bins) / _BINS_PER_S, [rate(index) for index in range(len(family()))], rate(-1)


def _floors(runs: Runs) -> _Picture:
    """The strict class, by policy."""
    cells = [
        cell
        for floors in (BY_CLASS, APART)
        for cell in runs.scenarios("floors", lambda cell, floors=floors: cell.floors == floors)  # type: ignore[misc]
    ]
    if not cells:
        return
    policies = [policy for policy in runs.policies(cells[0]) if policy != BOUND]
    figure, panels = _figure(2, 3.2, share_y=True)
    for axes, group, title in zip(panels, ("strict", ""), ("the strict class", "all requests"), strict=True):
        for number, policy in enumerate(policies):
            values = [
                100 * (runs.share(cell, policy, group) if group else runs.mean(cell, policy, ATTAINMENT))
                for cell in cells
            ]
            at = np.arange(len(cells)) + 0.2 * (number - (len(policies) - 1) / 2)
            axes.bar(at, values, width=0.2, label=policy, color=_colour(policy))
        labels = [f"{cell.trace} ρ {cell.rho:g}\n{cell.floors}" for cell in cells]
        axes.set_xticks(range(len(cells)), labels, fontsize=6, rotation=60)
        axes.set_title(title)
    panels[0].set_ylabel("answered in time, %")
    _legend(figure, panels[0])
    yield "Mixed accuracy floors", "mixed-floors", figure


def _figure(panels: int, height: float, *, share_y: bool = False) -> tuple[Any, Sequence[Any]]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "gearshift", "svg.fonttype": "none", "font.size": 8})
    figure = Figure(figsize=(6 if panels == 1 else 4.2 * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, sharey=share_y, squeeze=False)[0]
    for each in axes:
        each.grid(alpha=0.3)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """Beside the panels, where it covers nothing."""
    figure.legend(*axes.get_legend_handles_labels(), fontsize=7, loc="outside right upper")


def _save(figure: Any, path: Path) -> str:
    figure.savefig(path, metadata={"Date": None})
    return path.name


_COLOUR_OF: Callable[[str], int] = [*_SHOWN, "prefix", "prefix+ed"].index


def _colour(policy: str) -> str:
    """A policy's colour is the same in every picture; ours is black."""
    return "black" if policy == OURS else f"C{(_COLOUR_OF(policy) - 1) % 10}"


def _style(policy: str) -> dict[str, Any]:
    if policy == BOUND:
        return {"color": "grey", "linestyle": "--"}
    return {"color": _colour(policy), "marker": "o", "markersize": 3, "linewidth": 2.2 if policy == OURS else 1.2}


def _colour_map(named: str, count: int) -> list[Any]:
    import matplotlib as mpl

    return [mpl.colormaps[named](share) for share in np.linspace(0.95, 0.15, count)]
