"""A model's folder becomes a `ServedModel`: verified, loaded, profiled on this host, its variants judged.

Rules: nothing of the repository is executed as code; every file of a built variant is checked against the manifest
before a runtime sees it; a `.pt2` can execute code and is loaded only on the operator's word. A variant that cannot run
here is listed with the reason and harms no other; only a reference that cannot run makes the model fail.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from server.eligibility import by_speed, by_verdict, served_ns
from server.example import example_inputs
from server.models import ServedModel
from server.scheduling.admission import Defaults
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey, OnInfeasible
from server.wire.inference import Signature
from variants.evaluate import judge, may_batch
from variants.hardware import Hardware, needs_reduced_range
from variants.measure import (
    Example,
    ProfileCache,
    ProfileKey,
    describe_inputs,
    find_failures,
    measure_profiles,
    profile_batch_sizes,
)
from variants.model_config import GateConfig, ModelConfig, RepositoryError
from variants.repository import ModelFolder, VersionFolder, file_sha256
from variants.runtimes import runtime_version
from variants.runtimes.runtime import Runtime, RuntimeUnavailable, Session
from variants.variant import (
    REFERENCE,
    Card,
    Evidence,
    Gate,
    Interval,
    LatencyProfile,
    State,
    TensorSpec,
    Variant,
    Verdict,
)

log = logging.getLogger(__name__)

ONNXRUNTIME = "onnxruntime"
_PROFILE_BUDGET_S = 12.0

_loads = count()


@dataclass(frozen=True, slots=True)
class Host:
    """What models are loaded onto, and on which terms."""

    hardware: Hardware
    device: str
    threads: int
    executors: int
    runtimes: Mapping[str, Runtime]
    profiles: ProfileCache
    default_latency_ns: int
    allow_unverified: bool
    trust_torch_archives: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run one variant here: an artefact on a runtime, loaded."""

    variant: str
    runtime: str
    precision: str
    sha256: str
    session: Session
    evidence: Evidence | None
    is_invariant: bool
    """Whether batch-mates leave an answer as it is; without evidence the recipe's word counts."""

    @property
    def key(self) -> tuple[str, str]:
        """What tells candidates of one model apart."""
        return self.variant, self.runtime


def load_model(folder: ModelFolder, host: Host) -> ServedModel:
    """Load the version that serves. Raises RepositoryError with a reason when the model cannot be served."""
    start_ns = time.monotonic_ns()
    config = folder.config  # read first: a mistake in it is told rather than what follows from it
    version = folder.serving()
    cards, set_aside = _cards(version)
    candidates: list[Candidate] = []
    for name, card in cards.items():
        if name not in set_aside:
            found, why_not = _candidates(version, card, host)
            candidates += found
            if not found:
                set_aside[name] = _without_runtime(name, card, host, why_not)
    if REFERENCE in set_aside:
        raise RepositoryError(f"{folder.name}: the reference {REFERENCE} cannot run: {set_aside[REFERENCE].reason}")
    signature = _signature(config, candidates)
    profiles, failures = _profiles(folder.name, version, signature, candidates, host)
    fastest = _fastest([candidate for candidate in candidates if candidate.key in profiles], profiles)
    for name in {variant for variant, _ in failures} - set(fastest):
        reason = "; ".join(why for (variant, _), why in failures.items() if variant == name)
        set_aside[name] = _unsupported(cards[name], reason)
    if REFERENCE in set_aside:
        raise RepositoryError(f"{folder.name} fails on the inputs it is measured with: {set_aside[REFERENCE].reason}")
    variants = [
        _variant(chosen, cards[name], profiles[chosen.key], signature, host) for name, chosen in fastest.items()
    ]
    order = {name: place for place, name in enumerate(cards)}
    variants = by_speed(sorted((*variants, *set_aside.values()), key=lambda v: (v.name != REFERENCE, order[v.name])))
    variants = [replace(variant, reason=for_clients(variant.reason, folder)) for variant in variants]
    key = ModelKey(folder.name, str(version.number), next(_loads))
    queue = ModelQueue(key, variants, int(config.batching.max_queue_delay_ms * 1e6))
    return ServedModel(
        name=folder.name,
        version=str(version.number),
        signature=signature,
        variants=tuple(variants),
        cards=cards,
        sessions={name: candidate.session for name, candidate in fastest.items()},
        queue=queue,
        defaults=_defaults(config, host),
        load_ns=time.monotonic_ns() - start_ns,
    )


def for_clients(reason: str, folder: ModelFolder) -> str:
    """A reason without the paths of this host, which are no client's concern."""
    return reason.replace(f"{folder.path}/", "").replace(str(folder.path), folder.path.name)


def _cards(version: VersionFolder) -> tuple[dict[str, Card], dict[str, Variant]]:
    """The cards by name, and the variants whose own could not be believed, with a card that proves nothing."""
    if not version.is_built:  # it serves as its own reference
        return {REFERENCE: _blank_card(REFERENCE, "served from the source as it is; nothing was evaluated")}, {}
    cards, set_aside = {}, {}
    for name in sorted(version.manifest().variants):
        try:
            card = version.card(name)
        except RepositoryError as error:
            card = _blank_card(name, str(error))
            set_aside[name] = _unsupported(card, str(error))
        if card is not None:
            cards[name] = card
    return cards, set_aside


def _blank_card(name: str, reason: str) -> Card:
    return Card(
        variant=name, recipe=name, parameters={}, artefact=None, sha256=None, parent=None, requirements={},
        size_bytes=0, compressed_bytes=0, weights=0, flops=0, runtimes={}, gate=Gate(Verdict.UNVERIFIED, reason),
    )  # fmt: skip


def _candidates(version: VersionFolder, card: Card, host: Host) -> tuple[list[Candidate], str]:
    """Every way to run a variant here, and why the others fell away."""
    if card.variant == REFERENCE and not version.is_built:
        source = version.onnx_source
        if source is None:
            raise RepositoryError(f"{version.path}: the ONNX source is not there")
        artefacts, reasons = {source: file_sha256(source)}, list[str]()
    else:
        artefacts, reasons = _intact(version, card)
    candidates = []
    for path, sha256 in artefacts.items():
        for runtime in host.runtimes.values():
            if runtime.suffix != path.suffix:
                continue  # the variant has another file for it, or none; no reason that a person would want to read
            try:
                candidates.append(_candidate(card, path, sha256, runtime, host, version.model.config.gate))
            except RuntimeUnavailable as error:
                reasons.append(str(error))
    return candidates, "; ".join(dict.fromkeys(reasons)) or card.gate.reason


def _intact(version: VersionFolder, card: Card) -> tuple[dict[Path, str], list[str]]:
    """The artefacts that are what the manifest says, with their sha256, and why the others are not touched."""
    intact, reasons = {}, []
    for file, sha256 in card.artefacts.items():
        try:
            intact[version.artefact(card.variant, file)] = sha256
        except RepositoryError as error:
            reasons.append(str(error))
    return intact, reasons


def _candidate(card: Card, path: Path, sha256: str, runtime: Runtime, host: Host, gate: GateConfig) -> Candidate:
    name = runtime.name
    precision = _precision(card)
    reason = runtime.why_not(path, precision, host.hardware)
    if reason is None and path.suffix == ".pt2" and not host.trust_torch_archives:
        reason = "a .pt2 archive can execute code and is loaded only with --trust-torch-archives"
    reason = reason or _not_like_the_build_host(card, name, precision, host)
    evidence = card.runtimes.get(name)
    is_unverified = card.gate.verdict is Verdict.UNVERIFIED
    needs_evidence = name != ONNXRUNTIME if card.variant == REFERENCE else not is_unverified
    if reason is None and evidence is None and needs_evidence:
        reason = f"nothing is proven about it on {name}; run `gearshift build` on a host like this one"
    if reason is None and evidence is not None and not _proven(card, name, evidence, gate):
        reason = f"it does not pass the gate on {name}"
    if reason is not None:
        raise RuntimeUnavailable(reason)
    session = runtime.load(path, precision=precision, threads=host.threads, device=_device(name, host))
    return Candidate(card.variant, name, precision, sha256, session, evidence, may_batch(card, evidence))


def _not_like_the_build_host(card: Card, runtime: str, precision: str, host: Host) -> str | None:
    """Why evidence from the build host does not hold here: it is a CPU's, or for fp16 and TensorRT a CUDA device's."""
    device, proven_on_cuda = _device(runtime, host), precision == "fp16" or runtime == "tensorrt"
    if proven_on_cuda:
        return None
    if card.requirements.get("exact_int8_sums") and needs_reduced_range(host.hardware):
        return "its 8-bit weights were proven on another kind of CPU and would saturate on this one, which has no VNNI"
    if card.variant != REFERENCE and card.runtimes and device != "cpu":
        return f"its evidence was measured on a CPU and proves nothing about {device}"
    return None


def _proven(card: Card, runtime: str, evidence: Evidence, gate: GateConfig) -> bool:
    """Whether a variant that passed its gate somewhere passes it on this runtime; the reference's home is the truth."""
    if card.gate.verdict is not Verdict.PASSED or (card.variant == REFERENCE and runtime == ONNXRUNTIME):
        return True
    return judge(evidence.accuracy_drop, evidence.agreement, evidence.samples, gate) is Verdict.PASSED


def _precision(card: Card) -> str:
    if "precision" in card.requirements:
        return str(card.requirements["precision"])
    return "int8" if "int8" in card.recipe else "fp32"


def _device(runtime: str, host: Host) -> str:
    """OpenVINO runs on the CPU whatever device the operator asked for."""
    return "cpu" if runtime == "openvino" else host.device


def _without_runtime(name: str, card: Card, host: Host, why_not: str) -> Variant:
    state, reason = by_verdict(name, card.gate, allow_unverified=host.allow_unverified)
    variant = _unsupported(card, why_not)
    return variant if card.artefacts or name == REFERENCE else replace(variant, state=state, reason=reason)


def _unsupported(card: Card, reason: str) -> Variant:
    """A variant that cannot run here, with what was proven about it elsewhere."""
    evidence = next(iter(card.runtimes.values()), None)
    return Variant(
        name=card.variant,
        state=State.UNSUPPORTED,
        reason=reason,
        precision=_precision(card),
        runtime="",
        device="",
        score=evidence.score if evidence else None,
        drop=_drop(card, evidence),
        size_bytes=card.size_bytes,
    )


def _signature(config: ModelConfig, candidates: list[Candidate]) -> Signature:
    """The reference's inputs and outputs; a batch dimension where the configuration wants one and the model has it."""
    reference = next(c for c in candidates if c.variant == REFERENCE)
    session = reference.session
    most = config.batching.max_batch_size if session.batch_axis else 0
    if not most:
        return Signature(session.inputs, session.outputs, 0)
    return Signature(_batched(session.inputs), _batched(session.outputs), most)


def _batched(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, shape=(-1, *spec.shape[1:])) for spec in specs)


def _profiles(
    name: str, version: VersionFolder, signature: Signature, candidates: list[Candidate], host: Host
) -> tuple[dict[tuple[str, str], LatencyProfile], dict[tuple[str, str], str]]:
    """Each candidate's latency profile, remembered or measured now, in turns; and why those without one failed."""
    sizes = profile_batch_sizes(signature.max_batch_size) if signature.max_batch_size else (1,)
    example = example_inputs(version, signature)
    keys = {candidate.key: _profile_key(candidate, sizes, example, host) for candidate in candidates}
    profiles = {key: found for key, profile_key in keys.items() if (found := host.profiles.get(profile_key))}
    missing = {c.key: c.session for c in candidates if c.key not in profiles}
    failures: dict[tuple[str, str], str] = {}
    if missing:
        label = ", ".join(f"{variant} on {runtime}" for variant, runtime in missing)
        log.info("model %s: measuring %s at batch sizes %s", name, label, ", ".join(map(str, sizes)))
        failures = {key: f"on {key[1]} {why}" for key, why in find_failures(missing, example, sizes).items()}
        healthy = {key: session for key, session in missing.items() if key not in failures}
        measured = measure_profiles(healthy, example, sizes, budget_s=_PROFILE_BUDGET_S)
        for key, profile in measured.items():
            host.profiles.put(keys[key], profile)
        profiles |= measured
    return profiles, failures


def _profile_key(candidate: Candidate, sizes: tuple[int, ...], example: Example, host: Host) -> ProfileKey:
    return ProfileKey(
        artefact_sha256=candidate.sha256,
        runtime=candidate.runtime,
        runtime_version=runtime_version(candidate.runtime),
        precision=candidate.precision,
        threads=host.threads,
        device=_device(candidate.runtime, host),
        host=host.hardware.fingerprint,
        batch_sizes=sizes,
        inputs=describe_inputs(example),
        executors=host.executors,
    )


def _fastest(candidates: list[Candidate], profiles: Mapping[tuple[str, str], LatencyProfile]) -> dict[str, Candidate]:
    """For each variant the candidate with the least time per sample, as it would be served, over all batch sizes."""

    def time_per_sample(candidate: Candidate) -> float:
        profile = profiles[candidate.key]
        return sum(served_ns(profile, n, batchable=candidate.is_invariant) / n for n in profile.batch_sizes)

    fastest: dict[str, Candidate] = {}
    for candidate in candidates:
        other = fastest.get(candidate.variant)
        if other is None or time_per_sample(candidate) < time_per_sample(other):
            fastest[candidate.variant] = candidate
    return fastest


def _variant(chosen: Candidate, card: Card, profile: LatencyProfile, signature: Signature, host: Host) -> Variant:
    state, reason = by_verdict(card.variant, card.gate, allow_unverified=host.allow_unverified)
    evidence = chosen.evidence
    return Variant(
        name=card.variant,
        state=state,
        reason=reason,
        precision=chosen.precision,
        runtime=chosen.runtime,
        device=_device(chosen.runtime, host),
        score=evidence.score if evidence else None,
        drop=_drop(card, evidence),
        profile=profile,
        batchable=signature.max_batch_size > 0 and chosen.is_invariant,
        size_bytes=card.size_bytes,
    )


def _drop(card: Card, evidence: Evidence | None) -> Interval | None:
    if evidence is None:
        return None
    return Interval(0.0, 0.0, 0.0) if card.variant == REFERENCE else evidence.accuracy_drop


def _defaults(config: ModelConfig, host: Host) -> Defaults:
    latency_ms = config.slo.latency_ms
    on_infeasible = config.slo.on_infeasible
    return Defaults(
        latency_ns=host.default_latency_ns if latency_ms is None else int(latency_ms * 1e6),
        max_accuracy_drop=config.slo.max_accuracy_drop,
        on_infeasible=tuple(map(OnInfeasible, on_infeasible)) if on_infeasible is not None else None,
    )
