"""Latency profiles: how long a batch takes on this host, measured fairly on a noisy one, and remembered.

Rules: sessions that will be compared are measured in turns, so that a disturbance falls on all of them and ratios hold;
a latency is the least of several rounds' medians, since other work can only ever make a round slower. Durations are
integer nanoseconds of an injected clock, budgets are seconds. A session may be measured in company (`crowd.py`).
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np

from variants import datatypes
from variants.runtimes.runtime import Array, Session
from variants.variant import LatencyProfile, TensorSpec

Inputs = Mapping[str, Array]
Example = Inputs | Callable[[int], Inputs]
"""Inputs of one sample (dim 0 has size 1), or a function that makes inputs for a batch size."""

Company = Callable[[Session, Inputs], AbstractContextManager[None]]
"""What else runs while a session is measured on these inputs: a context that lasts as long."""

Key = TypeVar("Key", bound=Hashable)

DEFAULT_DIM = 16
"""The size that a variable dimension other than the batch gets where there is no real data to tell."""

_ROUNDS = 5
_RUNS_PER_ROUND = 20


def profile_batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """1, 2, 4, ... up to and including `max_batch_size`."""
    powers = (1 << exponent for exponent in range(max_batch_size.bit_length()))
    return tuple(sorted({*powers, max_batch_size}))


def synthetic_inputs(specs: Sequence[TensorSpec], batch_size: int, *, batch_axis: bool = True) -> dict[str, Array]:
    """Inputs for a model without data: seeded noise for floats, ones for the rest (a valid token, a full mask).

    Variable dimensions become `DEFAULT_DIM`, except dim 0 where it is the batch.
    """
    generator = np.random.default_rng(0)
    inputs: dict[str, Array] = {}
    for spec in specs:
        shape = [DEFAULT_DIM if dim < 0 else dim for dim in spec.shape]
        if batch_axis:
            shape[0] = batch_size
        dtype = datatypes.DATATYPES[spec.datatype].numpy
        if spec.datatype == "BYTES":
            inputs[spec.name] = np.full(shape, "1", dtype=object)
        elif spec.datatype in {"FP16", "FP32", "FP64", "BF16"}:
            inputs[spec.name] = generator.standard_normal(shape).astype(dtype)
        else:
            inputs[spec.name] = np.ones(shape, dtype=dtype)
    return inputs


def alone(_session: Session, _inputs: Inputs) -> AbstractContextManager[None]:
    """No company: nothing else runs."""
    return nullcontext()


def find_failures(
    sessions: Mapping[Key, Session], example: Example, batch_sizes: Sequence[int], *, company: Company = alone
) -> dict[Key, str]:
    """The sessions that cannot run the example at one of the batch sizes, and why: they must not be measured."""
    failures: dict[Key, str] = {}
    for size in sorted(set(batch_sizes)):
        inputs = batch_of(example, size)
        for key, session in sessions.items():
            if key not in failures and (size == 1 or session.batch_axis):
                try:
                    with company(session, inputs):
                        session.run(inputs)
                except Exception as error:  # every runtime raises its own
                    failures[key] = f"it fails at batch size {size}: {' '.join(str(error).split())[:300]}"
    return failures


def measure_profiles(
    sessions: Mapping[Key, Session],
    example: Example,
    batch_sizes: Sequence[int],
    *,
    budget_s: float,
    company: Company = alone,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[Key, LatencyProfile]:
    """The latency profiles of sessions that run the same model on this host, comparable with one another.

    `company` runs beside every run that is timed. A session without a batch axis is measured at batch size 1 only. The
    budget bounds the time spent, except that every session runs at least twice per batch size: once to warm up, once to
    be measured.
    """
    sizes = sorted(set(batch_sizes))
    latencies: dict[Key, dict[int, int]] = {key: {} for key in sessions}
    deadline = clock() + int(budget_s * 1e9)
    for position, size in enumerate(sizes):
        share = max(0, deadline - clock()) // (len(sizes) - position)  # what small batches leave goes to larger ones
        inputs = batch_of(example, size)
        taking_part = {key: session for key, session in sessions.items() if size == 1 or session.batch_axis}
        for key, latency in _measure(taking_part, inputs, share, company, clock).items():
            latencies[key][size] = latency
    return {key: _profile(found) for key, found in latencies.items()}


def _profile(found: Mapping[int, int]) -> LatencyProfile:
    """A profile of latencies by rising size; a smaller batch that measured slower than a larger one was disturbed."""
    latencies = list(found.values())
    return LatencyProfile(tuple(found), tuple(min(latencies[position:]) for position in range(len(latencies))))


def batch_of(example: Example, size: int) -> Inputs:
    """The inputs of a batch: one sample repeated, or what the function gives."""
    if callable(example):
        return example(size)
    return {name: np.repeat(array[:1], size, axis=0) if array.ndim else array for name, array in example.items()}


def _measure(
    sessions: Mapping[Key, Session], inputs: Inputs, share_ns: int, company: Company, clock: Callable[[], int]
) -> dict[Key, int]:
    """The latency of each session at one batch size, in nanoseconds, found in about `share_ns`."""
    end = clock() + share_ns
    estimates = {}
    for key, session in sessions.items():
        session.run(inputs)  # the first run allocates, and some runtimes compile for the new shape
        with company(session, inputs):
            estimates[key] = _time_run(session, inputs, clock)
    turn_ns = share_ns // (_ROUNDS * max(1, len(sessions)))
    runs = {key: min(max(turn_ns // estimate, 1), _RUNS_PER_ROUND) for key, estimate in estimates.items()}
    round_ns = sum(runs[key] * estimate for key, estimate in estimates.items())
    medians: dict[Key, list[int]] = {key: [] for key in sessions}
    for _ in range(_ROUNDS):
        if clock() + round_ns > end:
            break
        for key, session in sessions.items():
            with company(session, inputs):
                medians[key].append(int(median(_time_run(session, inputs, clock) for _ in range(runs[key]))))
    return {key: min(medians[key], default=estimates[key]) for key in sessions}


def _time_run(session: Session, inputs: Inputs, clock: Callable[[], int]) -> int:
    """One run's duration in nanoseconds, at least 1."""
    start = clock()
    session.run(inputs)
    return max(1, clock() - start)


def describe_inputs(example: Example) -> tuple[str, ...]:
    """Name, dtype and shape of every input of one sample, since a longer sequence is another latency."""
    return tuple(f"{name} {array.dtype} {array.shape}" for name, array in sorted(batch_of(example, 1).items()))


@dataclass(frozen=True, slots=True)
class ProfileKey:
    """All that a latency profile depends on; `host` is `Hardware.fingerprint`, `inputs` is `describe_inputs`."""

    artefact_sha256: str
    runtime: str
    runtime_version: str
    precision: str
    threads: int
    device: str
    host: str
    batch_sizes: tuple[int, ...]
    inputs: tuple[str, ...]
    executors: int


@dataclass(frozen=True, slots=True)
class Profiles:
    """What was measured under one key, as `Variant` has it; None is what was not."""

    alone: LatencyProfile | None = None
    crowded: LatencyProfile | None = None
    lengths: tuple[tuple[int, LatencyProfile], ...] | None = None


class ProfileCache:
    """Measured profiles in a folder, one JSON file per key; None, a missing or a read-only folder is just no cache."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def get(self, key: ProfileKey) -> Profiles:
        """What is remembered; nothing where there is no entry that can be read."""
        if self._folder is None:
            return Profiles()
        try:
            found = json.loads(self._path(self._folder, key).read_text())
            alone, crowded, lengths = found["alone"], found["crowded"], found["lengths"]
            return Profiles(
                alone=None if alone is None else _read(alone),
                crowded=None if crowded is None else _read(crowded),
                lengths=None if lengths is None else tuple((int(length), _read(each)) for length, each in lengths),
            )
        except (OSError, ValueError, KeyError, TypeError):  # damaged, or of an older release: measured again
            return Profiles()

    def put(self, key: ProfileKey, profiles: Profiles) -> None:
        """Remember profiles, atomically; silently does nothing where the folder cannot be written."""
        if self._folder is None:
            return
        entry = {"key": asdict(key), **asdict(profiles)}
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._folder, suffix=".tmp")
            try:
                with os.fdopen(handle, "w") as file:
                    json.dump(entry, file, indent=1)
                Path(temporary).replace(self._path(self._folder, key))
            except OSError:
                Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def _path(folder: Path, key: ProfileKey) -> Path:
        digest = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()
        return folder / f"{digest[:32]}.json"


def _read(entry: Mapping[str, Any]) -> LatencyProfile:
    return LatencyProfile(tuple(entry["batch_sizes"]), tuple(entry["latencies_ns"]))
