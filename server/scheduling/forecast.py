"""How many samples will arrive soon: a rate that follows bursts, widened by how bursty the arrivals are.

Counts are kept in buckets of 20 ms; their mean and variance are exponential averages over about 200 ms. The index of
dispersion (variance over mean) is 1 for Poisson arrivals and larger for bursts. How many standard deviations are added
is learnt from what came of it: each request that missed adds to them, each that was admitted takes a little away, so
that in the long run about `_MISS_RATE` miss where that is in reach. With load, burstiness beyond Poisson's weighs more:
what a burst leaves behind takes the longer to drain the less is idle, and queues vary with the inverse square of that.
"""

from __future__ import annotations

from math import sqrt

from server.scheduling.learnt import Learnt

_BUCKET_NS = 20_000_000
_GAIN = 0.095  # 1 - exp(-20 ms / 200 ms)
_FORGET_AFTER = 100  # empty buckets after which nothing is left of a rate
_MOST_DISPERSION = 16.0
_MISS_RATE = 0.001
_MOST_SPREAD = 16.0
_CALM = 0.4  # the load up to which bursts weigh no more than their spread


class ArrivalForecast:
    """The arrivals of one model, in samples."""

    def __init__(self) -> None:
        self._bucket = 0
        self._count = 0.0
        self._earlier = 0.0
        self._mean = 0.0
        self._variance = 0.0
        self.spread = Learnt(1.0, least=1.0, most=_MOST_SPREAD, step=0.25, rate=_MISS_RATE)
        """Standard deviations added to the mean in calm; a mistake is a request that missed, refused or expired.

        A full queue is none: it is the operator's bound and says nothing about caution.
        """

    def arrived(self, samples: float, now_ns: int) -> None:
        """Count an arrival."""
        self._roll(now_ns)
        self._earlier = self._count  # the newest arrival is the one being decided on: alone it is no sign of more
        self._count += samples

    def rate(self, now_ns: int) -> float:
        """Samples per second that arrive of late."""
        self._roll(now_ns)
        return max(self._mean, self._earlier * _GAIN) * 1e9 / _BUCKET_NS

    def expected(self, duration_ns: int, now_ns: int, load: float = 0.0) -> float:
        """Samples to reckon with in the next `duration_ns`: the mean and a margin for burstiness.

        `load` is the share of all executor time that arrivals take.
        """
        self._roll(now_ns)
        mean = max(self._mean, self._earlier * _GAIN)
        if mean <= 0.0:
            return 0.0
        arrivals = mean * duration_ns / _BUCKET_NS
        deviation = sqrt(min(max(self._variance / mean, 1.0), _MOST_DISPERSION))  # in those of a Poisson process
        idle = max(1.0 - load, (1.0 - _CALM) / _MOST_SPREAD)
        bursts = max(1.0, (1.0 - _CALM) / idle) ** 2 * (deviation - 1.0)
        return arrivals + min(self.spread.value * (1.0 + bursts), _MOST_SPREAD * deviation) * sqrt(arrivals)

    def _roll(self, now_ns: int) -> None:
        bucket = now_ns // _BUCKET_NS
        elapsed = bucket - self._bucket
        if elapsed <= 0:
            return
        self._bucket = bucket
        if elapsed > _FORGET_AFTER:
            self._mean = self._variance = 0.0
            self._count = self._earlier = 0.0
            return
        for _ in range(elapsed):
            deviation = self._count - self._mean
            self._mean += _GAIN * deviation
            self._variance += _GAIN * (deviation * deviation - self._variance)
            self._count = self._earlier = 0.0
