"""A model's folder becomes a `ServedModel`: verified, loaded, profiled on this host, its variants judged.

Rules: a variant that cannot run here is listed with the reason and harms no other; only a reference that cannot run
makes the model fail.
"""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import count

from server.candidates import Candidate, Host, device_of, find_candidates, precision_of
from server.eligibility import by_speed, by_verdict
from server.example import example_inputs
from server.models import ServedModel
from server.profiling import Profiler
from server.scheduling.admission import Defaults
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey, OnInfeasible
from server.wire.inference import Signature
from variants.measure import Profiles
from variants.model_config import ModelConfig, RepositoryError
from variants.repository import ModelFolder, VersionFolder
from variants.runtimes.onnx_signature import Signature as Graph
from variants.runtimes.runtime import Session
from variants.variant import REFERENCE, Card, Evidence, Gate, Interval, State, TensorSpec, Variant, Verdict

__all__ = ["Host", "blank_card", "for_clients", "load_model", "signature_of"]

_loads = count()


def load_model(folder: ModelFolder, host: Host) -> ServedModel:
    """Load the version that serves. Raises RepositoryError with a reason when the model cannot be served."""
    start_ns = time.monotonic_ns()
    config = folder.config  # read first: a mistake in it is told rather than what follows from it
    version = folder.serving()
    cards, set_aside = _cards(version)
    candidates: list[Candidate] = []
    for name, card in cards.items():
        if name not in set_aside:
            found, why_not = find_candidates(version, card, host)
            candidates += found
            if not found:
                set_aside[name] = _without_runtime(name, card, host, why_not)
    if REFERENCE in set_aside:
        raise RepositoryError(f"{folder.name}: the reference {REFERENCE} cannot run: {set_aside[REFERENCE].reason}")
    signature = signature_of(config, next(c.session for c in candidates if c.variant == REFERENCE))
    profiler = Profiler(folder.name, signature, example_inputs(version, signature), host)
    fastest, profiles, failures = profiler.choose(candidates)
    for name in {variant for variant, _ in failures} - set(fastest):
        reason = "; ".join(why for (variant, _), why in failures.items() if variant == name)
        set_aside[name] = _unsupported(cards[name], reason)
    if REFERENCE in set_aside:
        raise RepositoryError(f"{folder.name} fails on the inputs it is measured with: {set_aside[REFERENCE].reason}")
    variants = [_variant(chosen, cards[name], profiles[name], signature, host) for name, chosen in fastest.items()]
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
        return {REFERENCE: blank_card(REFERENCE, "served from the source as it is; nothing was evaluated")}, {}
    cards, set_aside = {}, {}
    for name in sorted(version.manifest().variants):
        try:
            card = version.card(name)
        except RepositoryError as error:
            card = blank_card(name, str(error))
            set_aside[name] = _unsupported(card, str(error))
        if card is not None:
            cards[name] = card
    return cards, set_aside


def blank_card(name: str, reason: str) -> Card:
    """A card that proves nothing, for the reason."""
    return Card(
        variant=name, recipe=name, parameters={}, artefact=None, sha256=None, parent=None, requirements={},
        size_bytes=0, compressed_bytes=0, weights=0, flops=0, runtimes={}, gate=Gate(Verdict.UNVERIFIED, reason),
    )  # fmt: skip


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
        precision=precision_of(card),
        runtime="",
        device="",
        score=evidence.score if evidence else None,
        drop=_drop(card, evidence),
        size_bytes=card.size_bytes,
    )


def signature_of(config: ModelConfig, graph: Session | Graph) -> Signature:
    """The reference's inputs and outputs; a batch dimension where the configuration wants one and the model has it."""
    most = config.batching.max_batch_size if graph.batch_axis else 0
    if not most:
        return Signature(graph.inputs, graph.outputs, 0)
    return Signature(_batched(graph.inputs), _batched(graph.outputs), most)


def _batched(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
    return tuple(replace(spec, shape=(-1, *spec.shape[1:])) for spec in specs)


def _variant(chosen: Candidate, card: Card, profiles: Profiles, signature: Signature, host: Host) -> Variant:
    state, reason = by_verdict(card.variant, card.gate, allow_unverified=host.allow_unverified)
    evidence = chosen.evidence
    return Variant(
        name=card.variant,
        state=state,
        reason=reason,
        precision=chosen.precision,
        runtime=chosen.runtime,
        device=device_of(chosen.runtime, host),
        score=evidence.score if evidence else None,
        drop=_drop(card, evidence),
        profile=profiles.alone,
        batchable=signature.max_batch_size > 0 and chosen.is_invariant,
        size_bytes=card.size_bytes,
        crowded=profiles.crowded,
        lengths=profiles.lengths or (),
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
