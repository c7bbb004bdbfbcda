"""What a build measures on its host: every variant on every runtime in turns, then memory and layers.

Rules of this file: one thread; the speeds of one build are comparable, for they were measured in interleaved rounds,
so a build that made only some variants still measures all of them; the time is bounded per variant. A torch source's
own module takes part as fp32 on torch, run eagerly: where a person comes from. It is never served.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Array, Samples
from variants.export import input_names
from variants.layers import archive_layers, graph_layers, module_layers
from variants.measure import find_failures, measure_profiles, synthetic_inputs
from variants.measurements import EAGER, LayerTime, Measured, Measurements
from variants.memory import measure_peak_memory
from variants.repository import VersionFolder
from variants.runtimes.runtime import RuntimeUnavailable, Session
from variants.source import Source
from variants.summary import speeds
from variants.variant import REFERENCE, Card
from variants.verify import REFERENCE_RUNTIME, Verifier

if TYPE_CHECKING:
    from torch import nn

BATCH_SIZES = (1, 8, 32)
SECONDS_PER_SESSION = 0.45
"""For all batch sizes together; slower models take longer, see `measure_profiles`."""

Key = tuple[str, str]
"""A variant and a runtime."""

_ALWAYS = ((REFERENCE, REFERENCE_RUNTIME), (REFERENCE, EAGER))

Inputs = Callable[[int], Mapping[str, Array]]


def measure_variants(
    version: VersionFolder,
    cards: Mapping[str, Card],
    source: Source,
    samples: Samples | None,
    verifier: Verifier,
    *,
    quick: bool = False,
) -> Measurements:
    """Measure all variants that can run here; `quick` leaves out memory and layers.

    These are taken of fp32 on ONNX Runtime, of each variant's fastest runtime, and of a torch source's module.
    """
    hardware, inputs = verifier.hardware, _inputs(source, samples)
    sizes = sorted({min(size, max(1, source.max_batch)) for size in BATCH_SIZES})
    files, sessions = {}, dict[Key, Session]()
    for key, file, session in _opened(version, cards, verifier):
        files[key], sessions[key] = file, session
    if source.module is not None:
        sessions[REFERENCE, EAGER] = _Eager(source, source.module)
    found = _timed(sessions, inputs, sizes)
    measured = Measurements(hardware.cpu, hardware.fingerprint, _by_variant(found))
    if quick:
        return measured
    fastest = [(name, speed.runtime) for name, speed in speeds(measured, cards, verifier.config.gate).items()]
    keys = [key for key in dict.fromkeys([*_ALWAYS, *fastest]) if key in found]
    closer = _Closer(files, cards, source, inputs, sizes[-1])
    return replace(measured, variants=_by_variant(closer.look(found, keys, hardware.cores)))


def _timed(sessions: Mapping[Key, Session], inputs: Inputs, sizes: Sequence[int]) -> dict[Key, Measured]:
    """The latency profile of each session that can run every batch size."""
    with _one_torch_thread():
        failures = find_failures(sessions, inputs, sizes)
        healthy = {key: session for key, session in sessions.items() if key not in failures}
        profiles = measure_profiles(healthy, inputs, sizes, budget_s=SECONDS_PER_SESSION * len(healthy))
    return {key: Measured(profile) for key, profile in profiles.items()}


def _by_variant(found: Mapping[Key, Measured]) -> dict[str, dict[str, Measured]]:
    variants: dict[str, dict[str, Measured]] = {}
    for (name, runtime), measured in found.items():
        variants.setdefault(name, {})[runtime] = measured
    return variants


@dataclass(frozen=True, slots=True)
class _Closer:
    """A closer look at single variants: memory at the largest batch, layers at a batch of one."""

    files: Mapping[Key, Path]
    cards: Mapping[str, Card]
    source: Source
    inputs: Inputs
    largest: int

    def look(self, found: Mapping[Key, Measured], keys: Sequence[Key], workers: int) -> dict[Key, Measured]:
        """What was found, with the memory of `keys`, and with their layers where a runtime can tell them."""
        closer = dict(found)
        with ThreadPoolExecutor(workers) as pool:
            for key, peak in zip(keys, pool.map(self._memory, keys), strict=True):
                closer[key] = replace(closer[key], peak_memory_bytes=peak)
        # OpenVINO does not keep the names of the graph's nodes
        telling = [(name, REFERENCE_RUNTIME if runtime == "openvino" else runtime) for name, runtime in keys]
        for key in dict.fromkeys(telling):
            if key in closer:
                closer[key] = replace(closer[key], layers=self._layers(key))
        return closer

    def _memory(self, key: Key) -> int | None:
        """None for what is no artefact."""
        if key not in self.files:
            return None
        return measure_peak_memory(self.files[key], key[1], _precision(self.cards[key[0]]), self.inputs(self.largest))

    def _layers(self, key: Key) -> tuple[LayerTime, ...]:
        with _one_torch_thread():
            if key not in self.files:
                return module_layers(self.source.module, self.inputs(1)) if self.source.module is not None else ()
            tell = graph_layers if self.files[key].suffix == ".onnx" else archive_layers
            return tell(self.files[key], self.inputs(1))


def _opened(
    version: VersionFolder, cards: Mapping[str, Card], verifier: Verifier
) -> Iterator[tuple[Key, Path, Session]]:
    """A session per variant and runtime that has evidence, or that can run it where nothing has any."""
    for name, card in cards.items():
        files = {file: version.artefact(name, file) for file in card.artefacts}
        for runtime, artefact in verifier.candidates(files, _precision(card)):
            is_fast = runtime.why_not(artefact, _precision(card), verifier.hardware) is None  # not merely emulated here
            if is_fast and (not card.runtimes or runtime.name in card.runtimes):
                with suppress(RuntimeUnavailable):
                    yield (name, runtime.name), artefact, verifier.load(runtime, artefact, _precision(card), threads=1)


def _precision(card: Card) -> str:
    return str(card.requirements.get("precision", ""))


def _inputs(source: Source, samples: Samples | None) -> Inputs:
    """Inputs of any batch size: a real sample over and over, or noise where there is no data."""

    def inputs(size: int) -> Mapping[str, Array]:
        if samples is None:
            return synthetic_inputs(source.signature.inputs, size, batch_axis=source.max_batch > 0)
        one = {name: array[0, ...] for name, array in samples.inputs.items()}
        return {name: np.repeat(a[None], size, axis=0) for name, a in one.items()} if source.max_batch else one

    return inputs


class _Eager:
    """A torch source's module as a session; its answers are not looked at."""

    def __init__(self, source: Source, module: nn.Module) -> None:
        self.inputs, self.outputs = source.signature.inputs, source.signature.outputs
        self.batch_axis = source.signature.batch_axis
        self._module = module

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """One batch."""
        import torch

        with torch.inference_mode():
            self._module(*(torch.from_numpy(np.array(inputs[name])) for name in input_names(self._module, inputs)))
        return []


@contextmanager
def _one_torch_thread() -> Iterator[None]:
    """Its threads are the process's, not a session's."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
