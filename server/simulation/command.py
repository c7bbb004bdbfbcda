"""`gearshift simulate`: a trace through the live scheduler under a virtual clock, for one policy or several.

Rules of this file: everything that can be wrong with the words given is told before the first run. "What if" is asked
with flags: another policy, other variants, more executors or replicas, another SLO, another rate.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from server.errors import ServingError
from server.figures import check_writable, write_figures
from server.scheduling.admission import make_request
from server.scheduling.model_queue import ModelQueue, rank
from server.scheduling.policies import PolicyFactory, check_policy, policy_factory
from server.scheduling.slo import ModelKey
from server.settings import SettingsError
from server.simulation.bound import Bound, Demand, FluidVariant, upper_bound
from server.simulation.profiles import Profiled, ProfilesError, read_profiles
from server.simulation.simulation import Noise, Setting, simulate
from server.simulation.summary import Summary, summarise
from server.trace import Arrival
from server.workload import arrivals_of
from variants.variant import State, Variant

_BOUND = "upper bound"
_MOST_NOISE = 3.0  # a batch in six then takes twenty times its profile, or longer
_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True)
class _Compared:
    """One row: a policy and what it came to."""

    policy: str
    summary: Summary


def run(chosen: argparse.Namespace) -> int:
    """Simulate what the flags describe and print it; returns the exit code.

    Raises SettingsError for what is wrong with the flags or their files.
    """
    _check_numbers(chosen)
    profiled = _profiled(chosen)
    setting = _setting(chosen, profiled)
    policies = _policies(chosen.policy, setting)
    trace = arrivals_of(chosen, profiled.model)
    if chosen.json:
        check_writable(chosen.json)
    _warn_of_contention(setting, profiled.executors)
    compared = [_Compared(name, _replicated(setting, trace, made, chosen)) for name, made in policies.items()]
    bound = None if chosen.no_bound else _bound(setting, trace, chosen.replicas)
    _show(profiled.model, setting, chosen.replicas, trace, compared, bound)
    if chosen.json:
        reached = {each.policy: asdict(each.summary) for each in compared}
        write_figures(chosen.json, {"policies": reached, "upper_bound": None if bound is None else asdict(bound)})
    return 0


def _check_numbers(chosen: argparse.Namespace) -> None:
    for name in ("executors", "replicas"):
        value = getattr(chosen, name)
        if value is not None and value < 1:
            raise SettingsError(f"--{name} must be at least 1, got {value}")
    if not 0 <= chosen.pause_rate <= 1:
        raise SettingsError(f"--pause-rate is a share of the batches, 0 to 1, got {chosen.pause_rate:g}")
    for name, most in (("noise", _MOST_NOISE), ("pause_ms", _DAY_MS), ("wake_ms", _DAY_MS), ("reply_ms", _DAY_MS)):
        value = getattr(chosen, name)
        if not 0 <= value <= most:
            raise SettingsError(f"--{name.replace('_', '-')} must be at least 0 and at most {most:.0f}, got {value:g}")


def _policies(names: Sequence[str], setting: Setting) -> dict[str, PolicyFactory]:
    model = ModelQueue(ModelKey(setting.model, "1"), setting.variants)
    try:
        policies = {name: policy_factory(name) for name in names}
        for name in names:
            check_policy(name, model)
    except ValueError as error:
        raise SettingsError(f"--policy: {error}") from None
    return policies


def _profiled(chosen: argparse.Namespace) -> Profiled:
    try:
        return read_profiles(chosen.profiles, chosen.model)
    except ProfilesError as error:
        raise SettingsError(f"--profiles {error}") from None


def _setting(chosen: argparse.Namespace, profiled: Profiled) -> Setting:
    return Setting(
        variants=_kept(profiled.variants, chosen.variants),
        executors=profiled.executors if chosen.executors is None else chosen.executors,
        defaults=profiled.defaults,
        noise=Noise(
            deviation=chosen.noise,
            pause_rate=chosen.pause_rate,
            pause_ns=int(chosen.pause_ms * 1e6),
            wake_ns=int(chosen.wake_ms * 1e6),
            reply_ns=int(chosen.reply_ms * 1e6),
        ),
        model=profiled.model,
    )


def _kept(variants: Sequence[Variant], names: Sequence[str] | None) -> list[Variant]:
    """All variants, or only the named ones. Raises SettingsError for a name that is none, or if none takes traffic."""
    known = {variant.name: variant for variant in variants}
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise SettingsError(f"--variants: there is no variant {unknown[0]}; there are {', '.join(known)}")
    kept = [variant for variant in variants if names is None or variant.name in names]
    if not any(variant.state is State.ELIGIBLE for variant in kept):
        raise SettingsError("--variants: none of these takes traffic")
    return kept


def _replicated(
    setting: Setting, trace: Sequence[Arrival], policy: PolicyFactory, chosen: argparse.Namespace
) -> Summary:
    """One policy's figures; of several replicas each gets its turn of the requests."""
    count = min(chosen.replicas, len(trace))
    shares = [trace[replica::count] for replica in range(count)]
    return summarise(*(simulate(setting, share, policy, chosen.seed + place) for place, share in enumerate(shares)))


def _bound(setting: Setting, trace: Sequence[Arrival], replicas: int) -> Bound | None:
    """What no policy could exceed; None, with a line on stderr, where the solver is not installed."""
    ranked = rank(setting.variants)
    fluid = [
        FluidVariant.of(v.score.value if v.score else 0.0, v.profile, *(profile for _, profile in v.lengths))
        for v in ranked
        if v.profile
    ]
    demands = list(_demands(setting, trace))
    try:
        best = upper_bound(demands, fluid, setting.executors * replicas)
        return upper_bound(demands, fluid, setting.executors * replicas, attainments=[best.attainment])
    except ImportError as error:
        sys.stderr.write(f"gearshift simulate: no upper bound: {error}\n")
        return None


def _demands(setting: Setting, trace: Sequence[Arrival]) -> Iterable[Demand]:
    model = ModelQueue(ModelKey(setting.model, "1"), setting.variants)
    for number, arrival in enumerate(trace):
        try:
            request = make_request(
                model,
                arrival.slo,
                setting.defaults,
                number=number,
                samples=arrival.samples,
                size_bytes=0,
                shape=arrival.shape,
                arrival_ns=arrival.at_ns,
                rpc_deadline_ns=None if arrival.timeout_ns is None else arrival.at_ns + arrival.timeout_ns,
            )
        except ServingError:
            yield Demand(arrival.at_ns, arrival.at_ns, arrival.samples, 0)
        else:
            yield Demand(arrival.at_ns, request.deadline_ns, request.samples, request.allowed | request.fallback)


def _show(
    model: str,
    setting: Setting,
    replicas: int,
    trace: Sequence[Arrival],
    compared: Sequence[_Compared],
    bound: Bound | None,
) -> None:
    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    seconds = (trace[-1].at_ns - trace[0].at_ns) / 1e9
    console.print(
        f"{model}: {len(trace)} requests in {seconds:.1f} s on {replicas} x {setting.executors} executors; "
        f"service noise {setting.noise.deviation:.0%}",
        markup=False,  # what files say is shown as it is
    )
    table = Table(box=SIMPLE_HEAD)
    for column in (
        "policy", "attainment", "mean score", "effective score", "admitted, then failed", "p50 ms", "p99 ms",
        "batch", "busy", "answered in time by",
    ):  # fmt: skip
        table.add_column(column)
    for each in compared:
        table.add_row(*map(Text, (each.policy, *_cells(each.summary))))
    if bound is not None:
        at_most = bound.accuracy_at[0] / bound.attainment if bound.attainment else 0.0
        table.add_row(_BOUND, f"{bound.attainment:.2%}", f"{at_most:.4f}", f"{bound.effective_accuracy:.4f}")
    console.print(table)


def _cells(summary: Summary) -> list[str]:
    shares = ", ".join(f"{name} {share:.0%}" for name, share in summary.shares.items())
    return [
        f"{summary.attainment:.2%}",
        f"{summary.mean_accuracy:.4f}",
        f"{summary.effective_accuracy:.4f}",
        f"{summary.admitted_then_failed:.2%}",
        f"{summary.p50_ms:.1f}",
        f"{summary.p99_ms:.1f}",
        f"{summary.mean_batch:.1f}",
        f"{summary.utilisation:.0%}",
        shares,
    ]


def _warn_of_contention(setting: Setting, profiled: int) -> None:
    """Tell what executors beside one another would do, and this simulation does not know."""
    if setting.executors < 2:
        return
    if all(variant.crowded is None for variant in setting.variants):
        told = "without contention between them: no profile was measured with several busy"
    elif setting.executors > profiled:
        told = f"without contention between them beyond that of the {profiled} which were profiled"
    else:
        return
    sys.stderr.write(f"gearshift simulate: {setting.executors} executors are simulated {told}\n")
