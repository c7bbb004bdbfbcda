"""When requests arrive, made by a seeded random process instead of read from a trace.

Rules of this file: equal seeds give equal instants, on every machine; standard library only.
"""

from __future__ import annotations

import random


def gamma_arrivals_ns(rate_per_s: float, seconds: float, *, cv2: float = 1.0, seed: int = 0) -> list[int]:
    """Arrival instants in ns within [0, seconds), rising: a renewal process with gamma-distributed gaps.

    `cv2` is the squared coefficient of variation of the gaps: 1 is a Poisson process, more is burstier, 0 is even
    spacing. Raises ValueError unless the rate is positive and `cv2` at least 0.
    """
    if not (0 < rate_per_s < float("inf") and 0 <= cv2 < float("inf")):
        raise ValueError(f"a rate above 0 and a cv2 of at least 0 are needed, got {rate_per_s} and {cv2}")
    generator = random.Random(seed)  # noqa: S311 - load, not secrets
    instants: list[int] = []
    now_s = 0.0
    while True:
        now_s += generator.gammavariate(1 / cv2, cv2 / rate_per_s) if cv2 else 1 / rate_per_s
        if not now_s < seconds:
            return instants
        instants.append(int(now_s * 1e9))
