"""Where labels go, so that they stand beside what they name and cover neither it nor each other.

Rules of this file: pure geometry in picture units, y downwards. Text widths are estimated on the wide side, because the
font is the reader's.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

LINE = 1.25
"""The height of a line of text as a multiple of the font size."""

_COVERING, _CROSSING = 1000.0, 8.0
"""How many less preferred places a label tries before it covers a square unit, or lets its leader cross something for a
tenth of its way."""

_WIDTH, _FULL_WIDTH = 0.64, 1.05
_NEAR, _RINGS = 11.0, (0, 8, 16, 26, 36, 48, 60, 74, 90, 108, 128, 150, 180)
_DIRECTIONS = (0, 180, -90, 90, -30, 30, -150, 150, -60, 60, -120, 120, -15, 15, -165, 165, -75, 75, -105, 105)


def text_width(text: str, font: float) -> float:
    """About how wide a text is."""
    return font * sum(_FULL_WIDTH if unicodedata.east_asian_width(sign) in "WF" else _WIDTH for sign in text)


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle by its left upper corner."""

    x: float
    y: float
    width: float
    height: float

    def overlap(self, other: Box) -> float:
        """The area that both cover."""
        across = min(self.x + self.width, other.x + other.width) - max(self.x, other.x)
        down = min(self.y + self.height, other.y + other.height) - max(self.y, other.y)
        return max(0.0, across) * max(0.0, down)

    def covers(self, x: float, y: float) -> bool:
        """Whether a point lies inside."""
        return self.x <= x <= self.x + self.width and self.y <= y <= self.y + self.height

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to another."""
        return min(max(x, self.x), self.x + self.width), min(max(y, self.y), self.y + self.height)

    def holds(self, other: Box) -> bool:
        """Whether the other lies inside."""
        inside_x = self.x <= other.x and other.x + other.width <= self.x + self.width
        return inside_x and self.y <= other.y and other.y + other.height <= self.y + self.height


@dataclass(frozen=True, slots=True)
class Anchor:
    """A point and the size of the label it wants."""

    x: float
    y: float
    width: float
    height: float


def place(anchors: Sequence[Anchor], obstacles: Sequence[Box], bounds: Box) -> list[Box]:
    """A box for each label: the nearest place within `bounds` that is free, else the one that covers least.

    Earlier anchors choose first. The marks of all anchors are obstacles already.
    """
    taken = [*obstacles, *(Box(a.x - 7, a.y - 7, 14, 14) for a in anchors)]
    placed: list[Box] = []
    for anchor in anchors:
        candidates = [box for box in _around(anchor) if bounds.holds(box)] or [_inside(anchor, bounds)]
        best = _cheapest(anchor, candidates, taken)
        placed.append(best)
        taken.append(Box(best.x - 2, best.y, best.width + 4, best.height))
    return placed


def _cheapest(anchor: Anchor, candidates: Sequence[Box], taken: Sequence[Box]) -> Box:
    """The first candidate that covers nothing, if there is one, with a free way to its point, if that is not far."""
    others = [box for box in taken if not box.covers(anchor.x, anchor.y)]
    best, least = candidates[0], math.inf
    for position, box in enumerate(candidates):
        cost = float(position)
        if cost < least:
            cost += _COVERING * round(sum(box.overlap(other) for other in taken))
        if cost < least:
            cost += _CROSSING * _crossed(anchor, box, others)
        if cost < least:
            best, least = box, cost
    return best


def _crossed(anchor: Anchor, box: Box, others: Sequence[Box]) -> int:
    """How much of the way from the label to its point lies on other things, in steps."""
    x, y = box.nearest(anchor.x, anchor.y)
    steps = [(x + (anchor.x - x) * step / 10, y + (anchor.y - y) * step / 10) for step in range(10)]
    return sum(any(other.covers(*step) for other in others) for step in steps)


def _around(anchor: Anchor) -> list[Box]:
    """Places for a label, the preferred ones first: near before far, the right side before the left."""
    places = []
    for ring in _RINGS:
        for angle in _DIRECTIONS:
            reach = _NEAR + ring
            across, down = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            x, y = anchor.x + reach * across, anchor.y + reach * down
            left = x - anchor.width * (1 - across) / 2  # the label's edge, not its middle, touches the ring
            places.append(Box(left, y - anchor.height * (1 - down) / 2, anchor.width, anchor.height))
    return places


def _inside(anchor: Anchor, bounds: Box) -> Box:
    """A label too large for any place: at its point, pushed into the picture as far as it goes."""
    x = max(bounds.x, min(anchor.x + _NEAR, bounds.x + bounds.width - anchor.width))
    y = max(bounds.y, min(anchor.y, bounds.y + bounds.height - anchor.height))
    return Box(x, y, anchor.width, anchor.height)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Heights near those wanted, at least `gap` apart and within [low, high] as far as there is room.

    Neighbours that are too near form a block around their mean, and blocks merge until none overlaps.
    """
    order = sorted(range(len(wanted)), key=lambda number: wanted[number])
    blocks: list[list[int]] = []
    for number in order:
        blocks.append([number])
        while len(blocks) > 1 and _top(blocks[-1], wanted, gap, low, high) < _end(blocks[-2], wanted, gap, low, high):
            last = blocks.pop()
            blocks[-1].extend(last)
    heights = [0.0] * len(wanted)
    for block in blocks:
        top = _top(block, wanted, gap, low, high)
        for position, number in enumerate(block):
            heights[number] = top + position * gap
    return heights


def _top(block: Sequence[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where a block's first label goes."""
    length = gap * (len(block) - 1)
    middle = sum(wanted[number] for number in block) / len(block)
    return max(low, min(middle - length / 2, high - length))


def _end(block: Sequence[int], wanted: Sequence[float], gap: float, low: float, high: float) -> float:
    """Where the next block may begin."""
    return _top(block, wanted, gap, low, high) + gap * len(block)
