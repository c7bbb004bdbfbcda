from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from scheduling_models import MS, Arrival, gamma_arrivals, model_of, slo, variant
from scheduling_world import World, noisy

from server.scheduling.scheduler import Run
from server.scheduling.slo import ModelKey, OnInfeasible, Outcome

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT
SECOND = 1000 * MS


def test_a_hard_floor_holds_in_overload() -> None:
    """Three times what fp32 can carry: whoever asked for it hard gets fp32 or a refusal, never less."""
    world = World(model_of(), executors=2)
    world.arrive(*gamma_arrivals(3, 1500, 4, 1.0, slo(60, 0.913)), *gamma_arrivals(4, 1500, 4, 1.0, slo(60)))
    world.run()
    strict = {number for number, arrival in enumerate(world.arrivals) if arrival.slo.min_accuracy}
    answered = {world.ended[number].variant for number in strict}
    assert answered == {"fp32", "none"}
    assert world.outcomes()["rejected"] > 100
    assert {world.ended[number].variant for number in set(world.ended) - strict} > {"distilled"}


def test_a_soft_floor_degrades_in_overload_and_only_then() -> None:
    """A soft floor with `degrade` is kept on an idle server and given up rather than the deadline on a busy one."""
    world = World(model_of(), executors=2)
    asked = slo(60, 0.913, DEGRADE, hard=False)
    early = world.arrive(Arrival(0, asked))[0]
    world.arrive(*[Arrival(SECOND + at * MS // 2, asked) for at in range(800)])
    last = world.arrive(Arrival(3 * SECOND, asked))[0]
    world.run()
    assert world.ended[early].variant == world.ended[last].variant == "fp32"
    assert world.outcomes()["degraded"] > 500
    assert world.outcomes()["ok"] > 10


def test_high_priority_goes_first_and_low_priority_is_not_starved() -> None:
    """Under a standing flood of the highest priority, the lowest is still answered within its deadline."""
    world = World(model_of(), executors=2)
    world.arrive(*[Arrival(at * MS, slo(200, priority=1)) for at in range(3000)])
    low = world.arrive(*[Arrival(500 * MS + at * 50 * MS, slo(200, priority=8)) for at in range(40)])
    world.run()
    served = [world.outcome(number) for number in low]
    assert served.count(Outcome.OK) >= 38
    first = World(model_of())
    first.arrive(Arrival(0, slo(500)), *[Arrival(MS, slo(500, priority=4))] * 16)
    urgent = first.arrive(*[Arrival(2 * MS, slo(500, priority=1))] * 16)
    first.run()
    assert {member.number for member in first.batches[1].members} >= set(urgent[:15])


def test_a_burst_moves_traffic_to_faster_variants_and_back_within_a_second() -> None:
    """Before the burst fp32 answers, in it nobody is late, and a second after its end fp32 answers again."""
    world = World(model_of(), executors=2, service=noisy(5, 0.04))
    calm, after = 60, 60
    world.arrive(*[Arrival(at * 16 * MS, slo(60)) for at in range(calm)])
    world.arrive(*[Arrival(SECOND + at * MS * 2 // 3, slo(60)) for at in range(1500)])
    back = world.arrive(*[Arrival(3 * SECOND + at * 16 * MS, slo(60)) for at in range(after)])
    world.run()
    used = world.variants_used()
    assert used[:calm] == ["fp32"] * calm
    assert Counter(used[calm + 200 : calm + 1500])["fp32"] < 100
    assert used[back[0] : back[-1] + 1] == ["fp32"] * after
    assert world.outcomes()["ok"] > 0.99 * len(used)


def test_two_busy_models_share_the_executors_fairly() -> None:
    """A model with more traffic than another gets about the same executor time while both have a backlog."""
    world = World(model_of(name="m"), model_of(name="n"), executors=2)
    world.arrive(*[Arrival(at * MS // 5, slo(100), "m") for at in range(4000)])
    world.arrive(*[Arrival(at * MS // 2, slo(100), "n") for at in range(1600)])
    world.run(until_ns=800 * MS)
    served = {key[0]: model.served_ns for key, model in world.scheduler.models.items()}
    assert served["m"] == pytest.approx(served["n"], rel=0.1)


def test_a_model_that_was_idle_earns_no_credit() -> None:
    """After twenty seconds of serving only one model, the other does not get every executor to catch up."""
    world = World(model_of(name="m"), model_of(name="n"))
    world.arrive(*[Arrival(at * 20 * MS, slo(100), "m") for at in range(1000)])
    world.arrive(*[Arrival(20 * SECOND + at * MS // 2, slo(200), "mn"[at % 2]) for at in range(1200)])
    world.run()
    early = [batch for batch in world.batches if 20 * SECOND < batch.at_ns < 20 * SECOND + 500 * MS]
    time = Counter[str]()
    for batch in early:
        time[batch.model] += batch.predicted_ns
    assert time["m"] == pytest.approx(time["n"], rel=0.2)


def test_executors_that_decide_together_take_turns_between_models() -> None:
    """Two idle executors serve two waiting models, one each."""
    world = World(model_of(name="m"), model_of(name="n"), executors=2)
    world.arrive(*[Arrival(0, slo(300), "m")] * 32, *[Arrival(0, slo(300), "n")] * 32)
    world.run(until_ns=0)
    assert {batch.model for batch in world.batches} == {"m", "n"}


def test_a_herd_at_one_instant_with_one_deadline_is_served_in_order() -> None:
    """A thousand equal requests: those who are answered in time are the first to have come."""
    world = World(model_of(), executors=2)
    world.arrive(*[Arrival(0, slo(200))] * 1000)
    world.run()
    assert world.outcomes()["ok"] > 400
    assert set(world.outcomes()) == {"ok", "rejected"}
    first_refused = min(number for number, ended in world.ended.items() if ended.outcome is Outcome.REJECTED)
    assert all(ended.outcome is Outcome.REJECTED for number, ended in world.ended.items() if number > first_refused)


def test_a_flood_of_impossible_requests_does_not_refuse_the_possible() -> None:
    """Requests that no server could answer in time neither fill the queue nor teach it what deadlines are usual."""

    def possible(flood: int) -> list[str]:
        world = World(model_of(), executors=2)
        world.arrive(*[Arrival(at * MS // 10, slo(1)) for at in range(flood)])
        numbers = world.arrive(*[Arrival(at * MS // 2, slo(60)) for at in range(500)])
        world.run()
        return [world.ended[number].variant for number in numbers]

    assert possible(2500) == possible(0)


@pytest.mark.parametrize("factor", [0.7, 1.3])
def test_a_profile_that_is_thirty_per_cent_wrong_costs_few_deadlines(factor: float) -> None:
    """The slowdown is learnt: after the first moments hardly anybody is late, whichever way the profile errs."""
    world = World(model_of(), executors=2, service=lambda _, profiled_ns: int(profiled_ns * factor))
    world.arrive(*gamma_arrivals(1, 700, 2, 2.0, slo(60)))
    world.run()
    assert world.outcomes()["ok"] > 0.98 * len(world.arrivals)


def test_a_batch_that_takes_ten_times_as_long_is_survived() -> None:
    """One outlier costs those it held up and nobody two seconds later."""

    def service(run: Run, profiled_ns: int) -> int:
        return profiled_ns * (10 if any(request.number == 300 for request in run.requests) else 1)

    world = World(model_of(), executors=2, service=service)
    world.arrive(*gamma_arrivals(1, 600, 1, 4.0, slo(60)))
    world.run()
    late = [number for number, ended in world.ended.items() if ended.outcome is not Outcome.OK]
    outlier_ns = world.arrivals[300].at_ns
    assert len(late) < 120
    assert all(outlier_ns - 100 * MS < world.arrivals[number].at_ns < outlier_ns + 2 * SECOND for number in late)


def test_a_short_slowdown_does_not_lock_an_idle_executor_out() -> None:
    """Half a second at five times the latency: what is refused is not measured, and yet soon all are served again."""

    def service(run: Run, profiled_ns: int) -> int:
        return profiled_ns * (5 if 1000 * MS <= run.started_ns < 1500 * MS else 1)

    world = World(model_of(variant("fp32", 0.9, 9, 1)), service=service)
    world.arrive(*gamma_arrivals(2, 40, 1, 8.0, slo(60)))
    world.run()
    later = [number for number, arrival in enumerate(world.arrivals) if arrival.at_ns > 4 * SECOND]
    assert sum(world.outcome(number) is Outcome.OK for number in later) > 0.98 * len(later)


@pytest.mark.parametrize("gap_ns", [SECOND // 3, SECOND, 2 * SECOND])
def test_a_slow_host_is_remembered_from_one_request_to_the_next(gap_ns: int) -> None:
    """At three times the latency only the faster variant is in time; who comes every two seconds gets it too."""
    family = [variant("fp32", 0.9, 9, 1), variant("amp", 0.89, 4, 1)]
    world = World(model_of(*family), service=lambda _, profiled_ns: 3 * profiled_ns)
    world.arrive(*[Arrival(number * gap_ns, slo(27)) for number in range(60)])
    world.run()
    assert all(world.outcome(number) is Outcome.OK for number in range(20, 60))


def test_patient_requests_of_one_model_leave_room_for_tight_ones_of_another() -> None:
    """At low load, a model whose requests may wait long does not keep the executor from another's that may not."""
    world = World(model_of(name="m"), model_of(name="n"))
    world.arrive(*gamma_arrivals(1, 100, 1, 4.0, slo(300)))
    tight = world.arrive(*[replace(each, model="n") for each in gamma_arrivals(2, 30, 1, 4.0, slo(30))])
    world.run()
    assert sum(world.outcome(number) is not Outcome.OK for number in tight) <= 2


def test_requests_too_tight_to_protect_leave_the_others_protected() -> None:
    """A third model with hardly time for its fastest variant does not cost the second its room beside the first."""
    world = World(model_of(name="m"), model_of(name="n"), model_of(name="c"))
    world.arrive(*gamma_arrivals(11, 100, 1, 4.0, slo(300)))
    tight = world.arrive(*[replace(each, model="n") for each in gamma_arrivals(12, 30, 1, 4.0, slo(30))])
    world.arrive(*[replace(each, model="c") for each in gamma_arrivals(13, 30, 1, 4.0, slo(4.5))])
    world.run()
    assert sum(world.outcome(number) is not Outcome.OK for number in tight) <= 2


def test_a_variant_that_cannot_take_a_large_request_is_not_reckoned_with_for_it() -> None:
    """Requests larger than the fastest variant was measured at drain on another; nobody is let in in vain."""
    family = [variant("fp32", 0.9, 4, 1, sizes=(1, 8)), variant("amp", 0.9, 2, 0, sizes=(1,))]
    world = World(model_of(*family))
    world.arrive(*[Arrival(at * 5 * MS, slo(120), samples=8) for at in range(200)])
    world.run()
    assert world.outcomes()["expired"] + world.outcomes()["late"] <= 2
    assert world.outcomes()["ok"] > 60


def test_saturation_rises_from_idle_to_full() -> None:
    """The autoscaling signal is 0 at rest, 1 when the backlog takes all the time that requests allow."""
    world = World(model_of())
    key = ModelKey("m", "1")
    assert world.scheduler.saturation(key, 0) == 0.0
    world.arrive(Arrival(0, slo(500)))
    world.run(until_ns=0)
    assert 0.0 < world.scheduler.saturation(key, 0) < 0.1
    world.arrive(*[Arrival(MS, slo(100))] * 400)
    world.run(until_ns=MS)
    assert world.scheduler.saturation(key, MS) > 0.9
    world.run()
    assert world.scheduler.saturation(key, world.now_ns) == 0.0
