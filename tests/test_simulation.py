"""The simulator drives the live scheduler: what it adds is time, noise and bookkeeping."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scheduling_models import MS, five_variants, variant

from server.arrivals import gamma_arrivals_ns
from server.scheduling.policies import policy_factory
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.slo import Outcome, Slo
from server.simulation.simulation import Loss, Noise, Setting, Simulation, simulate
from server.simulation.summary import merged, summarise
from server.trace import Arrival

NOISY = Noise(deviation=0.1, pause_rate=0.02, pause_ns=20 * MS, wake_ns=100_000, reply_ns=200_000)


def poisson(rate: float, seconds: float, seed: int = 1, **slo: object) -> list[Arrival]:
    """Arrivals that all ask the same."""
    asked = Slo(**{"latency_ns": 60 * MS, **slo})  # type: ignore[arg-type]
    return [Arrival(at_ns, asked) for at_ns in gamma_arrivals_ns(rate, seconds, seed=seed)]


def log(simulation: Simulation) -> list[object]:
    """Everything that happened, for comparison."""
    runs = [(run.started_ns, run.executor, run.variant, run.samples, run.predicted_ns) for run in simulation.runs]
    return [simulation.ended, runs]


def test_equal_seeds_give_equal_runs_and_others_do_not() -> None:
    """All randomness comes from the seed."""
    trace, setting = poisson(700, 1.0), Setting(five_variants(), 2, noise=NOISY)
    first, again, other = (simulate(setting, trace, FitDrain, seed) for seed in (1, 1, 2))
    assert log(first) == log(again)
    assert log(first) != log(other)


def test_an_exact_host_takes_what_the_profile_says() -> None:
    """Without noise a lone request is answered after its variant's latency, on the most accurate one."""
    simulation = simulate(Setting(five_variants()), [Arrival(5 * MS, Slo(latency_ns=60 * MS))], FitDrain)
    end = simulation.ended[0]
    assert end is not None
    assert (end.outcome, end.at_ns, end.place, end.batch_size) == (Outcome.OK, 15 * MS, 0, 1)


def test_an_answer_counts_when_its_client_has_it() -> None:
    """A reply that takes longer than what was reserved for it makes an answer late."""
    setting = Setting(five_variants(), noise=Noise(reply_ns=60 * MS))
    end = simulate(setting, [Arrival(0, Slo(latency_ns=60 * MS))], FitDrain).ended[0]
    assert end is not None
    assert (end.outcome, end.in_time) == (Outcome.LATE, False)


def test_decisions_come_as_late_as_threads_wake_up() -> None:
    """With a wake-up time, no batch starts at the instant of an arrival."""
    trace = poisson(100, 1.0)
    instants = {arrival.at_ns for arrival in trace}
    late = simulate(Setting(five_variants(), noise=Noise(wake_ns=MS)), trace, FitDrain)
    assert not instants & {run.started_ns for run in late.runs}
    at_once = simulate(Setting(five_variants()), trace, FitDrain)
    assert instants & {run.started_ns for run in at_once.runs}


def test_policies_meet_the_same_luck() -> None:
    """Noise belongs to the request that leads a batch, whatever the policy and whatever ran before."""
    trace = poisson(20, 1.0)  # so few that every batch holds one request
    variants = [variant("fp32", 0.9, 10, 0, sizes=(1,))]
    setting = Setting(variants, noise=Noise(deviation=0.3))
    ours, theirs = (simulate(setting, trace, policy_factory(name), 3) for name in ("fitdrain", "fixed-fp32"))
    taken = [
        {
            run.requests[0].number: end.at_ns - run.started_ns
            for run in each.runs
            if (end := each.ended[run.requests[0].number])
        }
        for each in (ours, theirs)
    ]
    both = taken[0].keys() & taken[1].keys()
    assert len(both) > 10
    assert all(taken[0][number] == taken[1][number] for number in both)


def test_what_could_never_be_answered_is_infeasible_at_once() -> None:
    """A floor that no variant reaches ends on arrival."""
    end = simulate(Setting(five_variants()), [Arrival(0, Slo(min_accuracy=0.99))], FitDrain).ended[0]
    assert end is not None
    assert (end.outcome, end.at_ns, end.admitted) == (Outcome.INFEASIBLE, 0, False)


def test_a_timeout_is_a_deadline_as_a_latency_is() -> None:
    """What a request had left by its gRPC deadline decides as its parameter would."""
    for arrival in (Arrival(0, Slo(latency_ns=8 * MS)), Arrival(0, Slo(), timeout_ns=8 * MS)):
        simulation = simulate(Setting(five_variants()), [arrival], FitDrain)
        assert simulation.runs[0].variant == "int8-static"


def test_longer_inputs_are_simulated_as_long_as_they_were_measured() -> None:
    """The shape in a trace selects the profile of its length."""
    short, long = variant("fp32", 0.9, 2, 0).profile, variant("fp32", 0.9, 8, 0).profile
    assert short is not None
    assert long is not None
    measured = replace(variant("fp32", 0.9, 2, 0), lengths=((100, short), (400, long)))
    trace = [Arrival(0, shape=((100,),)), Arrival(100 * MS, shape=((400,),))]
    ends = simulate(Setting([measured]), trace, FitDrain).ended
    taken_ms = [(end.at_ns - arrival.at_ns) / MS for end, arrival in zip(ends, trace, strict=True) if end]
    assert taken_ms == pytest.approx([2, 8], rel=1e-6)


def test_a_lost_executor_comes_back() -> None:
    """Nothing runs on it in between, and afterwards it takes its share again."""
    trace = poisson(300, 3.0)
    simulation = simulate(
        Setting(five_variants(), 2, losses=[Loss(1000 * MS, 1, 1000 * MS)]), trace, FitDrain
    )  # fmt: skip
    starts_ms = [run.started_ns / MS for run in simulation.runs if run.executor == 1]
    assert not [start for start in starts_ms if 1000 <= start < 2000]
    assert [start for start in starts_ms if start >= 2000]
    assert None not in simulation.ended


def test_a_summary_adds_up() -> None:
    """Outcomes sum to the requests, shares to one, and each measure is what its docstring says."""
    trace = poisson(2600, 1.0)
    simulation = simulate(Setting(five_variants(), 2, noise=NOISY), trace, FitDrain)
    summary = summarise(simulation)
    in_time = [end for end in simulation.ended if end and end.in_time]
    assert summary.requests == sum(summary.outcomes.values()) == len(trace)
    assert sum(summary.shares.values()) == pytest.approx(1.0)
    assert summary.attainment == len(in_time) / len(trace)
    assert summary.effective_accuracy == pytest.approx(summary.mean_accuracy * summary.attainment)
    assert 0 < summary.attainment < summary.attainment_admitted <= 1
    assert 0 < summary.utilisation <= 1
    assert summary.floors_broken == 0


def test_replicas_are_summed_by_their_requests() -> None:
    """Two unequal halves of a run give back the figures of the whole."""
    trace = poisson(500, 1.0)
    parts = [summarise(simulate(Setting(five_variants()), half, FitDrain)) for half in (trace[:100], trace[100:])]
    both = merged(parts)
    assert both.requests == len(trace)
    in_time = sum(part.attainment * part.requests for part in parts)
    assert both.attainment == pytest.approx(in_time / len(trace))
    earned = sum(part.effective_accuracy * part.requests for part in parts)
    assert both.effective_accuracy == pytest.approx(earned / len(trace))
    assert both.mean_accuracy == pytest.approx(earned / in_time)
