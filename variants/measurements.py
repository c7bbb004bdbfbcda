"""What a build measured on its host, beside what it proved: speed, memory and the cost of each layer.

Rules of this file: these numbers belong to the host that is named with them; they are for people and for the report,
never for a server, which measures for itself. Durations are integer nanoseconds, sizes bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field, TypeAdapter

from variants.durable import write_durably
from variants.records import read_record_file
from variants.variant import LatencyProfile

FILE = "measurements.json"

EAGER = "torch"
"""Beside its runtimes, fp32 of a torch source is measured as the module itself, run eagerly on torch; never served."""


_MOST = 2**63 - 1
"""No duration and no size is larger; what a file says beyond it is damage."""

Amount = Annotated[int, Field(ge=0, le=_MOST)]


def _bounded(profile: LatencyProfile) -> LatencyProfile:
    if max(*profile.batch_sizes, *profile.latencies_ns) > _MOST:
        raise ValueError("a latency or batch size beyond all bounds")
    return profile


@dataclass(frozen=True, slots=True)
class LayerTime:
    """One operator of a graph: how long it takes per run, in nanoseconds."""

    name: str
    operator: str
    time_ns: Amount


@dataclass(frozen=True, slots=True)
class Measured:
    """One variant on one runtime, on one thread; `layers` at the batch size of the first latency, dearest first.

    `peak_memory_bytes` is the most that a process of its own held while it loaded the variant and ran the largest batch
    of the profile once, beyond what it held after the runtime's import; None where that was not measured.
    """

    profile: Annotated[LatencyProfile, AfterValidator(_bounded)]
    peak_memory_bytes: Amount | None = None
    layers: tuple[LayerTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Measurements:
    """All that one build measured, by variant and runtime, on the host whose CPU and fingerprint are given."""

    cpu: str
    host: str
    variants: Mapping[str, Mapping[str, Measured]] = field(default_factory=dict)


_ADAPTER = TypeAdapter(Measurements)


def read_measurements(version: Path) -> Measurements | None:
    """What the last build of a version measured, None where none did. Raises RepositoryError."""
    return read_record_file(version / FILE, _ADAPTER)


def write_measurements(version: Path, measurements: Measurements) -> None:
    """Replace what an earlier build measured."""
    write_durably(version / FILE, (json.dumps(asdict(measurements), indent=1) + "\n").encode())
