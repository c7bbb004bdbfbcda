"""Pictures of lines: latency by batch size, losses by epoch, and what a recipe's search tried along its knob."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from variants.report import figures
from variants.report.labels import spread, text_width
from variants.report.markup import Markup, tag
from variants.report.plot import BOTTOM, TOP, Axis, Form, Plot, scales
from variants.report.svg import FONT, hue_class, line, picture, polyline, rect, symbol, text, title
from variants.variant import Verdict

_GAP = FONT * 1.2
"""From one name to the next below it."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; `faint` for what takes no traffic."""

    name: str
    hue: int
    points: Sequence[tuple[float, float]]
    faint: bool = False


def latencies(curves: Sequence[Curve], width: float, height: float) -> Markup:
    """Latency (nanoseconds) by batch size, both on logarithmic scales where they need it, named at the line's end."""
    batches = sorted({x for curve in curves for x, _ in curve.points})
    says = "Latency by batch size: " + "; ".join(
        f"{c.name} " + ", ".join(f"{figures.duration(y)} at {x:.0f}" for x, y in c.points) for c in curves
    )
    height = _tall_enough(curves, height)
    plot = _plot(curves, width, height, x_log=True)
    axes = plot.axes(
        Axis("batch size", _apart(plot, batches), lambda v: f"{v:.0f}"),
        Axis("latency of one batch", plot.y.ticks(5), figures.duration),
    )
    return picture(width, height, says, axes, [_curve(plot, c, figures.duration) for c in curves], _ends(plot, curves))


def losses(curves: Sequence[Curve], width: float, height: float) -> Markup:
    """Training losses by epoch."""
    most = max(len(curve.points) for curve in curves)
    says = "Training loss by epoch: " + "; ".join(
        f"{c.name} from {figures.significant(c.points[0][1])} to {figures.significant(c.points[-1][1])}" for c in curves
    )
    height = _tall_enough(curves, height)
    plot = _plot(curves, width, height, x_log=False)
    epochs = sorted({round(tick) for tick in plot.x.ticks(6) if 1 <= round(tick) <= most})
    axes = plot.axes(
        Axis("epoch", epochs, lambda v: f"{v:.0f}"), Axis("training loss", plot.y.ticks(4), figures.significant)
    )
    return picture(
        width, height, says, axes, [_curve(plot, c, figures.significant) for c in curves], _ends(plot, curves)
    )


def _tall_enough(curves: Sequence[Curve], height: float) -> float:
    """The height, or what the names need below each other if that is more."""
    return max(height, TOP + BOTTOM + _GAP * len(curves))


def _plot(curves: Sequence[Curve], width: float, height: float, *, x_log: bool) -> Plot:
    """Room at the right for the names."""
    names = max(text_width(_name(curve), FONT) for curve in curves)
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    return scales(width, height, xs, ys, right=min(names, width * 0.36) + 26, x_log=x_log)


def _name(curve: Curve) -> str:
    return figures.shortened(curve.name, 18)


def _apart(plot: Plot, values: Sequence[float]) -> list[float]:
    """Those values whose tick labels have room, the largest for certain."""
    kept: list[float] = []
    for value in reversed(values):
        if not kept or plot.x(kept[-1]) - plot.x(value) > 24:
            kept.append(value)
    return kept[::-1]


def _curve(plot: Plot, curve: Curve, form: Form) -> Markup:
    places = [(plot.x(x), plot.y(y)) for x, y in curve.points]
    hue = hue_class(curve.hue)
    dots = [
        tag("g", rect(px - 8, py - 8, 16, 16, "touch"), tag("circle", cx=px, cy=py, r=3, class_="dot"),
            title(f"{curve.name}: {form(y)} at {figures.significant(x)}"))
        for (px, py), (x, y) in zip(places, curve.points, strict=True)
    ]  # fmt: skip
    return tag("g", polyline(places, "curve"), dots, class_=f"{hue} faint" if curve.faint else hue)


def _ends(plot: Plot, curves: Sequence[Curve]) -> list[Markup]:
    """The names at the right, moved apart, each with a thin line to its curve's end."""
    ends = [(plot.x(curve.points[-1][0]), plot.y(curve.points[-1][1])) for curve in curves]
    heights = spread([y for _, y in ends], _GAP, plot.y.end, plot.y.start)
    left = plot.x.end + 14
    shapes = []
    for curve, (x, y), height in zip(curves, ends, heights, strict=True):
        shapes.append(line(x + 5, y, left - 3, height, f"leader {hue_class(curve.hue)}"))
        shapes.append(
            text(left, height + 4, [title(curve.name), _name(curve)], "label faint" if curve.faint else "label")
        )
    return shapes


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a search tried at one setting of its knob: how much it lost, and whether it would have passed the gate."""

    at: float
    drop: float
    passes: bool
    chosen: bool = False


def search(candidates: Sequence[Candidate], knob: str, form: Form, limit: float, width: float, height: float) -> Markup:
    """Accuracy drop of candidates along a knob; the gate's limit is shaded, the chosen candidate ringed."""
    along = sorted(candidates, key=lambda candidate: candidate.at)
    drops = [0.0, *(candidate.drop for candidate in along)]
    plot = scales(width, height, [candidate.at for candidate in along], drops, x_log=False, y_log=False)
    axes = plot.axes(
        Axis(knob, plot.x.ticks(5), form), Axis("accuracy drop", plot.y.ticks(4), lambda drop: figures.percent(drop, 1))
    )
    path = polyline([(plot.x(candidate.at), plot.y(candidate.drop)) for candidate in along], "front")
    says = f"Candidates by {knob}: " + "; ".join(_said(candidate, form) for candidate in along)
    marks = [_mark(plot, candidate, _said(candidate, form)) for candidate in along]
    return picture(width, height, says, _gate(plot, limit), axes, path, marks)


def _said(candidate: Candidate, form: Form) -> str:
    fate = "passes" if candidate.passes else "fails"
    return f"{form(candidate.at)}: drop {figures.percent(candidate.drop)}, {fate}{', chosen' * candidate.chosen}"


def _gate(plot: Plot, limit: float) -> list[Markup]:
    """What lies above the gate's limit is shaded, where that is in the picture."""
    if not plot.y.low < limit < plot.y.high:
        return []
    area, edge = plot.area, plot.y(limit)
    shade = rect(area.x, area.y, area.width, edge - area.y, "gate")
    return [shade, line(area.x, edge, area.x + area.width, edge, "limit")]


def _mark(plot: Plot, candidate: Candidate, tip: str) -> list[Markup]:
    x, y = plot.x(candidate.at), plot.y(candidate.drop)
    ring = [tag("circle", cx=x, cy=y, r=10, class_="chosen")] if candidate.chosen else []
    return [*ring, symbol(Verdict.PASSED if candidate.passes else Verdict.REJECTED, x, y, 1, tip)]
