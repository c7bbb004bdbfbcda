"""Trials: what a candidate would be judged, for recipes that choose among several.

Rules of this file: candidates are tried on the tuning samples, which are neither evaluated nor trained nor calibrated
on, so a choice never leaks into the evidence; the verdict is a forecast of the gate's at the evaluation set's size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from variants.data import Array, Samples
from variants.evaluate import compare, judge, run_samples
from variants.model_config import ModelConfig
from variants.runtimes.onnxruntime_runtime import OnnxRuntime
from variants.variant import Interval, Verdict

_BATCH = 32


@dataclass(frozen=True, slots=True)
class Tried:
    """How a candidate did on the tuning samples.

    `drop` and `agreement` have the intervals that as many samples as the evaluation set's would give at these rates;
    `damage` is the RMS distance of its answers from the reference's, as a share of the reference's RMS.
    """

    drop: Interval
    agreement: Interval
    damage: float
    passes: bool

    def facts(self) -> dict[str, float | bool | None]:
        """For the card's findings, as plain JSON: a damage without end is None."""
        found = {"drop": self.drop.value, "agreement": self.agreement.value, "damage": self.damage}
        rounded = {name: round(value, 6) if np.isfinite(value) else None for name, value in found.items()}
        return rounded | {"passes": self.passes}


@dataclass(slots=True)
class Trial:
    """Compares candidate graphs with the reference graph on ONNX Runtime; `evaluation_samples` may be 0 for unknown."""

    reference: Path
    samples: Samples
    config: ModelConfig
    max_batch: int
    evaluation_samples: int
    threads: int
    _reference: Array | None = field(default=None, init=False)

    def judge(self, graph: Path) -> Tried:
        """Try one candidate. Raises RuntimeUnavailable for a graph that does not load, ValueError for another shape."""
        if self._reference is None:
            self._reference = self.answers(self.reference)
        answers = self.answers(graph)
        if answers.shape != self._reference.shape:
            raise ValueError(f"its answers have shape {answers.shape}, the reference's {self._reference.shape}")
        found = compare(answers, self._reference, self.samples.target, self.config.metric, self.config.task)
        scale = self.evaluation_samples / len(self.samples) or 1.0
        drop, agreement = found.drop.interval(scale), found.agreement.interval(scale)
        verdict = judge(drop, agreement, found.worth * scale, self.config.gate)
        return Tried(drop, agreement, damage(answers, self._reference), verdict is Verdict.PASSED)

    def answers(self, graph: Path) -> Array:
        """The judged output of a graph for all tuning samples."""
        session = OnnxRuntime().load(graph, precision="int8", threads=self.threads, device="cpu")
        inputs: Mapping[str, Array] = self.samples.inputs
        return run_samples(session, inputs, min(self.max_batch, _BATCH))[0]


def damage(answers: Array, reference: Array) -> float:
    """The RMS distance of answers from the reference's over the reference's RMS; infinite where one is not finite."""
    apart = answers.astype(np.float64) - reference.astype(np.float64)
    if not np.isfinite(apart).all():
        return float("inf")
    scale = float(np.sqrt(np.mean(reference.astype(np.float64) ** 2)))
    return float(np.sqrt(np.mean(apart**2))) / max(scale, 1e-30)
