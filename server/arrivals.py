"""When requests arrive, made by a seeded random process instead of read from a trace.

Rules of this file: equal seeds give equal instants, on every machine; standard library only.
"""

from __future__ import annotations

import random

MAX_ARRIVALS = 10_000_000
MAX_SECONDS = 1e9
"""31 years: an instant in nanoseconds fits 64 bits."""
MIN_CV2, MAX_CV2 = 0.01, 1000.0
"""Beyond these a gamma variate leaves what floating point can hold: all gaps would be nothing."""


def gamma_arrivals_ns(rate_per_s: float, seconds: float, *, cv2: float = 1.0, seed: int = 0) -> list[int]:
    """Arrival instants in ns within [0, seconds), rising: a renewal process with gamma-distributed gaps.

    `cv2` is the squared coefficient of variation of the gaps: 1 is a Poisson process, more is burstier, 0 is even
    spacing. Raises ValueError for a rate or a time that is not above 0, a `cv2` or a time out of range, and for more
    than `MAX_ARRIVALS`.
    """
    if not (0 < rate_per_s < float("inf") and 0 < seconds <= MAX_SECONDS):
        raise ValueError(f"a rate above 0 and a time up to {MAX_SECONDS:g} s are needed, got {rate_per_s}, {seconds}")
    if not (cv2 == 0 or MIN_CV2 <= cv2 <= MAX_CV2):
        raise ValueError(f"a cv2 of 0 or {MIN_CV2:g} to {MAX_CV2:g} is needed, got {cv2}")
    if rate_per_s * seconds > MAX_ARRIVALS:
        raise ValueError(f"{rate_per_s:g}/s for {seconds:g} s are more than {MAX_ARRIVALS:,} requests")
    generator = random.Random(seed)  # noqa: S311 - load, not secrets
    instants: list[int] = []
    now_s = 0.0
    while True:
        now_s += generator.gammavariate(1 / cv2, cv2 / rate_per_s) if cv2 else 1 / rate_per_s
        if not now_s < seconds:
            return instants
        instants.append(int(now_s * 1e9))
