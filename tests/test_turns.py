"""Whose turn it is among models, and how long a batch is held back."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, model_of, queue_up, slo, variant
from scheduling_world import World

from server.scheduling.slo import OnInfeasible, Outcome
from server.scheduling.turns import held_until_ns, in_turn
from variants.variant import State

SECOND = 1000 * MS


def test_the_most_urgent_model_goes_first_while_shares_are_about_equal() -> None:
    """Up to 50 ms more executor time than another does not cost a model its urgent request."""
    urgent, patient = model_of(name="m"), model_of(name="n")
    queue_up(urgent, Arrival(0, slo(50), "m"))
    queue_up(patient, Arrival(0, slo(500), "n"))
    urgent.served_ns = 50 * MS
    assert in_turn([patient, urgent], 0) == [urgent, patient]
    urgent.served_ns += 1
    assert in_turn([patient, urgent], 0) == [patient, urgent]


def test_equal_models_take_turns_by_time_and_then_by_name() -> None:
    """Ties are total, whatever the order in which the models are handed in."""
    one, other = model_of(name="m"), model_of(name="n")
    for model in (one, other):
        queue_up(model, Arrival(0, slo(100), model.key.name))
    assert in_turn([other, one], 0) == in_turn([one, other], 0) == [one, other]
    one.served_ns = 1
    assert in_turn([one, other], 0) == [other, one]


def test_a_model_without_work_has_no_turn() -> None:
    """Only those with waiting requests are in the order."""
    one, other = model_of(name="m"), model_of(name="n")
    queue_up(other, Arrival(0, slo(100), "n"))
    assert in_turn([one, other], 0) == [other]
    assert in_turn([one], 0) == []


def test_nothing_is_held_without_a_delay_or_a_variant_that_may_run() -> None:
    """No delay configured, or nothing left to run on: there is nothing to wait for."""
    model = model_of()
    queue_up(model, Arrival(0, slo(500)))
    assert held_until_ns(model, 0) is None
    model = model_of(variant("fp32", 0.9, 5, 5), delay_ms=5)
    queue_up(model, Arrival(0, slo(500)))
    model.set_states({"fp32": State.DISABLED})
    assert held_until_ns(model, 0) is None


def test_the_delay_counts_from_whoever_has_waited_longest() -> None:
    """A more urgent newcomer does not start it again."""
    model = model_of(delay_ms=5)
    queue_up(model, Arrival(0, slo(900)), Arrival(4 * MS, slo(500)))
    assert held_until_ns(model, 4 * MS) == 5 * MS


def test_ever_more_urgent_requests_do_not_hold_a_batch_beyond_the_delay() -> None:
    """One that is joined by a more urgent one every millisecond starts when its own delay is over."""
    world = World(model_of(delay_ms=5))
    world.arrive(*[Arrival(at * MS, slo(1000 - 50 * at)) for at in range(10)])
    world.run()
    assert world.batches[0].at_ns == 5 * MS
    assert len(world.batches[0].members) == 6


def test_a_flood_of_one_model_costs_the_other_no_deadline() -> None:
    """Ten times what the host can carry for one model; all of the other's, a tenth of the capacity, are in time."""
    world = World(model_of(name="m"), model_of(name="n"), executors=2, check=False)
    world.arrive(*[Arrival(at * MS // 20, slo(60), "m") for at in range(8000)])
    steady = world.arrive(*[Arrival(at * 10 * MS, slo(60), "n") for at in range(40)])
    world.run()
    assert [world.outcome(number) for number in steady].count(Outcome.OK) == len(steady)


def test_a_light_model_with_tight_deadlines_lives_beside_a_heavy_one() -> None:
    """Batches of the heavy model that last four tight deadlines, on one executor of two, cost the light one nothing."""
    heavy = model_of(variant("fp32", 0.9, 20, 5), name="m")
    light = model_of(variant("fp32", 0.9, 0, 1), name="n")
    world = World(heavy, light, executors=2)
    patient = world.arrive(*[Arrival(at * 200 * MS, slo(1000), "m") for at in range(20)])
    tight = world.arrive(*[Arrival(at * 7 * MS, slo(10), "n") for at in range(500)])
    world.run()
    assert {world.outcome(number) for number in patient} == {Outcome.OK}
    assert {world.outcome(number) for number in tight} == {Outcome.OK}


@pytest.mark.parametrize("executors", [1, 2])
def test_no_model_falls_behind_another_by_more_than_the_bound_and_a_batch(executors: int) -> None:
    """While both always have work, their executor times differ by at most 50 ms and a batch on each executor."""
    world = World(model_of(name="m"), model_of(name="n"), executors=executors, check=False)
    world.arrive(*[Arrival(at * MS // 3, slo(80), "m") for at in range(1800)])
    world.arrive(*[Arrival(at * MS // 3, slo(400), "n") for at in range(1800)])
    largest = 0
    for instant in range(200, 600, 10):
        world.run(until_ns=instant * MS)
        served = [model.served_ns for model in world.scheduler.models.values()]
        largest = max(largest, abs(served[0] - served[1]))
    longest_ns = max(batch.predicted_ns for batch in world.batches)
    assert largest <= 50 * MS + executors * longest_ns


def test_late_work_ages_under_a_load_that_never_pauses() -> None:
    """With somebody always waiting it is served all the same, in about a tenth of the time, and harms nobody."""
    world = World(model_of(), check=False)
    steady = world.arrive(*[Arrival(at * 2 * MS, slo(200)) for at in range(1500)])
    late = world.arrive(*[Arrival(MS, slo(0.5, None, OnInfeasible.LATE))] * 300)
    world.run(until_ns=3 * SECOND)
    aged_ns = sum(batch.predicted_ns for batch in world.batches if batch.reason == "late")
    assert 0 < aged_ns <= 0.1 * 3 * SECOND
    assert any(number in world.ended for number in late)
    world.run()
    assert {world.outcome(number) for number in steady} == {Outcome.OK}
    assert {world.outcome(number) for number in late} == {Outcome.LATE}


def test_aged_late_work_does_not_go_before_the_urgent_of_a_model_that_had_more_than_its_share() -> None:
    """Its model must wait for its turn, but not for somebody who is late anyway: the deadline is still met."""
    one, other = (model_of(variant("fp32", 0.9, 5, 5), name=name) for name in "mn")
    world = World(one, other)
    late = world.arrive(Arrival(0, slo(1, None, OnInfeasible.LATE), "m"))[0]
    world.lose(0, SECOND)
    world.at(SECOND, lambda: setattr(other, "served_ns", 60 * MS))
    world.arrive(Arrival(SECOND, slo(500), "m"))
    urgent = world.arrive(Arrival(SECOND, slo(22), "n"))[0]
    world.at(SECOND, lambda: setattr(one, "served_ns", 0))
    world.at(SECOND, lambda: setattr(other, "served_ns", 60 * MS))
    world.run()
    first = world.batches[0].members[0].number
    assert first not in (late, urgent)
    assert world.outcome(late) is Outcome.LATE
