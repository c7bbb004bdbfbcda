"""What is compared under which circumstances: every run of the comparison as a value.

A scenario fixes everything but the seed and the policy; equal seeds give all policies of a scenario the same arrivals,
the same requests and the same luck. Sections:

* `main`: every trace and load at an SLO of 6 service times (240 ms);
* `slo`: 3 and 10 service times; `noise`: three times the service noise, and pauses;
* `floors`: 70 % of the requests without an accuracy floor, 20 % at 0.90 and 10 % at 0.9115, hard;
* `loss`: two of four executors die after a third of the run, for a third of it;
* `clairvoyant`: short runs without noise, with a good schedule made with full knowledge beside the upper bound.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import NamedTuple

from benchmarks.slo import traces
from benchmarks.slo.family import FP32_ALONE_NS, MS, capacity_per_s, family
from server.scheduling.slo import Slo
from server.simulation.simulation import Loss, Noise, Setting
from server.trace import Arrival

S = 1_000_000_000
SLO_MS = 6 * FP32_ALONE_NS // MS
RHOS = (0.4, 0.6, 0.8, 0.95, 1.2)

BOUND = "upper bound"
CLAIRVOYANT = "clairvoyant"

AZURE = "azure"
SYNTHETIC: dict[str, Callable[[float, int, int], traces.Arrivals]] = {
    "poisson": traces.poisson,
    "gamma 2": partial(traces.gamma, cv2=2.0),
    "gamma 4": partial(traces.gamma, cv2=4.0),
    "gamma 8": partial(traces.gamma, cv2=8.0),
    "superserve bursty": traces.superserve_bursty,
    "superserve time-varying": lambda rate, duration_ns, seed: traces.superserve_time_varying(
        rate, duration_ns, seed, acceleration_per_s2=0.6 * capacity_per_s(SLO_MS * MS, 2)
    ),
    "square 2 s": partial(traces.square_wave, ratio=4.0, half_period_ns=2 * S),
    "square 10 s": partial(traces.square_wave, ratio=4.0, half_period_ns=10 * S),
    "diurnal": traces.diurnal,
}
CV2_8 = ("gamma 8", "superserve bursty")
TIME_VARYING = ("superserve time-varying", "square 2 s", "square 10 s", "diurnal")
_OVERLAY = 2
_SECONDS = 20
_LONGER_S = {  # what changes with time; of square waves whole periods, so that the mean rate is the one asked for
    "superserve time-varying": 30, "diurnal": 30, AZURE: 30, "square 2 s": 32, "square 10 s": 40,
}  # fmt: skip
_LOSS_S = 30

OURS = "fitdrain"
SLACKFIT = ("slackfit", "slackfit+ed")
PLANNERS = ("model-switching-1s+ed", "model-switching-0.1s+ed", "proteus-1s+ed", "proteus-10s+ed")
FASTEST = "fixed-fastest+ed"
_EVERYWHERE = (OURS, "slackfit+ed", "maxbatch+ed", FASTEST, BOUND)
_FEW_SEEDS = ("maxbatch", "maxacc+ed", "infaas+ed")
_FEW_TRACES = (
    "model-switching-1s", "fixed-fp32+ed", "fixed-int8-static+ed",
    "nexus-fastest", "clipper-fastest", "clockwork-fastest",
)  # fmt: skip
_SIDE = (OURS, "slackfit+ed", "maxbatch+ed", FASTEST)
_FEW = 2  # seeds of what no target needs


class Kind(NamedTuple):
    """Requests with an accuracy floor: their share of all, and their SLO where it goes by floor."""

    name: str
    floor: float | None
    share: float
    slo_ms: int


FLOORS = (Kind("none", None, 0.7, 120), Kind("middle", 0.90, 0.2, 240), Kind("strict", 0.9115, 0.1, 480))
BY_CLASS, APART = "SLO by class", "SLO drawn apart"
PREFIX = ("prefix", "prefix+ed")


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything but seed and policy; `rho` counts against the fastest variant on all executors."""

    section: str
    trace: str
    rho: float
    slo_ms: int = SLO_MS
    floors: str = ""
    seconds: int = _SECONDS

    @property
    def executors(self) -> int:
        """How many there are before any dies."""
        return 4 if self.section == "loss" else 2


@dataclass(frozen=True, slots=True)
class Case:
    """One run."""

    scenario: Scenario
    seed: int
    policy: str


def cases(seeds: int, azure: bool, quick: bool = False) -> list[Case]:
    """Every run, seed by seed, so that a comparison cut short is a comparison with fewer seeds."""
    found = [case for seed in range(seeds) for case in (*_main(seed, azure), *_side(seed), *_floors(seed))]
    return [_short(case) for case in found if _is_quick(case)] if quick else found


def _main(seed: int, azure: bool) -> Iterator[Case]:
    for trace in (*SYNTHETIC, *([AZURE] if azure else [])):
        for rho in RHOS:
            policies = list(_EVERYWHERE)
            if seed < _FEW or trace in CV2_8:
                policies.append("slackfit")
            if seed < _FEW or trace in TIME_VARYING:
                policies += PLANNERS
            if seed < _FEW:
                policies += _FEW_SEEDS
                policies += _FEW_TRACES if trace in ("gamma 4", "gamma 8") else ()
            scenario = Scenario("main", trace, rho, seconds=_LONGER_S.get(trace, _SECONDS))
            yield from (Case(scenario, seed, policy) for policy in policies)


def _side(seed: int) -> Iterator[Case]:
    for trace in ("gamma 4", "gamma 8"):
        for rho in (0.6, 0.8):
            sections = [Scenario("slo", trace, rho, times * FP32_ALONE_NS // MS) for times in (3, 10)]
            for scenario in (*sections, Scenario("noise", trace, rho)):
                yield from (Case(scenario, seed, policy) for policy in (*_SIDE, BOUND))
    for trace in ("poisson", "gamma 4"):
        yield from (Case(Scenario("loss", trace, 0.4, seconds=_LOSS_S), seed, policy) for policy in _SIDE)
    if seed < _FEW:
        for rho in (0.6, 0.8):
            scenario = Scenario("clairvoyant", "gamma 8", rho, seconds=3)
            yield from (Case(scenario, seed, policy) for policy in (*_SIDE, CLAIRVOYANT, BOUND))


def _floors(seed: int) -> Iterator[Case]:
    for floors in (BY_CLASS, APART):
        for trace, rho in (("gamma 4", 0.3), ("gamma 4", 0.4), ("gamma 4", 0.5), ("gamma 8", 0.4)):
            scenario = Scenario("floors", trace, rho, floors=floors)
            yield from (Case(scenario, seed, policy) for policy in (OURS, "slackfit+ed", *PREFIX, BOUND))


def _is_quick(case: Case) -> bool:
    """A taste of everything: two seeds, three traces, two loads."""
    scenario = case.scenario
    return case.seed < 2 and (
        scenario.section != "main"
        or (scenario.trace in ("gamma 8", "square 2 s", AZURE) and scenario.rho in (0.6, 1.2))
    )


def _short(case: Case) -> Case:
    scenario = case.scenario
    seconds = min(3, scenario.seconds)
    short = Scenario(scenario.section, scenario.trace, scenario.rho, scenario.slo_ms, scenario.floors, seconds)
    return Case(short, case.seed, case.policy)


def arrivals(scenario: Scenario, seed: int, azure: Path | None = None) -> list[Arrival]:
    """The requests of a scenario. Raises ValueError where the trace of `azure` is too short, OSError without it."""
    rate = scenario.rho * capacity_per_s(scenario.slo_ms * MS, scenario.executors)
    duration_ns = scenario.seconds * S
    if scenario.trace == AZURE:
        if azure is None:
            raise ValueError("the Azure trace needs its file: --azure FILE")
        offsets = traces.azure_conversations(rate, duration_ns, seed, path=azure, overlay=_OVERLAY)
    else:
        offsets = SYNTHETIC[scenario.trace](rate, duration_ns, seed)
    slos = _slos(scenario, len(offsets), seed)
    return [Arrival(int(offset), slo) for offset, slo in zip(offsets, slos, strict=True)]


def _slos(scenario: Scenario, count: int, seed: int) -> Sequence[Slo]:
    if not scenario.floors:
        return [Slo(latency_ns=scenario.slo_ms * MS)] * count
    random = Random(f"floors {seed}")  # noqa: S311 - repeatable on purpose
    kinds = random.choices(FLOORS, [kind.share for kind in FLOORS], k=count)
    others = random.choices(FLOORS, k=count)
    return [
        Slo(latency_ns=(kind if scenario.floors == BY_CLASS else other).slo_ms * MS, min_accuracy=kind.floor)
        for kind, other in zip(kinds, others, strict=True)
    ]


def setting(scenario: Scenario) -> Setting:
    """The host of a scenario."""
    third_ns = scenario.seconds * S // 3
    noise = Noise(0.05, wake_ns=MS // 10, reply_ns=MS // 5)
    if scenario.section == "noise":
        noise = Noise(0.15, pause_rate=0.01, pause_ns=40 * MS, wake_ns=MS // 10, reply_ns=MS // 5)
    if scenario.section == "clairvoyant":
        noise = Noise()
    losses = [Loss(third_ns, executor, third_ns) for executor in (2, 3)] if scenario.section == "loss" else []
    return Setting(family(), scenario.executors, noise=noise, losses=losses)
