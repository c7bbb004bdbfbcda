"""What a report shows of a repository, read once: cards, measurements and what follows from both.

Rules of this file: whatever is missing or damaged becomes a sentence, never an error of the whole page; a variant
stands for its fastest proven runtime. Nothing here knows how it will look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from variants.attempts import Record, read_record
from variants.measurements import Measured, Measurements, read_measurements
from variants.model_config import ModelConfig, RepositoryError
from variants.repository import ModelFolder, VersionFolder
from variants.summary import Speed, as_served, dominated, not_worth_keeping, proven_drop, sound_cards, speeds
from variants.variant import REFERENCE, Card, Evidence, Verdict
from variants.verify import REFERENCE_RUNTIME

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class VariantFacts:
    """One variant: its card, the runtime it stands for, and what was measured there; `hue` tells it from others."""

    card: Card
    hue: int
    speed: Speed | None = None
    measured: Mapping[str, Measured] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The variant's name."""
        return self.card.variant

    @property
    def runtime(self) -> str | None:
        """The fastest proven runtime; the first proven one where no speed is known."""
        return self.speed.runtime if self.speed else next(iter(self.card.runtimes), None)

    @property
    def evidence(self) -> Evidence | None:
        """What is proven on that runtime."""
        return self.card.runtimes.get(self.runtime or "")

    @property
    def best(self) -> Measured | None:
        """What was measured on that runtime."""
        return self.measured.get(self.runtime or "")

    @property
    def passed(self) -> bool:
        """Whether the gate let it through."""
        return self.card.gate.verdict is Verdict.PASSED

    @property
    def home(self) -> Evidence | None:
        """For fp32: what is proven on ONNX Runtime, whose answers every drop is counted from."""
        return self.card.runtimes.get(REFERENCE_RUNTIME, self.evidence)

    @property
    def profiled(self) -> str | None:
        """The runtime whose layers were timed: this one, or else another that was."""
        return next((name for name in self._measured_first() if self.measured[name].layers), None)

    @property
    def peak_memory(self) -> tuple[int, str] | None:
        """The bytes held at the largest batch, and where: on ONNX Runtime, so that variants compare, or elsewhere."""
        order = sorted(self._measured_first(), key=lambda name: name != REFERENCE_RUNTIME)
        found = ((self.measured[name].peak_memory_bytes, name) for name in order)
        return next(((peak, name) for peak, name in found if peak is not None), None)

    def _measured_first(self) -> list[str]:
        """The runtimes that it was measured on and may be served by, its own first."""
        own = {*self.card.runtimes, self.runtime, REFERENCE_RUNTIME}
        return sorted((name for name in self.measured if name in own), key=lambda name: name != self.runtime)

    @property
    def latencies(self) -> dict[int, int]:
        """Batch size -> nanoseconds as it would be served: one by one where batch-mates would change an answer."""
        if self.best is None:
            return {}
        return dict(as_served(self.best, self.card, self.runtime or ""))

    def accuracy(self, reference: VariantFacts) -> Accuracy | None:
        """The score below the reference's by the paired drop, with the drop's interval, which the gate judges."""
        own, base = self.evidence, reference.home
        if own is None or base is None:
            return None
        drop, best = own.accuracy_drop, base.score.value
        value = best - drop.value
        return Accuracy(value, best - drop.high, max(value, min(1.0, best - drop.low)))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A score with the bounds that the paired comparison with the reference leaves."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """One model's newest built version; the reference comes first.

    `absent` says what is stale or damaged, and why; `record` is what `variants: auto` tried.
    """

    name: str
    version: int
    config: ModelConfig
    variants: tuple[VariantFacts, ...]
    absent: tuple[str, ...] = ()
    tools: Mapping[str, str] = field(default_factory=dict)
    measurements: Measurements | None = None
    record: Record | None = None

    @property
    def reference(self) -> VariantFacts | None:
        """fp32, None where its card is damaged."""
        return next((variant for variant in self.variants if variant.name == REFERENCE), None)

    @property
    def batch_sizes(self) -> list[int]:
        """Every batch size that something was measured at."""
        return sorted({batch for variant in self.variants for batch in variant.latencies})

    def baseline(self, batch: int) -> int | None:
        """What speed-ups are multiples of: the latency of fp32 on ONNX Runtime in nanoseconds."""
        measured = self.reference.measured.get(REFERENCE_RUNTIME) if self.reference else None
        return measured.profile.latency_ns(batch) if measured and batch <= measured.profile.max_batch_size else None

    @property
    def fallen(self) -> Mapping[str, str]:
        """Why each variant is not worth keeping, by the build's own rules; without measurements by verdict alone."""
        speeds_known = {variant.name: variant.speed for variant in self.variants if variant.speed}
        return not_worth_keeping({variant.name: variant.card for variant in self.variants}, speeds_known)

    @property
    def beneficial(self) -> list[VariantFacts]:
        """The variants that passed and, where speed is known, pay on this host; another one may pay more."""
        is_known = any(variant.speed for variant in self.variants)
        return [
            variant
            for variant in self.variants
            if variant.name != REFERENCE and variant.passed
            and (not is_known or (variant.speed is not None and not variant.speed.no_benefit))
        ]  # fmt: skip

    def front(self, batch: int) -> list[VariantFacts]:
        """fp32 and the variants worth keeping, less those that another one makes pointless at this batch size.

        The fastest comes first.
        """
        fallen, standing = self.fallen, {}
        for variant in self.variants:
            speed, is_proven = variant.speed, variant.passed and variant.evidence is not None
            if is_proven and speed and batch in speed.speed_ups and variant.name not in fallen:
                here = Speed(speed.runtime, {batch: speed.speed_ups[batch]})
                standing[variant.name] = proven_drop(variant.card, speed.runtime), here
        names = standing.keys() - dominated(standing).keys()
        return sorted((v for v in self.variants if v.name in names), key=lambda variant: variant.latencies[batch])


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A model that cannot be shown, and why."""

    name: str
    reason: str


def gather(model: ModelFolder) -> ModelFacts | Unreadable:
    """Read one model; a repository's mistakes become its reason."""
    name = model.path.absolute().name
    try:
        built = [version for version in model.versions() if version.is_built]
        if built:
            return _read(built[-1])
        return Unreadable(name, "nothing is built yet; run `gearshift build` first")
    except (RepositoryError, OSError) as error:
        return Unreadable(name, str(error))


def _read(version: VersionFolder) -> ModelFacts:
    """Raises RepositoryError for a version whose manifest or configuration cannot be understood."""
    config, (cards, absent) = version.model.config, sound_cards(version)
    measurements = _read_or_say(read_measurements, version, absent)
    record = _read_or_say(read_record, version, absent)
    fast = speeds(measurements, cards, config.gate) if measurements else {}
    wanted = [variant.name for variant in config.variants or ()]
    names = sorted(cards, key=lambda n: (n != REFERENCE, wanted.index(n) if n in wanted else len(wanted), n))
    return ModelFacts(
        name=version.model.name,
        version=version.number,
        config=config,
        variants=tuple(
            VariantFacts(cards[name], _hue(position, name), fast.get(name), _measured(measurements, name))
            for position, name in enumerate(names)
        ),
        absent=tuple(absent),
        tools=version.manifest().tools,
        measurements=measurements,
        record=record,
    )


def _read_or_say(read: Callable[[Path], T | None], version: VersionFolder, absent: list[str]) -> T | None:
    """What a build wrote beside the variants; a file that cannot be understood becomes a sentence."""
    try:
        return read(version.path)
    except RepositoryError as error:
        absent.append(f"Not shown, because it cannot be read: {error}.")
        return None


def _hue(position: int, name: str) -> int:
    return 0 if name == REFERENCE else max(1, position)


def _measured(measurements: Measurements | None, name: str) -> Mapping[str, Measured]:
    return measurements.variants.get(name, {}) if measurements else {}
