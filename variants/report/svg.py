"""The few shapes that the pictures are made of, as inline SVG that takes its colours from the page's style.

Rules of this file: colours are classes, so that light and dark follow the reader; a hue `h0` is the reference, `h1` to
`h12` are variants in turn. A verdict is a shape, never a colour alone.
"""

from __future__ import annotations

from variants.report.markup import Content, Markup, join, tag
from variants.variant import Verdict

FONT = 12.0
HUES = 12
"""How many colours variants share; beyond them colours repeat, and labels tell."""

_LARGEST = 1.15
"""How far a picture grows with the screen, lest its text outgrow the page's."""


def hue_class(hue: int) -> str:
    """The class that carries a variant's colour: 0 is the reference."""
    return f"h{0 if hue == 0 else (hue - 1) % HUES + 1}"


def picture(width: float, height: float, description: str, *shapes: Content, class_: str | None = None) -> Markup:
    """A picture that screen readers announce by its description."""
    return tag(
        "svg", shapes, viewBox=f"0 0 {width:.0f} {height:.0f}", width=width, height=height,
        style=f"max-width: {width * _LARGEST:.0f}px", role="img", aria_label=description, class_=class_,
    )  # fmt: skip


def both(wide: Markup, narrow: Markup, middle: Markup | None = None) -> Markup:
    """The same picture for wide screens, for phones and, if it is large, for those between; the style shows one."""
    if middle is None:
        return join(tag("div", wide, class_="wide middle"), tag("div", narrow, class_="narrow"))
    return join(
        tag("div", wide, class_="wide"), tag("div", middle, class_="middle"), tag("div", narrow, class_="narrow")
    )


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """A straight line."""
    return tag("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rect(x: float, y: float, width: float, height: float, class_: str, *content: Content, rx: float = 0) -> Markup:
    """A rectangle, with round corners if asked."""
    return tag("rect", content, x=x, y=y, width=max(0.0, width), height=max(0.0, height), rx=rx or None, class_=class_)


def text(x: float, y: float, content: Content, class_: str = "", anchor: str = "start") -> Markup:
    """A line of text on its baseline; `anchor` is start, middle or end."""
    return tag("text", content, x=x, y=y, text_anchor=None if anchor == "start" else anchor, class_=class_ or None)


def polyline(points: list[tuple[float, float]], class_: str) -> Markup:
    """A line through points."""
    return tag("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)


def title(content: str) -> Markup:
    """What a mouse over a shape shows."""
    return tag("title", content)


def symbol(verdict: Verdict, x: float, y: float, hue: int, tip: str = "", *, radius: float = 6.0) -> Markup:
    """The mark of a verdict: a disc passed, a cross fell, a hollow triangle is inconclusive, a hollow square unproven.

    The reference (hue 0) that passed is a diamond.
    """
    r, shown = radius, f"mark {hue_class(hue)} {verdict}"
    about = title(tip) if tip else None
    if verdict is Verdict.REJECTED:
        arm = r * 0.8
        strokes = (
            f"M{x - arm:.1f} {y - arm:.1f}l{2 * arm:.1f} {2 * arm:.1f}m0 {-2 * arm:.1f}l{-2 * arm:.1f} {2 * arm:.1f}"
        )
        return tag("g", rect(x - r, y - r, 2 * r, 2 * r, "touch"), tag("path", d=strokes), about, class_=shown)
    if verdict is Verdict.INCONCLUSIVE:
        path = f"M{x:.1f} {y - r:.1f}L{x + r:.1f} {y + r * 0.8:.1f}H{x - r:.1f}Z"
    elif verdict is Verdict.UNVERIFIED:
        path = f"M{x - r * 0.85:.1f} {y - r * 0.85:.1f}h{1.7 * r:.1f}v{1.7 * r:.1f}h{-1.7 * r:.1f}Z"
    elif hue == 0:
        arm = r * 1.25
        path = f"M{x:.1f} {y - arm:.1f}l{arm:.1f} {arm:.1f}l{-arm:.1f} {arm:.1f}l{-arm:.1f} {-arm:.1f}Z"
    else:
        return tag("circle", about, cx=x, cy=y, r=r, class_=shown)
    return tag("path", about, d=path, class_=shown)
