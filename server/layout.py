"""How the cores of a CPU are shared between executors: many of one thread, one of many, or between. Measured.

Rules: every layout keeps all its executors busy while it is measured: an idle server is short of nothing. The models'
references speak for them. One model is in memory at a time, in all layouts, so that they are measured in turns; a model
that cannot be measured is left out. Figures are remembered like every other profile: a restart measures nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from server.candidates import ONNXRUNTIME, Host, intact_artefacts
from server.example import example_inputs
from server.loading import blank_card, signature_of
from server.profiling import profile_key
from variants.crowd import crowd
from variants.measure import Example, ProfileKey, measure_profiles, profile_batch_sizes
from variants.model_config import RepositoryError
from variants.repository import ModelFolder
from variants.runtimes import available_runtimes
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.runtime import Session
from variants.variant import REFERENCE

log = logging.getLogger(__name__)

MOST_LAYOUTS = 4
_ONE_S, _BATCH_S = 0.5, 1.5
"""What measuring one sample and one batch may take, for each model and layout."""
_RUNS = 4
"""So often a batch should fit into the time for it: to warm up, to estimate, to measure in company that ends later."""
_TOTAL_S = 60.0
"""After so long no further model is measured."""


class Layout(NamedTuple):
    """So many executors, each with so many threads."""

    executors: int
    threads: int

    def __str__(self) -> str:
        return f"{self.executors} x {self.threads}"


@dataclass(frozen=True, slots=True)
class Figure:
    """What a model's reference does in a layout while all executors run it; `in_time`: one sample within its SLO."""

    samples_per_s: float
    in_time: bool


Measure = Callable[[ModelFolder, Sequence[Host]], list[Figure]]
"""A model's figures on each of these hosts."""


def possible_layouts(cores: int) -> list[Layout]:
    """At most `MOST_LAYOUTS` ways to share the cores with none left over, from one thread each to all for one."""
    divisors = [threads for threads in range(1, cores + 1) if cores % threads == 0]
    last = min(len(divisors), MOST_LAYOUTS) - 1
    chosen = [divisors[round(place * (len(divisors) - 1) / last)] for place in range(last + 1)] if last else divisors
    return [Layout(cores // threads, threads) for threads in chosen]


def best_layout(layouts: Sequence[Layout], figures: Mapping[str, Mapping[Layout, Figure]]) -> Layout:
    """The layout that keeps the most models within their SLO, and of those the one with the highest throughput."""
    return max(layouts, key=lambda layout: (-len(_too_slow(layout, figures)), _mean_throughput(layout, figures)))


def _too_slow(layout: Layout, figures: Mapping[str, Mapping[Layout, Figure]]) -> list[str]:
    return [model for model, found in figures.items() if not found[layout].in_time]


def _mean_throughput(layout: Layout, figures: Mapping[str, Mapping[Layout, Figure]]) -> float:
    """The geometric mean over the models, so that a fast model does not outvote a slow one; 0 without any."""
    rates = [found[layout].samples_per_s for found in figures.values()]
    return geometric_mean(rates) if rates else 0.0


def _told(layout: Layout, figures: Mapping[str, Mapping[Layout, Figure]]) -> str:
    if not figures:
        return "no model was measured"
    too_slow = _too_slow(layout, figures)
    out = f"; fp32 breaks the SLO of {', '.join(too_slow)}" if too_slow else ""
    return f"{_mean_throughput(layout, figures):.1f} samples/s of fp32, geometric mean over {len(figures)} models{out}"


def _shared(host: Host, layout: Layout) -> Host:
    if layout == (host.executors, host.threads):
        return host
    runtimes = available_runtimes(layout.executors)
    return replace(host, executors=layout.executors, threads=layout.threads, runtimes=runtimes)


def measure_reference(folder: ModelFolder, hosts: Sequence[Host]) -> list[Figure]:
    """What a model's reference does on ONNX Runtime on each host, with all executors busy.

    Raises RepositoryError or what the runtime raises where it cannot run.
    """
    version = folder.serving()
    card = version.card(REFERENCE) if version.is_built else blank_card(REFERENCE, "")
    artefacts, why_not = intact_artefacts(version, card) if card else ({}, [f"it has no card of {REFERENCE}"])
    artefact = next((path for path in artefacts if path.suffix == ".onnx"), None)
    if artefact is None:
        raise RepositoryError("; ".join(why_not) or f"its {REFERENCE} is no ONNX file")
    signature = signature_of(folder.config, read_signature(artefact))
    sizes = profile_batch_sizes(signature.max_batch_size) if signature.max_batch_size else (1,)
    reference = _Reference(artefact, artefacts[artefact], example_inputs(version, signature), hosts)
    latency_ms = folder.config.slo.latency_ms
    return _figures(reference, sizes, hosts[0].default_latency_ns if latency_ms is None else int(latency_ms * 1e6))


def _figures(reference: _Reference, sizes: Sequence[int], slo_ns: int) -> list[Figure]:
    """The better of one sample and the batch that half of the SLO allows in all layouts that it allows one sample in.

    The other half is for waiting.
    """
    ones_ns = reference.latencies_ns(1, _ONE_S)
    slowest_ns = max((one_ns for one_ns in ones_ns if one_ns <= slo_ns), default=slo_ns)
    most = min(slo_ns / 2, _BATCH_S * 1e9 / _RUNS) / slowest_ns
    size = max(size for size in sizes if size <= max(1, most))
    batches_ns = ones_ns if size == 1 else reference.latencies_ns(size, _BATCH_S)
    return [
        Figure(host.executors * max(1 / one_ns, size / batch_ns) * 1e9, one_ns <= slo_ns)
        for host, one_ns, batch_ns in zip(reference.hosts, ones_ns, batches_ns, strict=True)
    ]


class _Reference:
    """A model's reference on several hosts; loaded only where something is not remembered."""

    def __init__(self, artefact: Path, sha256: str, example: Example, hosts: Sequence[Host]) -> None:
        self.hosts = hosts
        self._artefact, self._sha256, self._example = artefact, sha256, example
        self._sessions: dict[int, Session] = {}

    def latencies_ns(self, size: int, budget_s: float) -> list[int]:
        """How long a batch takes on each host while every other executor runs one too; measured in turns."""
        keys = [self._key(host, size) for host in self.hosts]
        found = {place: self.hosts[place].profiles.get(key).crowded for place, key in enumerate(keys)}
        missing = {place: self._session(place) for place, profile in found.items() if profile is None}
        companies = {id(session): crowd(self.hosts[place].executors - 1) for place, session in missing.items()}
        measured = measure_profiles(
            missing,
            self._example,
            (size,),
            budget_s=budget_s * len(missing),
            company=lambda session, inputs: companies[id(session)](session, inputs),
        )
        for place, profile in measured.items():
            cache = self.hosts[place].profiles
            cache.put(keys[place], replace(cache.get(keys[place]), crowded=profile))
        profiles = {place: profile for place, profile in found.items() if profile is not None} | measured
        return [profiles[place].latency_ns(size) for place in range(len(self.hosts))]

    def _key(self, host: Host, size: int) -> ProfileKey:
        return profile_key(
            host, sha256=self._sha256, runtime=ONNXRUNTIME, precision="fp32", sizes=(size,), example=self._example
        )

    def _session(self, place: int) -> Session:
        if place not in self._sessions:
            runtime, threads = self.hosts[place].runtimes[ONNXRUNTIME], self.hosts[place].threads
            self._sessions[place] = runtime.load(self._artefact, precision="fp32", threads=threads, device="cpu")
        return self._sessions[place]


def choose_layout(
    host: Host,
    folders: Sequence[ModelFolder],
    measure: Measure = measure_reference,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Host:
    """The host with its cores shared as suits the models of the repository best.

    That is the layout with the highest throughput, as the geometric mean over the models; one that makes the reference
    of a model break its SLO even alone in a batch is out, unless all do.
    """
    layouts = possible_layouts(host.executors * host.threads)
    if len(layouts) == 1 or not folders:
        return _shared(host, layouts[0])
    hosts = [_shared(host, layout) for layout in layouts]
    figures: dict[str, Mapping[Layout, Figure]] = {}
    end = clock() + int(_TOTAL_S * 1e9)
    for folder in folders:
        if clock() > end:
            log.warning("executors: model %s and those after it are not measured: it takes too long", folder.path.name)
            break
        try:
            found = measure(folder, hosts)
        except Exception as error:  # every runtime raises its own; why the model cannot be served is told at its load
            log.warning("executors: model %s is not measured: %s", folder.path.name, error)
        else:
            figures[folder.path.name] = dict(zip(layouts, found, strict=True))
    best = best_layout(layouts, figures)
    for layout in layouts:
        log.info(
            "executors x threads = %s%s: %s", layout, " (chosen)" if layout == best else "", _told(layout, figures)
        )
    return _shared(host, best)
