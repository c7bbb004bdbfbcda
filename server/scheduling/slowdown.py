"""How much slower than profiled an executor runs just now: one factor for everything that runs on it.

As in ALERT (ATC'20), a throttled or shared core slows all work alike, so a few batches of anything tell. The factor is
the median of the last five batches' ratios, so three slow ones in a row are believed and a single outlier is not. It
relaxes towards 1 while nothing is measured: what is refused for slowness would never be measured again.
"""

from __future__ import annotations

from collections import deque
from statistics import median

_LAST = 5
_LEAST, _MOST = 0.25, 8.0
_REST_NS = 2_000_000_000  # after this long unobserved, relaxing begins
_HALF_LIFE_NS = 2_000_000_000


class Slowdown:
    """One executor's factor over the profile; 1.0 is as profiled."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque([1.0] * (_LAST // 2), maxlen=_LAST)
        self._factor = 1.0
        self._observed_ns = 0

    def observe(self, ratio: float, now_ns: int) -> None:
        """Take note of a batch's actual over expected latency."""
        relaxed = self.factor(now_ns)
        if relaxed != self._factor:  # what was forgotten must not come back with the next batch
            self._ratios.clear()
            self._ratios.extend([relaxed] * (_LAST // 2))
        self._ratios.append(min(max(ratio, _LEAST), _MOST))
        self._factor = median(self._ratios)
        self._observed_ns = now_ns

    def factor(self, now_ns: int) -> float:
        """The factor at this instant."""
        return 1.0 + (self._factor - 1.0) * kept(self._observed_ns, now_ns)


def kept(observed_ns: int, now_ns: int, rest_ns: int = _REST_NS, half_life_ns: int = _HALF_LIFE_NS) -> float:
    """The share of a deviation that is left after the time since it was observed: all of it until the rest begins."""
    age_ns = now_ns - observed_ns - rest_ns
    return 1.0 if age_ns <= 0 else float(0.5 ** (age_ns / half_life_ns))
