"""Carries out the runs of the comparison, in several processes, and keeps each result as a line of JSON.

Rules of this file: a result that is there is not measured again; each line says from which state of the code it comes,
so that a table can say whether all of its numbers belong together. Simulated time does not depend on the host, so a
busy machine makes this slower and changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.slo.clairvoyant import clairvoyant
from benchmarks.slo.family import MAX_BATCH, MS, family
from benchmarks.slo.prefix import policy_named
from benchmarks.slo.scenarios import BOUND, CLAIRVOYANT, FLOORS, Case, S, Scenario, arrivals, setting
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey
from server.simulation.bound import Demand, FluidVariant, upper_bound
from server.simulation.simulation import Simulation, simulate
from server.simulation.summary import summarise
from server.trace import Arrival

_FILE = "runs.jsonl"
_ROOT = Path(__file__).parents[2]
_CODE = ("server/scheduling", "server/simulation", "benchmarks/slo")
_NO_CODE = (
    "__main__",
    "matrix",
    "report",
    "analysis",
    "targets",
    "pictures",
    "decisions",
    "ablation",
    "live",
)  # measure nothing
_BIN_NS = 20 * MS
_BEAM = 64
_EVERY_S = 10.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a run came to: `Summary`'s figures by name, of a bound only those that it has.

    `figures["groups"]` maps a group of requests to [how many, how many in time]: floors, or times around a loss.
    """

    case: Case
    figures: dict[str, Any]
    code: str


def read(folder: Path) -> list[Result]:
    """The results so far; of several of one case the last. A line cut off by an end of the process is passed over."""
    path = folder / _FILE
    found: dict[Case, Result] = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            facts = json.loads(line)
        except ValueError:
            continue
        case = Case(Scenario(**facts["scenario"]), facts["seed"], facts["policy"])
        found[case] = Result(case, facts["figures"], facts["code"])
    return list(found.values())


def carry_out(folder: Path, cases: Sequence[Case], azure: Path | None, processes: int) -> None:
    """Run what is missing and append it to the folder's results, saying how far it is."""
    done = {result.case for result in read(folder)}
    missing = [case for case in cases if case not in done]
    print(f"{len(cases) - len(missing)} of {len(cases)} runs are there", flush=True)
    if not missing:
        return
    folder.mkdir(parents=True, exist_ok=True)
    progress = _Progress(missing)
    context = get_context("spawn")  # scipy's threads do not survive a fork
    with (folder / _FILE).open("a", encoding="utf-8") as file, context.Pool(processes) as pool:
        file.write("\n" if file.tell() else "")  # after a line that was cut off
        for result in pool.imap_unordered(partial(measure, azure=azure), missing):
            file.write(json.dumps({**asdict(result.case), "figures": result.figures, "code": result.code}) + "\n")
            file.flush()
            progress.step(result.case)


def measure(case: Case, azure: Path | None = None) -> Result:
    """One run. Raises what `arrivals` raises."""
    trace = arrivals(case.scenario, case.seed, azure)
    if case.policy == BOUND:
        figures = _bound(case.scenario, trace)
    elif case.policy == CLAIRVOYANT:
        figures = _clairvoyant(case.scenario, trace)
    else:
        simulation = simulate(setting(case.scenario), trace, policy_named(case.policy), case.seed)
        figures = asdict(summarise(simulation)) | {"groups": _groups(case.scenario, simulation)}
    return Result(case, figures, code_state())


def _bound(scenario: Scenario, trace: Sequence[Arrival]) -> dict[str, Any]:
    model = ModelQueue(ModelKey("model", "1"), family())
    fluid = [FluidVariant.of(v.score.value, v.profile) for v in model.variants if v.score and v.profile]
    demands = []
    for arrival in trace:
        floor = arrival.slo.min_accuracy or 0.0
        allowed = sum(1 << place for place, v in enumerate(model.variants) if v.proven_accuracy >= floor)
        demands.append(Demand(arrival.at_ns, arrival.at_ns + (arrival.latency_ns or 0), 1, allowed))
    bound = upper_bound(demands, fluid, scenario.executors, _BIN_NS)
    return {"attainment": bound.attainment, "effective_accuracy": bound.effective_accuracy}


def _clairvoyant(scenario: Scenario, trace: Sequence[Arrival]) -> dict[str, Any]:
    variants = [
        (v.score.value, [v.profile.latency_ns(size) for size in range(1, MAX_BATCH + 1)])
        for v in family()
        if v.score and v.profile
    ]
    at_ns = [arrival.at_ns for arrival in trace]
    schedule = clairvoyant(at_ns, scenario.slo_ms * MS, variants, scenario.executors, _BEAM)
    return {"attainment": schedule.attainment, "effective_accuracy": schedule.effective_accuracy}


def _groups(scenario: Scenario, simulation: Simulation) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for arrival, end in zip(simulation.trace, simulation.ended, strict=True):
        name = group_of(scenario, arrival)
        if name and end is not None:
            counts = groups.setdefault(name, [0, 0])
            counts[0] += 1
            counts[1] += end.in_time
    return groups


def group_of(scenario: Scenario, arrival: Arrival) -> str:
    """What a request is counted with besides all; empty where nothing is told apart."""
    if scenario.section == "floors":
        return next(kind.name for kind in FLOORS if kind.floor == arrival.slo.min_accuracy)
    if scenario.section == "loss":
        lost_ns = scenario.seconds * S // 3
        since_ns = arrival.at_ns - lost_ns
        if abs(since_ns) < scenario.slo_ms * MS:
            return "within one SLO of the loss"  # before it too: these wait or run when it happens
        return "later, half lost" if 0 <= since_ns < lost_ns else "all there"
    return ""


@cache
def code_state() -> str:
    """A digest of everything that a result depends on."""
    digest = sha256()
    for folder in _CODE:
        for path in sorted((_ROOT / folder).rglob("*.py")):
            if path.stem not in _NO_CODE:
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


class _Progress:
    """Says how much is done and when the rest will be, by simulated requests."""

    def __init__(self, cases: Iterable[Case]) -> None:
        self._left = [self._weight(case) for case in cases]
        self._total, self._done, self._runs = sum(self._left), 0.0, 0
        self._start_s = self._said_s = time.monotonic()

    def step(self, case: Case) -> None:
        """One is done."""
        self._done += self._weight(case)
        self._runs += 1
        now_s = time.monotonic()
        if now_s - self._said_s > _EVERY_S or self._runs == len(self._left):
            self._said_s = now_s
            left_s = (now_s - self._start_s) * (self._total / self._done - 1)
            print(f"{self._runs} of {len(self._left)} runs, about {left_s / 60:.1f} min left", flush=True)

    @staticmethod
    def _weight(case: Case) -> float:
        scenario = case.scenario
        return scenario.rho * scenario.seconds * scenario.executors * (0.3 if case.policy == BOUND else 1.0)
