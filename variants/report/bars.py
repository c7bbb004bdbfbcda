"""Pictures of bars: a name and a value on one line, the bar below it, so that any name has room on any screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from variants.report import figures
from variants.report.labels import text_width
from variants.report.markup import Markup, tag
from variants.report.svg import FONT, hue_class, picture, rect, text, title

_ROW, _BAR = 38.0, 9.0


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar: `value` decides its length, `inner` that of a darker bar within, `shown` is what is written."""

    name: str
    hue: int
    value: float
    shown: str
    inner: float | None = None
    faint: bool = False


def draw(bars: Sequence[Bar], what: str, width: float, *, baseline: float | None = None) -> Markup:
    """Bars from zero, in the order given; a tick marks `baseline` on every one."""
    most = max([bar.value for bar in bars] + [baseline or 0.0]) or 1.0
    says = f"{what}: " + "; ".join(f"{bar.name} {bar.shown}" for bar in bars)
    rows = [_row(bar, number * _ROW, most, width, baseline) for number, bar in enumerate(bars)]
    return picture(width, len(bars) * _ROW, says, rows)


def _row(bar: Bar, top: float, most: float, width: float, baseline: float | None) -> Markup:
    room = int((width - text_width(bar.shown, FONT) - 12) / text_width("n", FONT))
    bar_top = top + 20
    shapes = [
        title(f"{bar.name}: {bar.shown}"),
        text(0, top + 14, figures.shortened(bar.name, max(8, room)), "label"),
        text(width, top + 14, bar.shown, "value", "end"),
        rect(0, bar_top, width, _BAR, "track", rx=2),
        rect(0, bar_top, max(2.0, bar.value / most * width), _BAR, "bar" if bar.inner is None else "bar outer", rx=2),
    ]
    if bar.inner is not None:
        shapes.append(rect(0, bar_top, max(1.0, bar.inner / most * width), _BAR, "bar", rx=2))
    if baseline is not None:
        shapes.append(rect(min(baseline / most * width, width - 1.5), bar_top - 2, 1.5, _BAR + 4, "baseline"))
    return tag("g", shapes, class_=hue_class(bar.hue) + (" faint" if bar.faint else ""))
