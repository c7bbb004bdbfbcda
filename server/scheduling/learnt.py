"""A number that learns from its mistakes: it rises with each one and falls a little with each success.

In the long run the share of mistakes settles at the rate asked for, where the number can bring that about, whatever the
traffic (as in adaptive conformal inference, Gibbs and Candès, NeurIPS 2021).
"""

from __future__ import annotations


class Learnt:
    """`value` starts at `start` and stays between `least` and `most`; `rate` is the share of mistakes aimed at."""

    def __init__(self, start: float, *, least: float, most: float, step: float, rate: float) -> None:
        self.value = start
        self._least, self._most, self._step, self._rate = least, most, step, rate

    def judged(self, *, mistake: bool) -> None:
        """Learn of one more mistake, or success."""
        change = self._step * ((1.0 if mistake else 0.0) - self._rate)
        self.value = min(max(self.value + change, self._least), self._most)
