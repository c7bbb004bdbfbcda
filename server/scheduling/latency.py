"""Predicted latency of a batch: profile x slowdown x margin, corrected from every completion.

- The *profile* was measured on this host at load.
- The *slowdown* is one factor for the whole model, as in ALERT (ATC'20): an exponential average of actual over
  profiled time, so that a throttled or shared host is noticed within about five batches.
- The *margin* of each variant is calibrated by adaptive conformal inference (Gibbs and Candès, 2021): it grows when a
  batch outlasts its prediction and shrinks a little when it does not, so that in the long run `MISS_RATE` of the
  predictions are exceeded, whatever the noise.

Both factors relax towards their start while nothing is measured for a while. Without that, one bad measurement could
refuse every request for ever: what is refused is never measured again. Relaxing at once would fight the learning.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from variants.variant import LatencyProfile

MISS_RATE = 0.01
_MARGIN_STEP = 0.05
_MARGIN_START, _MARGIN_LEAST, _MARGIN_MOST = 1.15, 1.02, 3.0
_SLOWDOWN_GAIN = 0.25
_SLOWDOWN_LEAST, _SLOWDOWN_MOST = 0.25, 8.0
_UNIT = 1 << 20  # factors are integers, so that a prediction and the batch that fits it never disagree by rounding
_REST_NS = 2_000_000_000  # after this long unobserved, relaxing begins
_RELAX_NS = 2_000_000_000  # half of a deviation is forgotten in this much idle time


class LatencyModel:
    """Predictions for one model's variants, addressed by their place in the ranking."""

    def __init__(self, profiles: Sequence[LatencyProfile]) -> None:
        self._tables = [
            [0, *(profile.latency_ns(size) for size in range(1, profile.max_batch_size + 1))] for profile in profiles
        ]
        self._slowdown = 1.0
        self._slowdown_ns = 0  # when it was last observed
        self._margins = [_MARGIN_START] * len(self._tables)
        self._margins_ns = [0] * len(self._tables)
        self._factors = [0] * len(self._tables)  # slowdown times margin, in units of 1 / _UNIT
        self.refresh(0)

    @property
    def slowdown(self) -> float:
        """How much slower than profiled this host ran when last observed; 1.0 is as profiled."""
        return self._slowdown

    def max_batch_size(self, variant: int) -> int:
        """The largest batch this variant was measured at."""
        return len(self._tables[variant]) - 1

    def profiled_ns(self, variant: int, samples: int) -> int:
        """The latency measured at load, uncorrected."""
        return self._tables[variant][samples]

    def idle_ns(self, variant: int, samples: int) -> int:
        """What may be promised of this host at rest: the profile with the margin that everything relaxes towards."""
        return int(self._tables[variant][samples] * _MARGIN_START)

    def refresh(self, now_ns: int) -> None:
        """Let the corrections relax by the time in which nothing was observed; call once per event."""
        slowdown = self._relaxed_slowdown(now_ns)
        variants = range(len(self._tables))
        self._factors = [int(slowdown * self._relaxed_margin(variant, now_ns) * _UNIT) for variant in variants]

    def predict_ns(self, variant: int, samples: int) -> int:
        """How long a batch may take, exceeded by about `MISS_RATE` of batches."""
        return self._tables[variant][samples] * self._factors[variant] // _UNIT

    def largest_batch(self, variant: int, budget_ns: int) -> int:
        """The most samples whose predicted latency stays within the budget; 0 when not even one does."""
        most_ns = ((budget_ns + 1) * _UNIT - 1) // self._factors[
            variant
        ]  # exactly where `predict_ns` exceeds the budget
        return bisect_right(self._tables[variant], most_ns, lo=1) - 1

    def observe(self, variant: int, samples: int, actual_ns: int, now_ns: int) -> None:
        """Learn from a batch that took `actual_ns` and ended at `now_ns`."""
        self.refresh(now_ns)
        slowdown, margin = self._relaxed_slowdown(now_ns), self._relaxed_margin(variant, now_ns)
        profiled = self._tables[variant][samples]
        exceeded = actual_ns > self.predict_ns(variant, samples)
        margin *= 1.0 + _MARGIN_STEP * ((1.0 if exceeded else 0.0) - MISS_RATE)
        self._margins[variant] = min(max(margin, _MARGIN_LEAST), _MARGIN_MOST)
        self._margins_ns[variant] = now_ns
        ratio = min(max(actual_ns / profiled, _SLOWDOWN_LEAST), _SLOWDOWN_MOST)
        self._slowdown = slowdown + _SLOWDOWN_GAIN * (ratio - slowdown)
        self._slowdown_ns = now_ns
        self.refresh(now_ns)

    def _relaxed_slowdown(self, now_ns: int) -> float:
        return 1.0 + (self._slowdown - 1.0) * _kept(self._slowdown_ns, now_ns)

    def _relaxed_margin(self, variant: int, now_ns: int) -> float:
        """Only a margin that grew relaxes; one that shrank was earned. A variant is unobserved while others run."""
        grown = self._margins[variant] - _MARGIN_START
        return _MARGIN_START + grown * (_kept(self._margins_ns[variant], now_ns) if grown > 0.0 else 1.0)


def _kept(observed_ns: int, now_ns: int) -> float:
    """The share of a deviation that is left after the time since it was observed: all of it until the rest begins."""
    return float(0.5 ** (max(0, now_ns - observed_ns - _REST_NS) / _RELAX_NS))
