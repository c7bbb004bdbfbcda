"""Arrival processes for the comparison: each a function of mean rate, duration and seed.

Every function returns arrival offsets in nanoseconds (int64, rising, from 0 to below the duration); equal arguments
give equal arrays. `rate` is the expected number of arrivals per second over the duration, so that a load factor times
a capacity can be asked for whatever the shape. The number that arrives is random, as it is in life.
CV² is the squared coefficient of variation of the times between arrivals: 0 is a clock, 1 is Poisson.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_S = 1e9
_RAMP_STEP_S = 0.01

Arrivals = NDArray[np.int64]
_Vector = NDArray[np.float64]


def poisson(rate: float, duration_ns: int, seed: int) -> Arrivals:
    """Independent arrivals at a constant rate."""
    return gamma(rate, duration_ns, seed, cv2=1.0)


def gamma(rate: float, duration_ns: int, seed: int, *, cv2: float) -> Arrivals:
    """A renewal process with gamma times between arrivals: shape 1/CV², scale CV²/rate.

    The burst model of Clockwork's, AlpaServe's and SuperServe's evaluations (there with CV² up to 8).
    """
    return _follow([rate], [duration_ns / _S], duration_ns, cv2, np.random.default_rng(seed))


def square_wave(rate: float, duration_ns: int, seed: int, *, ratio: float, half_period_ns: int) -> Arrivals:
    """Poisson arrivals whose rate jumps between low and ``ratio * low`` every half period, the low half first.

    As in Proteus' burst trace. `rate` is the mean of a whole period: low is ``2 * rate / (1 + ratio)``.
    """
    halves = -(-duration_ns // half_period_ns)
    low = 2 * rate / (1 + ratio)
    rates = [low * ratio if half % 2 else low for half in range(halves)]
    return _follow(rates, [half_period_ns / _S] * halves, duration_ns, 1.0, np.random.default_rng(seed))


def mmpp2(
    rate: float, duration_ns: int, seed: int, *, ratio: float, high_share: float = 0.2, high_ns: int = 500_000_000
) -> Arrivals:
    """A Markov-modulated Poisson process of two states (Fischer and Meier-Hellstern's cookbook, 1993).

    It spends `high_share` of the time in the high state, `high_ns` on average at a time, where arrivals are `ratio`
    times as frequent as in the low one; it starts in equilibrium. `rate` is the mean of the equilibrium.
    """
    rng = np.random.default_rng(seed)
    low = rate / (1 - high_share + high_share * ratio)
    stays_s = (high_ns / _S * (1 / high_share - 1), high_ns / _S)
    high = bool(rng.random() < high_share)
    rates: list[float] = []
    lengths_s: list[float] = []
    left_s = duration_ns / _S
    while left_s > 0:
        rates.append(low * ratio if high else low)
        lengths_s.append(float(rng.exponential(stays_s[high])))
        left_s -= lengths_s[-1]
        high = not high
    return _follow(rates, lengths_s, duration_ns, 1.0, rng)


def superserve_bursty(
    rate: float, duration_ns: int, seed: int, *, cv2: float = 8.0, base_share: float = 0.25
) -> Arrivals:
    """A constant base (evenly spaced) under a gamma process, as in SuperServe's §6 (NSDI'25).

    There the base is 1500/s beside 2950 to 5550/s, a share of 0.21 to 0.34 of the rate.
    """
    rng = np.random.default_rng(seed)
    gap_s = 1 / (rate * base_share)
    base = np.arange(rng.random() * gap_s, duration_ns / _S, gap_s)
    bursts = _follow([rate * (1 - base_share)], [duration_ns / _S], duration_ns, cv2, rng)
    return np.sort(np.concatenate([_in_ns(base, duration_ns), bursts]))


def superserve_time_varying(
    rate: float, duration_ns: int, seed: int, *, ratio: float = 2.7, acceleration_per_s2: float, cv2: float = 8.0
) -> Arrivals:
    """A rate that climbs once from low to ``ratio * low``, as in SuperServe's §6 (NSDI'25), with gamma arrivals.

    There from 2500/s to 4800–7800/s, by 250 to 5000 requests/s per second, at CV² 8. The climb lies in the middle of
    the trace, so `rate` is the mean of both levels; a climb too slow for the trace begins and ends outside it.
    """
    rng = np.random.default_rng(seed)
    duration_s = duration_ns / _S
    low = 2 * rate / (1 + ratio)
    steps = int(np.ceil(duration_s / _RAMP_STEP_S))
    middle_s = (np.arange(steps) + 0.5) * duration_s / steps
    rates = np.clip(rate + acceleration_per_s2 * (middle_s - duration_s / 2), low, low * ratio)
    return _follow(rates, np.full(steps, duration_s / steps), duration_ns, cv2, rng)


def diurnal(rate: float, duration_ns: int, seed: int, *, functions: int = 200) -> Arrivals:
    """A synthetic day of a serverless platform squeezed into the duration: "MAF-like", not Microsoft's trace.

    1440 minutes whose rates add up many functions of heavy-tailed popularity (Pareto, α 1.1), each with one of the
    habits that Shahrad et al. ("Serverless in the Wild", ATC'20) describe: a daily wave, a timer every 5 to 60 minutes
    (spikes, as many timers share their minute), or rare bursts of minutes. Poisson inside a minute.
    """
    rng = np.random.default_rng(seed)
    minute = np.arange(1440)
    load = np.zeros(minute.size)
    for popularity in np.minimum(rng.pareto(1.1, functions) + 1, 50):
        habit = rng.choice(["wave", "timer", "burst"], p=[0.6, 0.3, 0.1])
        if habit == "wave":
            shape = 1 + 0.6 * np.sin(2 * np.pi * (minute / 1440 + rng.normal(0, 0.08)))
        elif habit == "timer":
            shape = (minute % rng.choice([5, 15, 60]) == 0).astype(np.float64)
        else:
            starts = rng.random(minute.size) < 1 / 240
            shape = np.convolve(starts, 0.7 ** np.arange(15))[: minute.size] + 1e-3
        load += popularity * shape / shape.mean()
    rates = rate * load / load.mean()
    return _follow(rates, np.full(minute.size, duration_ns / _S / minute.size), duration_ns, 1.0, rng)


def azure_conversations(rate: float, duration_ns: int, seed: int, *, path: Path, overlay: int = 1) -> Arrivals:
    """Real arrivals: a window of the Azure LLM inference trace 2023 (conversation), compressed to the duration.

    `path` is a text file with one arrival offset in seconds per line (lines starting with # and a heading are passed
    over), derived from the Azure Public Dataset, Microsoft, CC-BY-4.0. The seed chooses the window: as many consecutive
    arrivals as the rate asks for, so the mean rate is exact and every gap keeps its share of the window.
    `overlay` windows are put on top of each other, each compressed less, where one would be longer than the trace;
    that smooths the bursts. Raises ValueError where the trace is still too short.
    """
    rng = np.random.default_rng(seed)
    offsets_s = _read_offsets(path)
    wanted = round(rate * duration_ns / _S / overlay)
    last = offsets_s.size - wanted - 1
    if wanted < 1 or last < 0:
        raise ValueError(
            f"{overlay} window(s) of {wanted} arrivals do not fit the {offsets_s.size} of {path}: "
            "ask for a lower rate, a shorter duration or more overlay"
        )
    windows = []
    for first in rng.integers(0, last + 1, overlay):
        window = offsets_s[first : first + wanted + 1]  # the arrival after the last one ends the window
        length_s = max(window[-1] - window[0], 1e-9)
        windows.append((window[:-1] - window[0]) / length_s * duration_ns / _S)
    return np.sort(_in_ns(np.concatenate(windows), duration_ns))


def _read_offsets(path: Path) -> _Vector:
    """The numbers of the file, rising. Raises ValueError where a line after the heading is no number."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    return np.sort(np.array([float(line) for line in lines[1:]]))


def _follow(
    rates: list[float] | _Vector,
    lengths_s: list[float] | _Vector,
    duration_ns: int,
    cv2: float,
    rng: np.random.Generator,
) -> Arrivals:
    """Gamma arrivals whose rate is rates[i] for lengths_s[i], one after the other.

    A stationary renewal process of rate 1 runs on the clock of expected arrivals; the inverse of the cumulative rate
    brings it back to seconds, which keeps the burstiness at every rate.
    """
    seconds = np.concatenate([[0.0], np.cumsum(lengths_s)])
    expected = np.concatenate([[0.0], np.cumsum(np.asarray(rates) * np.asarray(lengths_s))])
    return _in_ns(np.interp(_renewals(float(expected[-1]), cv2, rng), expected, seconds), duration_ns)


def _renewals(until: float, cv2: float, rng: np.random.Generator) -> _Vector:
    """Instants in [0, until) of a gamma renewal process of rate 1 that has been running for ever.

    Begun at an arrival, a bursty process would bring (CV² - 1) / 2 arrivals too many. The gap that holds instant 0 is
    length-biased, a gamma of shape + 1, and cut at a uniform place.
    """
    shape = 1 / cv2
    instants = np.array([rng.random() * rng.gamma(shape + 1, cv2)])
    while instants[-1] < until:
        more = int((until - instants[-1]) * 1.1) + 100
        instants = np.concatenate([instants, instants[-1] + np.cumsum(rng.gamma(shape, cv2, more))])
    return instants[instants < until]


def _in_ns(seconds: _Vector, duration_ns: int) -> Arrivals:
    """Rounded down to nanoseconds, without what lies beyond the duration."""
    offsets = np.floor(seconds * _S).astype(np.int64)
    return offsets[offsets < duration_ns]
