"""Does traffic move to faster variants in a burst, and back within a second of its end? Shown on the digits example.

    python -m benchmarks.burst examples/digits/repository

Phases: calm, burst, calm. The burst's rate is set from the profiled capacity of the reference, so that fp32 alone could
not carry it. Printed per quarter of a second: requests, the share of each variant, the share of met SLOs.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.load import open_loop, percentile_ms, request
from benchmarks.server import Serving, serving
from server.arrivals import gamma_arrivals_ns
from server.bench.load import run
from server.bench.report import Ended, read
from server.bench.requests import Planned

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
        answers = run(open_loop(server.grpc, due, messages))
    asked_ns = int(options.latency_ms * 1e6)
    report([read(Planned(answer.due_ns, b"", b"", asked_ns), answer) for answer in answers], options.seconds)


def arrivals(rates: Sequence[float], seconds: float, seed: int) -> list[int]:
    """Poisson arrivals in ns: one rate after another, each for so many seconds."""
    due: list[int] = []
    for phase, rate in enumerate(rates):
        start_ns = round(phase * seconds * 1e9)
        due += [start_ns + instant for instant in gamma_arrivals_ns(rate, seconds, seed=seed + phase)]
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


def report(ended: Sequence[Ended], seconds: float) -> None:
    """Print the table by window, then the summary by phase."""
    for window in range(int(3 * seconds / WINDOW_S)):
        some = between(ended, window * WINDOW_S, (window + 1) * WINDOW_S)
        if some:
            print(f"{window * WINDOW_S:6.2f} s {len(some):5d}  {met(some):6.1%} met  {shares(some)}")
    end_ns = 2 * seconds * 1e9
    back = [each.answer.due_ns - end_ns for each in ended if each.answer.due_ns >= end_ns and each.variant == "fp32"]
    phases = {
        phase: between(ended, index * seconds, (index + 1) * seconds)
        for index, phase in enumerate(("calm", "burst", "calm again"))
    }
    summary = {
        phase: {
            "requests": len(some),
            "met": round(met(some), 4),
            "p50_ms of answers": round(percentile_ms(answered, 50), 2),
            "p99_ms of answers": round(percentile_ms(answered, 99), 2),
            "variants": shares(some),
        }
        for phase, some in phases.items()
        if (answered := [each.answer for each in some if each.answer.code == "OK"])
    }
    summary["first fp32 after the burst, s"] = {"value": round(min(back, default=float("nan")) / 1e9, 3)}
    print(json.dumps(summary, indent=2))


def between(ended: Sequence[Ended], start_s: float, end_s: float) -> list[Ended]:
    """Those that were due in [start, end)."""
    return [each for each in ended if start_s <= each.answer.due_ns / 1e9 < end_s]


def shares(ended: Sequence[Ended]) -> dict[str, int]:
    """How many each variant answered; by its status, who was not."""
    return dict(Counter(each.variant or each.answer.code for each in ended))


def met(ended: Sequence[Ended]) -> float:
    """The share answered within the SLO, seen by the client; a refusal missed it."""
    return sum(each.met for each in ended) / len(ended)


if __name__ == "__main__":
    main()
