"""The frame of a picture with two axes: a plain grid, tick labels, and titles read without tilting one's head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from variants.report.figures import plain
from variants.report.labels import LINE, Anchor, Box, place, text_width
from variants.report.markup import Markup
from variants.report.scales import Scale, spanning
from variants.report.svg import FONT, line, text

Form = Callable[[float], str]

TOP, BOTTOM, LEFT = 30.0, 42.0, 54.0
"""Room for the y title, the x ticks with their title, and the y ticks."""

_LEADER = 16.0
"""A label farther from its point than this needs a line to it."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Two scales in a picture."""

    width: float
    height: float
    x: Scale
    y: Scale

    @property
    def area(self) -> Box:
        """Where the data lie."""
        left, bottom, top = self.x.start, self.y.start, self.y.end
        return Box(left, top, self.x.end - left, bottom - top)

    def axes(self, x: Axis, y: Axis) -> list[Markup]:
        """Grid, ticks and titles."""
        area = self.area
        right, bottom = area.x + area.width, area.y + area.height
        shapes = [line(area.x, self.y(v), right, self.y(v), "grid") for v in y.at]
        shapes += [text(area.x - 8, self.y(v) + 4, plain(y.form(v)), "tick", "end") for v in y.at]
        shapes += [line(self.x(v), bottom, self.x(v), bottom + 4, "axis") for v in x.at]
        shapes += [text(self.x(v), bottom + 17, plain(x.form(v)), "tick", "middle") for v in x.at]
        shapes.append(line(area.x, bottom, right, bottom, "axis"))
        shapes.append(text(4, 14, y.title, "title"))
        shapes.append(text(right, self.height - 6, x.title, "title", "end"))
        return shapes


@dataclass(frozen=True, slots=True)
class Axis:
    """What is written along an axis."""

    title: str
    at: Sequence[float]
    form: Form


def scales(
    width: float, height: float, xs: Sequence[float], ys: Sequence[float], *, right: float = 16.0,
    x_log: bool | None = None, y_log: bool | None = None,
) -> Plot:  # fmt: skip
    """A plot with room for all values; logarithmic where they need it, unless told."""
    x = spanning(xs, LEFT, width - right, log=x_log)
    return Plot(width, height, x, spanning(ys, height - BOTTOM, TOP, log=y_log))


def named(
    points: Sequence[tuple[float, float]], names: Sequence[Sequence[str]], obstacles: Sequence[Box], bounds: Box
) -> list[Markup]:
    """A label of one or more lines beside each point, with a thin leader where there was no room close by."""
    anchors = [
        Anchor(x, y, max(text_width(words, FONT) for words in lines), FONT * LINE * len(lines))
        for (x, y), lines in zip(points, names, strict=True)
    ]
    shapes = []
    for anchor, lines, box in zip(anchors, names, place(anchors, obstacles, bounds), strict=True):
        x, y = box.nearest(anchor.x, anchor.y)
        if (x - anchor.x) ** 2 + (y - anchor.y) ** 2 > _LEADER**2:
            shapes.append(line(anchor.x, anchor.y, x, y, "leader"))
        at, side = _near_side(anchor, box)
        for number, words in enumerate(lines):
            style = "label" if number == 0 else "label sub"
            shapes.append(text(at, box.y + FONT * (number * LINE + 0.95), words, style, side))
    return shapes


def _near_side(anchor: Anchor, box: Box) -> tuple[float, str]:
    """Where text is tied to its box: at the side of its point, so that a width guessed wrong shows at the other one."""
    if box.x + box.width <= anchor.x:
        return box.x + box.width, "end"
    return (box.x, "start") if box.x >= anchor.x else (box.x + box.width / 2, "middle")
