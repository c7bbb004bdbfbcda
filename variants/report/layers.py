"""Where a model spends its time and where it is fragile: cost against sensitivity, layer by layer.

Rules of this file: the cost is fp32's own profile, the sensitivity what a scan found when one layer alone was
quantised; layers meet by name, and those that only one side knows are left to the bars.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from variants.measurements import LayerTime
from variants.report import figures
from variants.report.bars import Bar
from variants.report.labels import Box
from variants.report.markup import Markup
from variants.report.plot import Axis, named, scales
from variants.report.svg import picture, symbol
from variants.variant import Verdict

SHOWN = 12
"""How many layers a picture names; the rest is summed up or left out."""


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer that both sides know: its share of the time, and the damage done by quantising it alone."""

    name: str
    share: float
    damage: float


def matched(times: Sequence[LayerTime], damages: Mapping[str, float]) -> list[Layer]:
    """The layers known to both, dearest first."""
    total = sum(layer.time_ns for layer in times) or 1
    return [Layer(t.name, t.time_ns / total, damages[t.name]) for t in times if t.name in damages]


def cost_against_sensitivity(layers: Sequence[Layer], width: float, height: float) -> Markup:
    """The picture: right is where time is to be won, up is where accuracy is to be lost."""
    says = "Layers by share of fp32's time and by damage when quantised alone: " + "; ".join(
        f"{layer.name} {figures.percent(layer.share, 1)}, {figures.significant(layer.damage)}" for layer in layers
    )
    plot = scales(width, height, [layer.share for layer in layers], [layer.damage for layer in layers], right=24)
    shapes = plot.axes(
        Axis("share of fp32's time", plot.x.ticks(int(width // 90)), _share),
        Axis("damage when quantised alone", plot.y.ticks(5), figures.significant),
    )
    spoken = sorted(layers, key=lambda layer: -layer.share - layer.damage / max(x.damage for x in layers))[:SHOWN]
    for layer in layers:
        tip = f"{layer.name}: {figures.percent(layer.share, 1)} of the time, damage {figures.significant(layer.damage)}"
        shapes.append(symbol(Verdict.PASSED, plot.x(layer.share), plot.y(layer.damage), 1, tip, radius=5))
    places = [(plot.x(layer.share), plot.y(layer.damage)) for layer in spoken]
    marks = [Box(plot.x(layer.share) - 6, plot.y(layer.damage) - 6, 12, 12) for layer in layers]
    shapes += named(places, [[figures.shortened(layer.name, 24)] for layer in spoken], marks, plot.area)
    return picture(width, height, says, shapes)


def time_bars(times: Sequence[LayerTime]) -> list[Bar]:
    """The dearest layers, and all others as one."""
    total = sum(layer.time_ns for layer in times) or 1
    rows = [
        Bar(f"{t.name} ({t.operator})", 1, t.time_ns, f"{figures.duration(t.time_ns)} · {_share(t.time_ns / total)}")
        for t in times[:SHOWN]
    ]  # fmt: skip
    if rest := times[SHOWN:]:
        spent = sum(layer.time_ns for layer in rest)
        shown = f"{figures.duration(spent)} · {_share(spent / total)}"
        rows.append(Bar(f"{len(rest)} more", 0, spent, shown, faint=True))
    return rows


def _share(share: float) -> str:
    return figures.percent(share, 0 if share >= 0.0995 else 1 if share >= 0.00095 else 2)
