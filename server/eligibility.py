"""Which of a model's variants may take traffic on this host, and the sentence that says why not.

Rules: a verdict comes from the card, a speed from this host's profile. The reference is always eligible. What is slower
than the reference without being proven better has *no benefit*; what another variant beats in accuracy and at every
batch size is *dominated*: no request would ever want it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

from variants.variant import REFERENCE, Gate, LatencyProfile, State, Variant, Verdict

_FASTER = 0.97
"""A latency must be this share of the other's to count as faster: less is noise."""

_STATE_OF = {
    Verdict.REJECTED: State.REJECTED,
    Verdict.INCONCLUSIVE: State.INCONCLUSIVE,
    Verdict.UNVERIFIED: State.UNVERIFIED,
    Verdict.PASSED: State.ELIGIBLE,
}


def by_verdict(name: str, gate: Gate, *, allow_unverified: bool) -> tuple[State, str]:
    """The state that the gate's verdict alone gives, and why."""
    if name == REFERENCE:
        return State.ELIGIBLE, "the reference"
    if gate.verdict is Verdict.UNVERIFIED and allow_unverified:
        return State.ELIGIBLE, f"unverified, allowed by the operator: {gate.reason}"
    return _STATE_OF[gate.verdict], gate.reason


def by_speed(variants: Iterable[Variant]) -> list[Variant]:
    """The variants with those set aside that are of no use beside the others; only eligible ones are looked at."""
    variants = list(variants)
    eligible = [v for v in variants if v.state is State.ELIGIBLE and v.profile is not None]
    reference = next((v for v in eligible if v.name == REFERENCE), None)
    return [_judged(variant, eligible, reference) if variant in eligible else variant for variant in variants]


def without(variants: Iterable[Variant], disabled: Collection[str]) -> list[Variant]:
    """The variants with some disabled by an operator; what only these put in the shade is of use again."""
    remaining = []
    for variant in variants:
        state, reason = variant.state, variant.reason
        if variant.name in disabled:
            state, reason = State.DISABLED, f"disabled by an operator; was {variant.state}"
        elif state in (State.DOMINATED, State.NO_BENEFIT):  # both were eligible by their verdict
            state, reason = State.ELIGIBLE, f"of use while others are disabled; was {variant.state}"
        remaining.append(replace(variant, state=state, reason=reason))
    return by_speed(remaining)


def _judged(variant: Variant, eligible: list[Variant], reference: Variant | None) -> Variant:
    if variant is reference or variant.profile is None:
        return variant
    if reference is not None and _no_faster(variant, reference) and variant.proven_drop >= 0:
        reason = f"not faster than {REFERENCE} at any batch size on this host"
        return replace(variant, state=State.NO_BENEFIT, reason=reason)
    for other in eligible:
        if other is not variant and other is not reference and _dominates(other, variant):
            reason = f"{other.name} is at least as accurate and faster at every batch size on this host"
            return replace(variant, state=State.DOMINATED, reason=reason)
    return variant


def _no_faster(variant: Variant, reference: Variant) -> bool:
    return not any(ours < _FASTER * theirs for ours, theirs in _pairs(variant, reference))


def _dominates(other: Variant, variant: Variant) -> bool:
    """Whether every request that `variant` satisfies is better served by `other`."""
    as_accurate = other.proven_drop <= variant.proven_drop and other.proven_accuracy >= variant.proven_accuracy
    if not as_accurate or (variant.batchable and not other.batchable):
        return False
    return all(theirs < _FASTER * ours for theirs, ours in _pairs(other, variant))


def _pairs(one: Variant, other: Variant) -> list[tuple[int, int]]:
    """What so many samples cost both, in nanoseconds, at the batch sizes that both were measured at."""
    if one.profile is None or other.profile is None:
        return []
    sizes = sorted(set(one.profile.batch_sizes) & set(other.profile.batch_sizes))
    ours = [served_ns(one.profile, size, batchable=one.batchable) for size in sizes]
    theirs = [served_ns(other.profile, size, batchable=other.batchable) for size in sizes]
    return list(zip(ours, theirs, strict=True))


def served_ns(profile: LatencyProfile, size: int, *, batchable: bool) -> int:
    """How long so many samples take as they are served: in one batch, or one after another where each runs alone."""
    return profile.latency_ns(size) if batchable else size * profile.latency_ns(1)
