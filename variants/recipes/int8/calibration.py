"""Calibration: how far each activation of a graph reaches on calibration data, by three published methods.

Rules of this file: activations are looked at and let go, so memory is bounded whatever the data: of each tensor two
extremes and one histogram of magnitudes are kept, and samples go in as many at a time as fit a budget. ONNX Runtime's
own collectors are not used: they hold the activations of the whole set, fail on a last batch of another size, and
their entropy search, at its default number of bins, has the full range as its only candidate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import onnx

from variants.data import Array, Samples

Method = Literal["minmax", "percentile", "entropy"]
METHODS: tuple[Method, ...] = get_args(Method)

Ranges = Mapping[str, tuple[Any, Any]]
"""Tensor -> its lowest and highest value, as numpy scalars of the tensor's own type; zero lies between them."""

_BINS = 2048
_STRIDE = 16
_PERCENTILE = 0.9999
_NOTHING = 1e-4  # of a value, where a histogram has none and its logarithm is asked for
_LEAST_REACH = 1e-30  # what is smaller has no histogram: bins per unit would overflow
_BUDGET_BYTES = 64 << 20


@dataclass(slots=True)
class Observed:
    """What calibration data showed of one tensor: its extremes, zero included, and how often which magnitude occurs.

    `counts` divides 0 up to the largest magnitude into equal bins.
    """

    lowest: Any
    highest: Any
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(_BINS, np.int64))

    def widen(self, values: Array) -> None:
        """Let the extremes reach over finite values."""
        self.lowest = np.minimum(self.lowest, values.min(initial=0))
        self.highest = np.maximum(self.highest, values.max(initial=0))

    def count(self, values: Array) -> None:
        """Add finite values, which the extremes reach over, to the histogram."""
        if (reach := self._reach) > _LEAST_REACH:
            bins = np.abs(values.ravel()).astype(np.float32) * np.float32(_BINS / reach)
            self.counts += np.bincount(np.minimum(bins.astype(np.int64), _BINS - 1), minlength=_BINS)

    @property
    def _reach(self) -> float:
        return float(max(-self.lowest, self.highest))

    def range(self, method: Method) -> tuple[Any, Any]:
        """The range to quantise.

        `minmax`: all of it. `percentile`: up to the magnitude that 99.99 % of the values keep to (Wu et al. 2020).
        `entropy`: up to the magnitude at which 8 bits lose the least information (Migacz, GTC 2017).
        """
        if method == "minmax" or not self.counts.any():
            return self.lowest, self.highest
        kept = _most_common(self.counts) if method == "percentile" else _least_divergence(self.counts, self._levels)
        limit = type(self.lowest)(self._reach * kept / _BINS)
        return np.maximum(self.lowest, -limit), np.minimum(self.highest, limit)

    @property
    def _levels(self) -> int:
        """How many of a byte's values a magnitude is rounded to: half of them where the sign takes the other half."""
        return 256 if self.lowest == 0 else 128


def _most_common(counts: npt.NDArray[np.int64]) -> int:
    """How many bins hold the percentile of all values."""
    return int(np.searchsorted(np.cumsum(counts), _PERCENTILE * counts.sum())) + 1


def _least_divergence(counts: npt.NDArray[np.int64], levels: int) -> int:
    """How many bins to keep such that rounding them to `levels` values diverges least from what was seen.

    The divergence is Kullback and Leibler's, with all that is clipped in the last bin. The zeros that a ReLU makes are
    exact in any range and would outvote the rest, so the first bin counts as the second.
    """
    seen = counts.astype(np.float64)
    seen[0] = seen[1]
    best, least = len(seen), np.inf
    for kept in range(levels, len(seen) + 1, _STRIDE):
        clipped = seen[:kept].copy()
        clipped[-1] += seen[kept:].sum()
        level = np.arange(kept) * levels // kept
        occurs = seen[:kept] > 0
        means = np.bincount(level, seen[:kept], levels) / np.maximum(np.bincount(level, occurs, levels), 1)
        divergence = _divergence(clipped, np.where(occurs, means[level], 0.0))
        if divergence < least:
            best, least = kept, divergence
    return best


def _divergence(seen: npt.NDArray[np.float64], rounded: npt.NDArray[np.float64]) -> float:
    """Of two histograms in nats; values seen where the other has none cost much, infinitely much if it has none."""
    if not rounded.any():
        return float("inf")
    occurs = seen > 0
    p, q = seen[occurs] / seen.sum(), np.maximum(rounded[occurs], _NOTHING) / rounded.sum()
    return float(np.sum(p * np.log(p / q)))


@dataclass(frozen=True, slots=True)
class Activations:
    """The float tensors `names` of a graph on some samples; a `max_batch` of 0 means a graph without a batch."""

    graph: Path
    names: Collection[str]
    samples: Samples
    max_batch: int
    threads: int

    def __iter__(self) -> Iterator[dict[str, Array]]:
        """The tensors for a few samples at a time: as many as keep them within the budget, at first for one."""
        session, given = self._session()
        made = [name for name in self.names if name not in given]
        at, step = 0, 1
        while at < len(self.samples):
            rows: Any = slice(at, at + step) if self.max_batch else (at, ...)
            inputs = {name: array[rows] for name, array in self.samples.inputs.items()}
            found = inputs | (dict(zip(made, session.run(made, inputs), strict=True)) if made else {})
            tensors = {name: found[name] for name in self.names if found[name].dtype.kind == "f"}
            yield tensors
            at += step
            if step == 1 and self.max_batch:
                size = max(1, sum(array.nbytes for array in tensors.values()))
                step = min(self.max_batch, max(1, _BUDGET_BYTES // size))

    def observe(self, *, histograms: bool) -> dict[str, Observed]:
        """What the samples show of each tensor; a second pass makes the histograms, once the extremes are known."""
        observed: dict[str, Observed] = {}
        for tensors in self:
            for name, values in tensors.items():
                zero = values.dtype.type(0)
                observed.setdefault(name, Observed(zero, zero)).widen(_finite(values))
        for tensors in self if histograms else ():
            for name, values in tensors.items():
                observed[name].count(_finite(values))
        return observed

    def _session(self) -> tuple[Any, set[str]]:
        """A session of the graph with the tensors as further outputs, and the names of its inputs."""
        import onnxruntime

        model = onnx.load(self.graph)
        given, outputs = ({value.name for value in each} for each in (model.graph.input, model.graph.output))
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in self.names if name not in given | outputs)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = self.threads, 4
        return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"]), given


def _finite(values: Array) -> Array:
    """The values without infinities and NaN, which no range could cover."""
    finite = np.isfinite(values)
    return values if finite.all() else values[finite]
