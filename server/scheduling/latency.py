"""Predicted latency of a batch: profile x bias x margin x slowdown, corrected from every completion.

- The *profile* was measured on this host at load: by variant, batch size, whether the other executors were busy, and
  the length of the input where that varies. Between measured points it is linear (between lengths, a power law), it
  never falls as batches or inputs grow, and beyond the largest measured batch it does not exist.
- The *bias* of a cell (variant, busy executors, octave of the batch size) follows what is peculiar to it, slowly.
- The *margin* is shared by the cells of one octave of latency, since a pause of the host weighs on short batches more
  than on long ones. See `margin`.
- The *slowdown* belongs to the executor. See `slowdown`.

Predictions are asked `here`, on the executor that is deciding, or `crowded`, as they will be while a backlog drains.
Tables are integers, so that a prediction and the batch that fits it never disagree by rounding.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate
from math import log
from typing import NamedTuple

from server.scheduling.margin import MISS_RATE, START, Margin
from server.scheduling.slowdown import kept
from variants.variant import LatencyProfile, Variant

__all__ = ["HERE", "MISS_RATE", "LatencyModel", "Spot"]

UNIT = 1 << 20
_BIAS_GAIN = 0.05
_BIAS_LEAST, _BIAS_MOST = 0.5, 2.0
_BIAS_REST_NS, _BIAS_HALF_LIFE_NS = 10_000_000_000, 10_000_000_000
_NOTABLE = 0.005  # corrections that change by less are not worth new tables
_CHECK_NS = 250_000_000  # how often what is old is looked for
_LENGTH_STEPS = 2  # lengths are rounded up to so many steps per doubling
_MOST_STEPS = 40


class Spot(NamedTuple):
    """Where a batch would run: how many other executors are busy, and the slowdown in units of 1 / UNIT."""

    busy: int = 0
    slowdown: int = UNIT


HERE = Spot()
Cell = tuple[int, int, int]
"""Variant, step of length, busy executors."""


class LatencyModel:
    """Predictions for one model's variants, addressed by their place in the ranking."""

    def __init__(self, variants: Sequence[Variant], executors: int = 1) -> None:
        self._variants = variants
        self._profiles = [_profile(variant) for variant in variants]
        self._most_busy = executors - 1
        self._shortest = min((length for v in variants for length, _ in v.lengths), default=0)
        self._base: dict[Cell, list[int]] = {}
        self._tables: dict[Cell, list[int]] = {}
        self._margins: dict[int, Margin] = {}
        self._margin_used: dict[int, float] = {}
        self._biases: dict[Cell, tuple[float, int]] = {}
        self._bias_used: dict[Cell, float] = {}
        self._checked_ns = 0
        self._here = self._crowd = HERE
        self.version = 0
        """Counts the changes of what is predicted at full speed."""

    def set_executors(self, executors: int) -> None:
        """Say how many executors there are; the crowded profile was measured with all of them busy."""
        self._most_busy = executors - 1
        self._base.clear()
        self._forget_tables()

    def max_batch_size(self, variant: int) -> int:
        """The largest batch this variant was measured at."""
        return self._profiles[variant].max_batch_size

    def step(self, length: int) -> int:
        """The step of length that an input with so many elements per sample belongs to; 0 where that never varies.

        A step holds lengths up to a factor of 2 ** (1 / _LENGTH_STEPS) apart and is predicted as its longest.
        """
        if not self._shortest or length <= self._shortest:
            return 0
        step, longest = 0, self._shortest
        while longest < length and step < _MOST_STEPS:
            step += 1
            longest = self.longest(step)
        return step

    def longest(self, step: int) -> int:
        """The length that a step is predicted as; 0 where lengths never vary."""
        return int(self._shortest * 2.0 ** (step / _LENGTH_STEPS))

    def profiled_ns(self, variant: int, samples: int, step: int = 0, busy: int = 0) -> int:
        """The latency measured at load, uncorrected."""
        return self._base_table((variant, step, busy))[samples]

    def idle_ns(self, variant: int, samples: int, step: int = 0) -> int:
        """What may be promised of this host at rest: the profile with the margin that everything relaxes towards."""
        return int(self._base_table((variant, step, 0))[samples] * START)

    def refresh(self, now_ns: int, here: Spot = HERE, crowd: Spot | None = None) -> None:
        """Say where predictions are asked for, and let old corrections relax; call once per event."""
        self._here, self._crowd = here, crowd or here
        if now_ns - self._checked_ns >= _CHECK_NS:
            self._checked_ns = now_ns
            for octave, margin in self._margins.items():
                if margin.forget(now_ns):
                    self._use_margin(octave, margin.value)
            for cell in self._biases:
                self._use_bias(cell, self._relaxed_bias(cell, now_ns))

    def doubt(self) -> None:
        """Say that something was refused: should nothing new be measured now, old scores may be why."""
        for margin in self._margins.values():
            margin.doubted = True

    @property
    def here(self) -> Spot:
        """Where predictions are asked for."""
        return self._here

    def predict_ns(self, variant: int, samples: int, step: int = 0) -> int:
        """How long a batch may take here, exceeded by about `MISS_RATE` of batches."""
        return self._table((variant, step, self._here.busy))[samples] * self._here.slowdown // UNIT

    def full_speed_ns(self, variant: int, samples: int, step: int = 0) -> int:
        """The prediction here without the executor's slowdown."""
        return self._table((variant, step, self._here.busy))[samples]

    def crowded_ns(self, variant: int, samples: int, step: int = 0) -> int:
        """How long a batch may take while every executor is busy."""
        return self._table((variant, step, self._crowd.busy))[samples] * self._crowd.slowdown // UNIT

    def expected_ns(self, variant: int, samples: int, step: int = 0) -> int:
        """How long a batch will take while every executor is busy, without a margin: what sums of many come to."""
        busy = self._crowd.busy
        profiled_ns = self._base_table((variant, step, busy))[samples]
        return int(profiled_ns * self._bias_of(variant, samples, busy)) * self._crowd.slowdown // UNIT

    def largest_batch(self, variant: int, budget_ns: int, step: int = 0) -> int:
        """The most samples whose predicted latency here stays within the budget; 0 when not even one does."""
        return _largest(self._table((variant, step, self._here.busy)), budget_ns, self._here.slowdown)

    def largest_crowded(self, variant: int, budget_ns: int, step: int = 0) -> int:
        """The same while every executor is busy."""
        return _largest(self._table((variant, step, self._crowd.busy)), budget_ns, self._crowd.slowdown)

    def observe(
        self, variant: int, samples: int, actual_ns: int, now_ns: int, spot: Spot = HERE, step: int = 0
    ) -> float:
        """Learn from a batch that was dispatched at `spot` and ended at `now_ns`.

        Returns its latency over what was expected of it at full speed: the executor's slowdown, seen once.
        """
        octave = (samples - 1).bit_length()
        cell, bias_cell = (variant, step, spot.busy), (variant, octave, spot.busy)
        profiled = self._base_table(cell)[samples]
        bias = self._relaxed_bias(bias_cell, now_ns)
        ratio = actual_ns / (profiled * bias)
        score = ratio * UNIT / spot.slowdown
        margin = self._margins.setdefault(_octave(profiled), Margin())
        margin.observe(score, now_ns)
        self._use_margin(_octave(profiled), margin.value)
        bias *= 1.0 + _BIAS_GAIN * (min(max(score, _BIAS_LEAST), _BIAS_MOST) - 1.0)
        self._biases[bias_cell] = min(max(bias, _BIAS_LEAST), _BIAS_MOST), now_ns
        self._use_bias(bias_cell, self._biases[bias_cell][0])
        return ratio

    def _use_margin(self, octave: int, value: float) -> None:
        if abs(value - self._margin_used.get(octave, START)) > _NOTABLE * value:
            self._margin_used[octave] = value
            self._forget_tables()

    def _use_bias(self, cell: Cell, value: float) -> None:
        if abs(value - self._bias_used.get(cell, 1.0)) > _NOTABLE * value:
            self._bias_used[cell] = value
            self._forget_tables()

    def _forget_tables(self) -> None:
        self._tables.clear()
        self.version += 1

    def _relaxed_bias(self, cell: Cell, now_ns: int) -> float:
        bias, observed_ns = self._biases.get(cell, (1.0, 0))
        return 1.0 + (bias - 1.0) * kept(observed_ns, now_ns, _BIAS_REST_NS, _BIAS_HALF_LIFE_NS)

    def _table(self, cell: Cell) -> list[int]:
        """Batch size -> predicted latency at full speed; entry 0 is 0."""
        if cell not in self._tables:
            variant, _, busy = cell
            corrected = (
                int(ns * self._margin_used.get(_octave(ns), START) * self._bias_of(variant, samples, busy))
                for samples, ns in enumerate(self._base_table(cell)[1:], 1)
            )
            self._tables[cell] = [0, *accumulate(corrected, max)]
        return self._tables[cell]

    def _bias_of(self, variant: int, samples: int, busy: int) -> float:
        return self._bias_used.get((variant, (samples - 1).bit_length(), busy), 1.0)

    def _base_table(self, cell: Cell) -> list[int]:
        """Batch size -> profiled latency; entry 0 is 0."""
        if cell not in self._base:
            variant, step, busy = cell
            sizes = range(1, self.max_batch_size(variant) + 1)
            self._base[cell] = [0, *accumulate((self._measured(variant, n, step, busy) for n in sizes), max)]
        return self._base[cell]

    def _measured(self, variant: int, samples: int, step: int, busy: int) -> int:
        alone_ns = self._profiles[variant].latency_ns(samples)
        crowded = self._variants[variant].crowded
        share = min(busy, self._most_busy) / self._most_busy if self._most_busy > 0 else 0.0
        ratio = 1.0
        if crowded is not None and samples <= crowded.max_batch_size:
            ratio += share * max(0.0, crowded.latency_ns(samples) / alone_ns - 1.0)
        return max(1, int(self._at_length(variant, samples, step) * ratio))

    def _at_length(self, variant: int, samples: int, step: int) -> int:
        """The latency alone for a step's longest inputs: a power law through the measured neighbours, or the last."""
        lengths = self._variants[variant].lengths
        if len(lengths) < 2:
            return self._profiles[variant].latency_ns(samples)
        longest = self.longest(step)
        right = min(max(bisect_left([length for length, _ in lengths], longest), 1), len(lengths) - 1)
        (short, below), (long, above) = lengths[right - 1], lengths[right]
        below_ns, above_ns = below.latency_ns(samples), above.latency_ns(samples)
        exponent = max(0.0, log(above_ns / below_ns) / log(long / short))
        return int(below_ns * max(1.0, longest / short) ** exponent)


def _profile(variant: Variant) -> LatencyProfile:
    if variant.profile is None:
        raise ValueError(f"{variant.name} was not measured here")
    return variant.profile


def _largest(table: list[int], budget_ns: int, slowdown: int) -> int:
    most_ns = ((budget_ns + 1) * UNIT - 1) // slowdown  # exactly where the prediction exceeds the budget
    return bisect_right(table, most_ns, lo=1) - 1


def _octave(latency_ns: int) -> int:
    return latency_ns.bit_length()
