"""The model that the comparison is about: five variants of a CPU-class network, and the load that counts as full.

A batch of n takes ``fixed + per sample * n``; fp32 takes 40 ms for one. The latencies are made up, in the proportions
of scheduling studies, so that whoever repeats the comparison needs no particular host. Latency SLOs are quoted in
multiples of fp32's 40 ms, loads as the share rho of what the fastest variant can do.
"""

from __future__ import annotations

from variants.variant import REFERENCE, Interval, LatencyProfile, State, Variant

MS = 1_000_000
MAX_BATCH = 16

_FAMILY = (
    (REFERENCE, 0.913, 24.0, 16.0),
    ("amp", 0.912, 20.0, 10.4),
    ("int8-static", 0.905, 16.0, 7.2),
    ("pruned", 0.893, 16.0, 5.6),
    ("distilled", 0.872, 8.0, 2.8),
)

FP32_ALONE_NS = 40 * MS
"""fp32's latency for one sample: the unit of SLOs."""


def family() -> list[Variant]:
    """The five variants: name, accuracy (taken as proven exactly), and latency profile of batches up to 16."""
    reference = _FAMILY[0][1]
    return [
        Variant(
            name=name,
            state=State.ELIGIBLE,
            reason="",
            precision=name,
            runtime="virtual",
            device="cpu",
            score=Interval(accuracy, accuracy, accuracy),
            drop=None if name == REFERENCE else Interval(*[reference - accuracy] * 3),
            profile=_profile(fixed_ms, per_sample_ms),
        )
        for name, accuracy, fixed_ms, per_sample_ms in _FAMILY
    ]


def _profile(fixed_ms: float, per_sample_ms: float) -> LatencyProfile:
    sizes = (1, MAX_BATCH)  # linear between them
    return LatencyProfile(sizes, tuple(round((fixed_ms + per_sample_ms * size) * MS) for size in sizes))


def capacity_per_s(slo_ns: int, executors: int) -> float:
    """Requests per second of the fastest variant in batches that take at most half of the SLO (Nexus' rule)."""
    return executors * max(
        size * 1e9 / latency_ns
        for variant in family()
        if variant.profile is not None
        for size in range(1, MAX_BATCH + 1)
        if (latency_ns := variant.profile.latency_ns(size)) <= slo_ns // 2
    )
