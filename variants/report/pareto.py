"""Accuracy against latency: every variant with its interval, the Pareto front, the reference and the gate.

Rules of this file: an accuracy is the reference's minus the paired drop, and its whisker is the interval that the gate
judges; so a whisker that reaches into the shaded area is a variant that is not proven. What lies far below the gate
stands at the lower edge with its value, since it would flatten everything else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from variants.report import figures
from variants.report.facts import Accuracy, ModelFacts, VariantFacts
from variants.report.labels import Box
from variants.report.markup import Markup, tag
from variants.report.plot import BOTTOM, LEFT, TOP, Axis, Plot, named
from variants.report.scales import Scale, spanning
from variants.report.svg import hue_class, line, picture, polyline, rect, symbol, text, title
from variants.summary import proven_drop
from variants.verify import REFERENCE_RUNTIME

_FAR = 3.0
"""How many times the gate's drop below the reference the picture reaches before it cuts variants off."""

_LOOSE = 0.1
"""A gate that allows more than this drop has no place in the picture unless a variant comes near it."""

_NAMED, _ROOM = 10, 50.0
"""How many variants beside fp32 and those on the front are named at most, and how much width each of them needs."""

_WIDE = 700.0
"""From this width on there is room for speeds beside the names."""


@dataclass(frozen=True, slots=True)
class Point:
    """One variant in the picture."""

    variant: VariantFacts
    latency: int
    accuracy: Accuracy
    on_front: bool


def points_of(model: ModelFacts, batch: int) -> list[Point]:
    """The variants with both evidence and a latency at this batch size: the front first, then by latency."""
    front = [variant.name for variant in model.front(batch)]
    points = []
    for variant in model.variants:
        accuracy = variant.accuracy(model.reference) if model.reference else None
        if accuracy is not None and batch in variant.latencies:
            points.append(Point(variant, variant.latencies[batch], accuracy, variant.name in front))
    return sorted(points, key=lambda point: (not point.on_front, point.latency))


def named_points(points: Sequence[Point], width: float) -> list[Point]:
    """Those with a label: the front, fp32, and of the others as many as can be read; a mark's tooltip names any."""
    first = [point for point in points if point.on_front or point.variant.hue == 0]
    return [*first, *[point for point in points if point not in first][: min(_NAMED, int(width // _ROOM))]]


def draw(model: ModelFacts, batch: int, width: float, height: float) -> Markup:
    """The picture at one batch size; needs at least one point."""
    points = points_of(model, batch)
    drawing = _Drawing(
        model, batch, points, Plot(width, height, _x_scale(points, width), _y_scale(model, points, height))
    )
    return picture(
        width, height, drawing.says(), drawing.gate(), drawing.axes(), drawing.reference(),
        polyline(drawing.front(), "front"), [drawing.mark(point) for point in reversed(points)], drawing.labels(),
    )  # fmt: skip


def _top(model: ModelFacts, points: Sequence[Point]) -> float:
    """The reference's score."""
    proof = model.reference.home if model.reference else None
    return proof.score.value if proof else max(point.accuracy.value for point in points)


def _x_scale(points: Sequence[Point], width: float) -> Scale:
    return spanning([point.latency for point in points], LEFT, width - 20, padding=0.08)


def _y_scale(model: ModelFacts, points: Sequence[Point], height: float) -> Scale:
    """Reference and gate with some air, and every whisker that is not far below."""
    top, drop = _top(model, points), model.config.gate.max_accuracy_drop
    far = top - _FAR * max(drop, 0.005) if drop <= _LOOSE else float("-inf")
    ends = [end for p in points for end in (p.accuracy.low, p.accuracy.high, p.accuracy.value)]
    kept = [top, *(end for end in ends if end >= far), *([top - drop] if drop <= _LOOSE else [])]
    margin = max(max(kept) - min(kept), 0.002) * 0.09
    return Scale(min(kept) - margin, max(kept) + margin, height - BOTTOM, TOP)


@dataclass(frozen=True, slots=True)
class _Drawing:
    """The parts of one picture."""

    model: ModelFacts
    batch: int
    points: Sequence[Point]
    plot: Plot

    def says(self) -> str:
        """The picture in words."""
        metric = self.model.config.metric
        return f"{figures.metric_name(metric)} against latency at batch {self.batch}: " + "; ".join(
            f"{p.variant.name} {figures.score(p.accuracy.value, metric)} in {figures.duration(p.latency)}"
            for p in self.points
        )

    def axes(self) -> list[Markup]:
        """Both axes."""
        metric, plot = self.model.config.metric, self.plot
        return plot.axes(
            Axis(f"latency at batch {self.batch}", plot.x.ticks(int(plot.width // 110)), figures.duration),
            Axis(figures.metric_name(metric), plot.y.ticks(5), lambda value: figures.score(value, metric)),
        )

    @property
    def limit(self) -> float | None:
        """The height of the gate's limit, None where it is not in the picture."""
        limit = _top(self.model, self.points) - self.model.config.gate.max_accuracy_drop
        return self.plot.y(limit) if limit > self.plot.y.low else None

    def gate(self) -> list[Markup]:
        """What lies below the gate's limit is shaded."""
        if self.limit is None:
            return []
        area, edge = self.plot.area, self.limit
        label = f"gate: at most {figures.percent(self.model.config.gate.max_accuracy_drop)} below fp32"
        return [
            rect(area.x, edge, area.width, self.plot.y.start - edge, "gate"),
            line(area.x, edge, self.plot.x.end, edge, "limit"),
            text(self.plot.x.end - 6, edge + 15, label, "limit-label", "end"),
        ]

    def reference(self) -> list[Markup]:
        """Dotted lines where fp32 is on ONNX Runtime: better is left of it, worse below."""
        plot, latency = self.plot, self.model.baseline(self.batch)
        height = plot.y(_top(self.model, self.points))
        shapes = [line(plot.x.start, height, plot.x.end, height, "reference")]
        if latency is not None and plot.x.low <= latency <= plot.x.high:
            shapes.append(line(plot.x(latency), plot.y.end, plot.x(latency), plot.y.start, "reference"))
        return shapes

    def front(self) -> list[tuple[float, float]]:
        """The front as a staircase along what is proven, the lower ends of the whiskers, as the gate judges."""
        top, stairs = _top(self.model, self.points), list[tuple[float, float]]()
        for point in (point for point in self.points if point.on_front):
            proven = top - proven_drop(point.variant.card, point.variant.runtime or "")
            x, y = self.plot.x(point.latency), self.plot.y(proven)
            stairs += [(x, stairs[-1][1] if stairs else y), (x, y)]
        return [*stairs, (self.plot.x.end, stairs[-1][1])] if stairs else []

    def is_cut(self, point: Point) -> bool:
        """Whether a variant lies below what is shown."""
        return point.accuracy.value < self.plot.y.low

    def mark(self, point: Point) -> Markup:
        """A variant's symbol on its whisker, or an arrow down where it is cut off."""
        accuracy, verdict, hue = point.accuracy, point.variant.card.gate.verdict, hue_class(point.variant.hue)
        x, y, tip = self.plot.x(point.latency), self.plot.y(accuracy.value), title(self._tip(point))
        if self.is_cut(point):
            arrow = tag("path", d=f"M{x - 5:.1f} {y - 9:.1f}h10l-5 8z", class_=f"cut {hue}")
            return tag("g", tip, rect(x - 8, y - 12, 16, 14, "touch"), arrow)
        low, high = self.plot.y(accuracy.low), self.plot.y(accuracy.high)
        caps = (low, high) if low - high > 1 else ()
        whisker = [line(x, low, x, high, f"whisker {hue}"), *(line(x - 4, y, x + 4, y, f"whisker {hue}") for y in caps)]
        return tag("g", tip, whisker, symbol(verdict, x, y, point.variant.hue))

    def _tip(self, point: Point) -> str:
        metric, accuracy, variant = self.model.config.metric, point.accuracy, point.variant
        bounds = f"[{figures.score(accuracy.low, metric)}, {figures.score(accuracy.high, metric)}]"
        shown = f"{figures.score(accuracy.value, metric)} {bounds}, {figures.duration(point.latency)}"
        return f"{variant.name} on {variant.runtime}: {variant.card.gate.verdict}, {shown}"

    def labels(self) -> list[Markup]:
        """Names beside the points, off the whiskers, the front and the gate's label."""
        plot, stairs = self.plot, self.front()
        taken = [
            Box(plot.x(p.latency) - 4, plot.y(p.accuracy.high), 8, plot.y(p.accuracy.low) - plot.y(p.accuracy.high))
            for p in self.points if not self.is_cut(p)
        ]  # fmt: skip
        for (x1, y1), (x2, y2) in pairwise(stairs):
            taken.append(Box(min(x1, x2) - 2, min(y1, y2) - 2, abs(x2 - x1) + 4, abs(y2 - y1) + 4))
        if self.limit is not None:
            taken.append(Box(plot.x.end - 200, self.limit, 200, 20))
        bounds = Box(plot.x.start + 2, plot.y.end - 12, plot.x.end - plot.x.start + 14, plot.y.start - plot.y.end + 8)
        spoken = named_points(self.points, plot.width)
        places = [(plot.x(point.latency), plot.y(point.accuracy.value)) for point in spoken]
        taken += [Box(plot.x(p.latency) - 7, plot.y(p.accuracy.value) - 7, 14, 14) for p in self.points]
        return named(places, [self._label(point) for point in spoken], taken, bounds)

    def _label(self, point: Point) -> list[str]:
        """The name, and where there is room the speed against fp32 on ONNX Runtime; the value of what is cut off."""
        name, speed = figures.shortened(point.variant.name, 22), point.variant.speed
        if self.is_cut(point):
            return [f"{name}: {figures.score(point.accuracy.value, self.model.config.metric)}"]
        is_baseline = speed is not None and point.variant.hue == 0 and speed.runtime == REFERENCE_RUNTIME
        if speed is None or is_baseline or self.batch not in speed.speed_ups or self.plot.width < _WIDE:
            return [name]
        return [name, f"{figures.ratio(speed.speed_ups[self.batch])} speed"]
