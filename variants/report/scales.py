"""Values to places: linear and logarithmic scales with ticks at round numbers.

A scale is logarithmic where its values span more than `WIDE`, since a linear one would hide the small ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

WIDE = 8.0

_STEPS = (1, 2, 2.5, 5, 10)
_COARSE, _MIDDLE, _FINE = (1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)
"""Which multiples of a power of ten get a tick, by how many decades there are."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps [low, high] onto [start, end]; a logarithmic one needs `low` > 0."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Where a value lies; beyond the ends it lies at the end."""
        share = (self._of(value) - self._of(self.low)) / (self._of(self.high) - self._of(self.low))
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)

    def _of(self, value: float) -> float:
        return math.log(max(value, self.low * 1e-3)) if self.log else value

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the scale, about so many."""
        return log_ticks(self.low, self.high, about) if self.log else linear_ticks(self.low, self.high, about)


def spanning(
    values: Iterable[float], start: float, end: float, *, log: bool | None = None, padding: float = 0.06
) -> Scale:
    """A scale with all values inside and a margin; logarithmic where they need it, unless told."""
    known = list(values)
    low, high = min(known), max(known)
    logarithmic = low > 0 and (high / low > WIDE if log is None else log)
    if logarithmic:
        margin = (high / low) ** padding if high > low else 1.5
        return Scale(low / margin, high * margin, start, end, log=True)
    margin = (high - low) * padding if high > low else abs(high) * 0.1 or 1.0
    return Scale(low - margin, high + margin, start, end)


def linear_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten within [low, high], about so many."""
    rough = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(multiple * power for multiple in _STEPS if multiple * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [0.0 if number == 0 else number * step for number in range(first, last + 1)]


def log_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that are evenly spread on a logarithmic scale; linear ones where it spans too little for them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in (_FINE, _MIDDLE, _COARSE):
        ticks = [m * 10.0**power for power in decades for m in multiples if low <= m * 10.0**power <= high]
        if len(ticks) <= about + 2:
            break
    if len(ticks) < 2:
        return linear_ticks(low, high, about)
    return ticks[:: -(-len(ticks) // (about + 2))]
