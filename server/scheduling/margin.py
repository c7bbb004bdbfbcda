"""The factor over a predicted latency that batches exceed as rarely as promised: adaptive conformal inference.

A margin is a high quantile of what was seen lately, the *scores*: actual over predicted latency. Which quantile is
itself corrected (Gibbs and Candès, NeurIPS 2021): each miss asks for a higher one, each hit for a slightly lower one,
so that in the long run `MISS_RATE` of the predictions are exceeded, however the noise drifts: as far as `_MOST` goes.

The window is of a minute: where like batches come more than a few seconds apart, it promises less. Too few scores are
filled up with the starting margin. What was refused or passed over is never measured, and one bad moment must not lock
out an idle executor, or a variant: with nothing new for seconds all scores are void, sooner if something was refused.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

MISS_RATE = 0.01
START = 1.15
_LEAST = 1.02
_MOST = 2.0  # what takes longer is a pause of the host: to reckon with one each time would refuse everybody
_WINDOW = 200  # scores remembered
_ENOUGH = 100  # scores below which the starting margin stands in for those that are missing
_AGE_NS = 60_000_000_000
_REST_NS = 5_000_000_000  # after this long without a new score the old ones are void
_REST_IN_DOUBT_NS = 1_000_000_000  # the same where they may have led to a refusal
_STEP = 0.002
_LEAST_RATE, _MOST_RATE = -0.02, 0.05
_BEYOND = 5.0  # how much of the negative part of the rate is added to the largest score


class Margin:
    """The margin of one group of like predictions. `value` is current after `observe` or `forget`.

    `doubted` says that something was refused since the last score, perhaps for this margin's sake.
    """

    def __init__(self) -> None:
        self.value = START
        self.doubted = False
        self._rate = MISS_RATE
        self._scores: deque[tuple[int, float]] = deque()
        self._sorted: list[float] = []

    def observe(self, score: float, now_ns: int) -> None:
        """Learn how long a batch took, in units of its prediction without a margin."""
        self.forget(now_ns)
        self.doubted = False
        missed = 1.0 if score > self.value else 0.0
        self._rate = min(max(self._rate + _STEP * (MISS_RATE - missed), _LEAST_RATE), _MOST_RATE)
        self._scores.append((now_ns, score))
        insort(self._sorted, score)
        if len(self._scores) > _WINDOW:
            self._drop_oldest()
        self.value = self._quantile()

    def forget(self, now_ns: int) -> bool:
        """Drop what is too old; True if that changed the margin's scores."""
        old = len(self._scores)
        rest_ns = _REST_IN_DOUBT_NS if self.doubted else _REST_NS
        if self._scores and self._scores[-1][0] < now_ns - rest_ns:
            self._scores.clear()
            self._sorted.clear()
        while self._scores and self._scores[0][0] < now_ns - _AGE_NS:
            self._drop_oldest()
        if len(self._scores) == old:
            return False
        if not self._scores:
            self._rate = MISS_RATE
        self.value = self._quantile()
        return True

    def _drop_oldest(self) -> None:
        _, score = self._scores.popleft()
        del self._sorted[bisect_left(self._sorted, score)]

    def _quantile(self) -> float:
        """The score that all but `_rate` of the recent ones stay below, the missing ones being the starting margin."""
        seen = len(self._sorted)
        missing = max(0, _ENOUGH - seen)
        above = round(max(self._rate, 0.0) * (seen + missing))  # how many may lie above the margin
        beyond = 1.0 + _BEYOND * max(0.0, -self._rate)
        larger = seen - bisect_left(self._sorted, START)  # of the seen ones, those that the fillers do not exceed
        if above < larger:
            chosen = self._sorted[seen - 1 - above]
        elif above < larger + missing:
            chosen = START
        else:
            chosen = self._sorted[seen - 1 - (above - missing)]
        return min(max(chosen * beyond, _LEAST), _MOST)
