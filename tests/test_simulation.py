"""The simulator drives the live scheduler: what it adds is time, noise and bookkeeping."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
from scheduling_models import MS, five_variants, variant

from server import inference
from server.arrivals import gamma_arrivals_ns
from server.scheduling.policies import policy_factory
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.slo import Outcome, Slo
from server.simulation.simulation import MAX_PARTS, Loss, Noise, Setting, Simulation, simulate
from server.simulation.summary import summarise
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


def test_several_runs_are_summed_up_as_one() -> None:
    """Of a run without a miss and one with many, every ratio is that of the requests and batches of both together."""
    runs = [simulate(Setting(five_variants()), poisson(rate, 0.5), policy_factory("maxbatch")) for rate in (20, 3000)]
    quiet, busy, both = summarise(runs[0]), summarise(runs[1]), summarise(*runs)
    ended = [end for run in runs for end in run.ended if end]
    in_time = [end for end in ended if end.in_time]
    batches = [batch for run in runs for batch in run.runs]
    assert quiet.attainment == 1
    assert both.requests == len(ended) == quiet.requests + busy.requests
    assert both.attainment == len(in_time) / len(ended)
    assert both.attainment_admitted == len(in_time) / sum(end.admitted for end in ended)
    assert both.told_early == busy.told_early < 1, "nobody missed in the quiet one"
    assert both.mean_batch == sum(batch.samples for batch in batches) / len(batches)
    assert both.prediction_exceeded == sum(run.exceeded for run in runs) / len(batches)
    assert both.outcomes["ok"] == quiet.outcomes["ok"] + busy.outcomes["ok"]


def test_percentiles_are_of_nearest_rank() -> None:
    """Of two latencies, 10 and 14 ms, the median is the first that half of them do not exceed."""
    trace = [Arrival(0, Slo(variant="fp32")), Arrival(MS, Slo(variant="amp"))]
    simulation = simulate(Setting([variant("fp32", 0.913, 6, 4), variant("amp", 0.912, 3, 2)]), trace, FitDrain)
    summary = summarise(simulation)
    assert (summary.p50_ms, summary.p99_ms) == (10, 14)


def test_a_request_above_the_largest_batch_runs_in_parts() -> None:
    """Of 20 samples 16 and 4 run, on two executors at once; the larger part ends it."""
    setting = Setting([variant("fp32", 0.913, 6, 4)], 2)
    simulation = simulate(setting, [Arrival(0, samples=20)], FitDrain)
    assert sorted(run.samples for run in simulation.runs) == [4, 16]
    (end,) = simulation.ended
    assert end is not None
    assert (end.outcome, end.at_ns, end.admitted, end.in_time) == (Outcome.OK, 70 * MS, True, True)


def test_the_least_accurate_part_speaks_for_a_request() -> None:
    """Of 20 samples in 30 ms, 16 run on the fastest variant and 4 then on a better one: the answer is the worse one."""
    arrivals = [Arrival(0, Slo(latency_ns=30 * MS), samples=20)]
    simulation = simulate(Setting(five_variants()), arrivals, policy_factory("maxacc"))
    assert [(run.place, run.samples) for run in simulation.runs] == [(4, 16), (2, 4)]
    (end,) = simulation.ended
    assert end is not None
    assert (end.outcome, end.place, end.batch_size) == (Outcome.OK, 4, 16)


def test_a_part_that_is_refused_ends_the_request_and_frees_its_other_parts() -> None:
    """Five full batches of 70 ms in 150 ms: the arrival ends once, and only what had started runs."""
    setting = Setting([variant("fp32", 0.913, 6, 4)])
    simulation = simulate(setting, [Arrival(0, Slo(latency_ns=150 * MS), samples=80)], FitDrain)
    (end,) = simulation.ended
    assert end is not None
    assert (end.outcome, end.at_ns, end.in_time) == (Outcome.REJECTED, 0, False)
    assert simulation.runs == []
    assert simulation.scheduler.waiting == 0


def test_a_request_of_more_parts_than_a_server_takes_is_invalid() -> None:
    """The limit is the server's."""
    assert MAX_PARTS == inference.MAX_PARTS
    setting = Setting([variant("fp32", 0.913, 1, 1, sizes=(1, 2))])
    for samples, outcome in ((2 * MAX_PARTS, Outcome.OK), (2 * MAX_PARTS + 1, Outcome.INVALID)):
        (end,) = simulate(setting, [Arrival(0, samples=samples)], FitDrain).ended
        assert end is not None
        assert end.outcome is outcome


def test_parts_that_are_too_many_are_never_listed() -> None:
    """A list of the million parts would take eight megabytes."""
    setting = Setting([variant("fp32", 0.913, 1, 1, sizes=(1, 2))])
    tracemalloc.start()
    try:
        (end,) = simulate(setting, [Arrival(0, samples=2_000_000)], FitDrain).ended
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert end is not None
    assert end.outcome is Outcome.INVALID
    assert peak_bytes < 2_000_000
