"""From flags to arrivals: when requests come and what each asks, for whatever makes load, real or simulated.

Rules of this file: everything that can be wrong with the words given is told in one line, before anything runs.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from server.arrivals import MAX_ARRIVALS, MAX_CV2, MAX_SECONDS, MIN_CV2, gamma_arrivals_ns
from server.errors import InvalidRequest
from server.settings import SettingsError
from server.trace import MAX_SAMPLES, Arrival, TraceError, cut, read_trace, rescaled
from server.wire.parameters import fraction, latency_ns, on_infeasible

DEFAULT_SECONDS = 10.0

FLAGS = (
    *("trace", "rate", "cv2", "seconds", "samples", "seed"),
    *("latency_ms", "min_accuracy", "max_accuracy_drop", "on_infeasible"),
)
"""The flags that describe the load."""


def arrivals_of(chosen: argparse.Namespace, model: str) -> list[Arrival]:
    """The model's arrivals, a trace's or made, with what the flags ask. Raises SettingsError."""
    for name in ("rate", "seconds"):
        value = getattr(chosen, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise SettingsError(f"--{name} must be above 0, got {value:g}")
    if chosen.seconds is not None and chosen.seconds > MAX_SECONDS:
        raise SettingsError(f"--seconds must be at most {MAX_SECONDS:g}, got {chosen.seconds:g}")
    if chosen.seed < 0:
        raise SettingsError(f"--seed must be at least 0, got {chosen.seed}")
    if chosen.samples is not None and not 1 <= chosen.samples <= MAX_SAMPLES:
        raise SettingsError(f"--samples must be 1 to {MAX_SAMPLES}, got {chosen.samples}")
    if chosen.cv2 is not None and (chosen.trace or not (chosen.cv2 == 0 or MIN_CV2 <= chosen.cv2 <= MAX_CV2)):
        raise SettingsError(
            f"--cv2 is the burstiness of made arrivals: 0 or {MIN_CV2:g} to {MAX_CV2:g}, and not together with --trace"
        )
    slo = _asked(chosen)
    if chosen.trace:
        return [_overridden(arrival, slo, chosen.samples) for arrival in _traced(chosen, model)]
    if chosen.rate is None:
        raise SettingsError("--trace FILE or --rate R is needed: when are the requests to be sent?")
    cv2 = 1.0 if chosen.cv2 is None else chosen.cv2
    seconds = chosen.seconds or DEFAULT_SECONDS
    if chosen.rate * seconds > MAX_ARRIVALS:
        raise SettingsError(
            f"--rate {chosen.rate:g} for --seconds {seconds:g} is more than {MAX_ARRIVALS:,} requests; lower either"
        )
    made = gamma_arrivals_ns(chosen.rate, seconds, cv2=cv2, seed=chosen.seed)
    if not made:
        raise SettingsError("--rate and --seconds are so small that there is no request")
    return [_overridden(Arrival(at_ns), slo, chosen.samples) for at_ns in made]


def _traced(chosen: argparse.Namespace, model: str) -> list[Arrival]:
    try:
        arrivals = read_trace(chosen.trace)
        own = [arrival for arrival in arrivals if arrival.model in ("", model)]
        if not own:
            names = ", ".join(sorted({arrival.model for arrival in arrivals}))
            raise TraceError(f"{chosen.trace}: holds requests for {names}, none for {model}")
        if chosen.rate is not None:
            own = rescaled(own, chosen.rate)
    except TraceError as error:
        raise SettingsError(f"--trace {error}") from None
    own = [replace(arrival, at_ns=arrival.at_ns - own[0].at_ns) for arrival in own]
    return own if chosen.seconds is None else cut(own, chosen.seconds)


def _asked(chosen: argparse.Namespace) -> dict[str, Any]:
    """The fields of the SLO that the flags set."""
    checks: dict[str, tuple[str, Callable[[str, Any], Any]]] = {
        "latency_ms": ("latency_ns", latency_ns),
        "min_accuracy": ("min_accuracy", fraction),
        "max_accuracy_drop": ("max_accuracy_drop", fraction),
        "on_infeasible": ("on_infeasible", lambda name, text: on_infeasible(name, map(str.strip, text.split(",")))),
    }
    given = {name: value for name in checks if (value := getattr(chosen, name)) is not None}
    try:
        return {checks[name][0]: checks[name][1](f"--{name.replace('_', '-')}", given[name]) for name in given}
    except InvalidRequest as error:
        raise SettingsError(str(error).removeprefix("parameter ")) from None


def _overridden(arrival: Arrival, asked: dict[str, Any], samples: int | None) -> Arrival:
    """A latency of the flags replaces every latency that the request asked, its timeout too."""
    timeout_ns = None if "latency_ns" in asked else arrival.timeout_ns
    slo = replace(arrival.slo, **asked)
    return replace(arrival, slo=slo, timeout_ns=timeout_ns, samples=samples or arrival.samples)
