"""Does traffic move to faster variants in a burst, and back within a second of its end? Shown on the digits example.

    python -m benchmarks.burst examples/digits/repository

Phases: calm, burst, calm. The burst's rate is set from the profiled capacity of the reference, so that fp32 alone could
not carry it. Printed per quarter of a second: requests, the share of each variant, the share of met SLOs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.load import Answer, open_loop, percentile_ms, request
from benchmarks.server import Serving, serving

WINDOW_S = 0.25


def main() -> None:
    """Run the three phases and print what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--model", default="digits")
    parser.add_argument("--latency-ms", type=float, default=100.0)
    parser.add_argument("--calm-rate", type=float, default=20.0)
    parser.add_argument("--burst", type=float, default=2.0, help="rate of the burst in capacities of fp32")
    parser.add_argument("--seconds", type=float, default=4.0, help="length of each phase")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images = np.load(options.repository / options.model / "1/data/evaluation.npz", allow_pickle=False)
    name = next(key for key in images.files if images[key].ndim > 1)
    messages = [
        request(options.model, name, row[None], slo_latency_ms=options.latency_ms) for row in images[name][:256]
    ]
    with serving(options.repository) as server:
        burst_rate = options.burst * capacity(server, options.model, "fp32")
        due = arrivals([options.calm_rate, burst_rate, options.calm_rate], options.seconds, options.seed)
        print(f"calm {options.calm_rate:.0f}/s, burst {burst_rate:.0f}/s, SLO {options.latency_ms:g} ms")
        answers = asyncio.run(open_loop(server.grpc, due, messages))
    report(answers, options.seconds, options.latency_ms)


def arrivals(rates: Sequence[float], seconds: float, seed: int) -> list[float]:
    """Poisson arrivals: one rate after another, each for so many seconds."""
    generator = np.random.default_rng(seed)
    due: list[float] = []
    for phase, rate in enumerate(rates):
        gaps = generator.exponential(1 / rate, int(rate * seconds * 2) + 10)
        due += [phase * seconds + float(instant) for instant in np.cumsum(gaps) if instant < seconds]
    return due


def capacity(server: Serving, model: str, variant: str) -> float:
    """Profiled samples per second of a variant over all executors, at its best batch size."""
    text = urllib.request.urlopen(f"{server.http}/metrics").read().decode()  # noqa: S310 - our own address
    wanted = [f'model="{model}"', f'variant="{variant}"']
    rates = [
        float(line.rsplit(" ", 1)[1])
        for line in text.splitlines()
        if line.startswith("gearshift_variant_capacity") and all(label in line for label in wanted)
    ]
    executors = sum(line.startswith("gearshift_executor_busy_seconds_total{") for line in text.splitlines())
    return float(max(rates) * executors)


def report(answers: Sequence[Answer], seconds: float, latency_ms: float) -> None:
    """Print the table by window, then the summary by phase."""
    for window in range(int(3 * seconds / WINDOW_S)):
        some = [a for a in answers if window * WINDOW_S <= a.due_s < (window + 1) * WINDOW_S]
        if some:
            shares = Counter(str(a.parameters.get("variant", a.code)) for a in some)
            print(f"{window * WINDOW_S:6.2f} s {len(some):5d}  {met(some, latency_ms):6.1%} met  {dict(shares)}")
    end = 2 * seconds
    back = [a.due_s - end for a in answers if a.due_s >= end and a.parameters.get("variant") == "fp32"]
    phases = {
        phase: [a for a in answers if index * seconds <= a.due_s < (index + 1) * seconds]
        for index, phase in enumerate(("calm", "burst", "calm again"))
    }
    summary = {
        phase: {
            "requests": len(some),
            "met": round(met(some, latency_ms), 4),
            "p50_ms of answers": round(percentile_ms(answered, 50), 2),
            "p99_ms of answers": round(percentile_ms(answered, 99), 2),
            "variants": dict(Counter(str(a.parameters.get("variant", a.code)) for a in some)),
        }
        for phase, some in phases.items()
        if (answered := [answer for answer in some if answer.code == "OK"])
    }
    summary["first fp32 after the burst, s"] = {"value": round(min(back, default=float("nan")), 3)}
    print(json.dumps(summary, indent=2))


def met(answers: Sequence[Answer], latency_ms: float) -> float:
    """The share answered within the SLO, seen by the client; a refusal missed it."""
    return sum(a.code == "OK" and a.latency_s * 1e3 <= latency_ms for a in answers) / len(answers)


if __name__ == "__main__":
    main()
