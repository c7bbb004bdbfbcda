"""What a variant is: frozen values that the builder writes, the server serves and the scheduler weighs.

Rules of this file: standard library only, no behaviour beyond arithmetic on the values themselves, durations
in integer nanoseconds. Everything that reads files, runs models or knows a wire lives elsewhere.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

REFERENCE = "fp32"
"""The variant every other one is compared with."""


class Verdict(StrEnum):
    """What the gate says of a variant's evidence."""

    PASSED = "passed"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"
    UNVERIFIED = "unverified"


class State(StrEnum):
    """What a server does with a variant; only `ELIGIBLE` takes traffic that does not pin."""

    ELIGIBLE = "eligible"
    DOMINATED = "dominated"
    NO_BENEFIT = "no_benefit"
    REJECTED = "rejected"
    INCONCLUSIVE = "inconclusive"
    UNVERIFIED = "unverified"
    UNSUPPORTED = "unsupported"
    QUARANTINED = "quarantined"
    DISABLED = "disabled"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output: its V2 datatype and its whole shape, the batch dimension included; -1 is variable."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interval:
    """A measured value with its 95 % confidence interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class WorstClass:
    """The class that loses most: fp32's recall on its `samples` minus the variant's, in absolute points."""

    label: int
    recall_drop: Interval
    samples: int


@dataclass(frozen=True, slots=True)
class Fidelity:
    """How near a variant's answers are to the reference's, in the field's usual measures; None where one is undefined.

    `mse`, `max_abs_difference` and `kl` (nats, KL(reference || variant)) leave out the `not_finite` samples where
    either answer has a NaN or an infinity. `top1`, `macro_f1` and `mcnemar_p` (exact, two-sided, of top1) need class
    targets; `worst_class` takes the reference's classes for the truth where there are none.
    """

    cosine: float | None = None
    least_cosine: float | None = None
    mse: float | None = None
    max_abs_difference: float | None = None
    kl: float | None = None
    top1: float | None = None
    macro_f1: float | None = None
    accuracy_drop_rate: float | None = None
    mcnemar_p: float | None = None
    worst_class: WorstClass | None = None
    not_finite: int = 0


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was measured about one variant on one runtime, on held-out data.

    `accuracy_drop` is paired against the reference on the same samples; `batch_invariance` is the largest
    absolute difference between a sample's answer alone and inside a batch. Cards of older builds have no `fidelity`.
    """

    score: Interval
    agreement: Interval
    accuracy_drop: Interval
    samples: int
    batch_sizes: tuple[int, ...]
    batch_invariance: float
    fidelity: Fidelity | None = None


@dataclass(frozen=True, slots=True)
class Gate:
    """The verdict and the sentence that explains it to a person."""

    verdict: Verdict
    reason: str


@dataclass(frozen=True, slots=True)
class Card:
    """What is proven about a variant. `artefact` is relative to the variant's folder; None when nothing was built.

    `artefacts` maps each file the variant may be served from to its sha256; `requirements` says what a host needs,
    e.g. ``{"precision": "bf16"}``; `flops` counts two per multiply-accumulate, for one sample. `findings` is what its
    recipe learnt on the way (scans, candidates tried, losses), for the report.
    """

    variant: str
    recipe: str
    parameters: Mapping[str, object]
    artefact: str | None
    sha256: str | None
    parent: str | None
    requirements: Mapping[str, object]
    size_bytes: int
    compressed_bytes: int
    weights: int
    flops: int
    runtimes: Mapping[str, Evidence]
    gate: Gate
    artefacts: Mapping[str, str] = field(default_factory=dict)
    findings: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LatencyProfile:
    """Batch size -> latency in nanoseconds on one host, measured at a few sizes and made non-decreasing.

    `latency_ns` interpolates between measured sizes and never extrapolates beyond the largest one.
    """

    batch_sizes: tuple[int, ...]
    latencies_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        """Reject an empty, unsorted or uneven profile; raises ValueError."""
        sizes, latencies = self.batch_sizes, self.latencies_ns
        if not sizes or len(sizes) != len(latencies):
            raise ValueError(f"a profile needs as many latencies as batch sizes, got {sizes} and {latencies}")
        if list(sizes) != sorted(set(sizes)) or sizes[0] < 1 or min(latencies) < 1:
            raise ValueError(f"batch sizes must rise from at least 1 and latencies be positive: {sizes} {latencies}")
        running = 0
        monotone = []
        for latency in latencies:  # a larger batch that measured faster is noise: believe the slower neighbour
            running = max(running, latency)
            monotone.append(running)
        object.__setattr__(self, "latencies_ns", tuple(monotone))

    @property
    def max_batch_size(self) -> int:
        """The largest measured batch size."""
        return self.batch_sizes[-1]

    def latency_ns(self, batch_size: int) -> int:
        """The latency of one batch; linear between measured sizes. Raises ValueError beyond the measured range."""
        if not 1 <= batch_size <= self.max_batch_size:
            raise ValueError(f"batch size {batch_size} is outside 1..{self.max_batch_size}")
        right = bisect_left(self.batch_sizes, batch_size)
        upper = self.latencies_ns[right]
        if self.batch_sizes[right] == batch_size or right == 0:
            return upper
        lower, left_size = self.latencies_ns[right - 1], self.batch_sizes[right - 1]
        return lower + (upper - lower) * (batch_size - left_size) // (self.batch_sizes[right] - left_size)


@dataclass(frozen=True, slots=True)
class Variant:
    """One servable form of a model, as the scheduler sees it on this host.

    `score` and `drop` are the evidence for the runtime in use, None where nothing was measured. `profile` is None
    unless the variant was measured here. `batchable` is False when batch-mates would change an answer.

    `crowded` is `profile` while every other executor runs the variant too, nowhere below it; None where there is one
    executor, or a GPU. `lengths` are profiles alone by the elements that one sample has in all inputs together, rising,
    up to the same batch size, the real length's among them; empty where no input axis but the batch varies.
    """

    name: str
    state: State
    reason: str
    precision: str
    runtime: str
    device: str
    score: Interval | None = None
    drop: Interval | None = None
    profile: LatencyProfile | None = None
    batchable: bool = True
    size_bytes: int = 0
    crowded: LatencyProfile | None = None
    lengths: tuple[tuple[int, LatencyProfile], ...] = ()

    @property
    def proven_accuracy(self) -> float:
        """The score's lower confidence bound: what may be promised. 0.0 where nothing is proven."""
        return self.score.low if self.score else 0.0

    @property
    def proven_drop(self) -> float:
        """The upper confidence bound of the drop against the reference; 0 for the reference, 1 if unproven."""
        if self.name == REFERENCE:
            return 0.0
        return self.drop.high if self.drop else 1.0
