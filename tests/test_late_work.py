"""Late work: what asked to be answered even if late runs in time that nobody else needs, and takes no one's place."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, model_of, slo, variant
from scheduling_world import World

from server.scheduling.admission import Defaults
from server.scheduling.slo import ModelKey, OnInfeasible, Outcome, Slo

LATE = OnInfeasible.LATE
SECOND = 1000 * MS


def test_late_work_runs_only_when_nothing_else_waits() -> None:
    """Late requests fill idle executors, and never start before a request that can still be in time."""
    world = World(model_of())
    late = world.arrive(*[Arrival(0, Slo(latency_ns=MS, on_infeasible=(LATE,)))] * 20)
    world.arrive(*[Arrival(at * 5 * MS, slo(50)) for at in range(40)])
    world.run()
    assert world.outcomes() == {"late": 20, "ok": 40}
    for batch in world.batches:
        if batch.reason == "late":
            waiting = [
                number
                for number, arrival in enumerate(world.arrivals)
                if number not in late and arrival.at_ns <= batch.at_ns and world.ended[number].at_ns > batch.at_ns
            ]
            running = {m.number for b in world.batches if b is not batch for m in b.members if b.at_ns < batch.at_ns}
            assert set(waiting) <= running


def test_late_work_leaves_regular_work_as_it_was() -> None:
    """A thousand requests that are late already do not make one late that is not."""

    def regular(late: int) -> list[str]:
        world = World(model_of(), executors=2)
        numbers = world.arrive(*[Arrival(SECOND + at * 100 * MS, slo(90)) for at in range(20)])
        world.arrive(*[Arrival(SECOND, Slo(latency_ns=MS, on_infeasible=(LATE,)))] * late)
        world.run()
        return [world.outcome(number).value for number in numbers]

    assert regular(1000) == regular(0) == ["ok"] * 20


def test_default_latencies_are_never_refused_for_it() -> None:
    """A flood of requests that named no latency is answered to the last, ok or late."""
    world = World(model_of(), executors=2, defaults=Defaults(latency_ns=100 * MS))
    world.arrive(*[Arrival(0)] * 1500)
    world.run()
    assert set(world.outcomes()) == {"ok", "late"}
    assert world.outcomes()["late"] > 500


def test_late_work_of_several_models_takes_turns() -> None:
    """Of two models with late work only, neither waits for the other to be done."""
    world = World(model_of(name="m"), model_of(name="n"), defaults=Defaults(latency_ns=MS))
    world.arrive(*[Arrival(0, model="m")] * 200, *[Arrival(0, model="n")] * 200)
    world.run()
    assert {batch.model for batch in world.batches[:4]} == {"m", "n"}


def test_late_work_that_waits_is_no_idleness() -> None:
    """An autoscaler must not take executors away from a backlog because all of it is late already."""
    world = World(model_of())
    world.arrive(Arrival(0, slo(500)), *[Arrival(MS, slo(0.5, None, OnInfeasible.LATE))] * 400)
    world.run(until_ns=2 * MS)
    assert world.scheduler.saturation(ModelKey("m", "1"), 2 * MS) > 0.5


def test_late_work_does_not_slip_in_while_a_batch_is_held() -> None:
    """An executor that waits for a batch to grow does not start late work that would hold the batch up."""
    world = World(model_of(delay_ms=2))
    regular = world.arrive(Arrival(0, slo(500)))
    world.arrive(Arrival(MS, slo(1, None, LATE)))
    world.run()
    assert [member.number for batch in world.batches for member in batch.members] == [*regular, 1]
    assert world.batches[0].at_ns == 2 * MS


def test_late_work_runs_while_another_model_holds_a_batch_that_it_cannot_delay() -> None:
    """An executor that only waits for a batch to grow serves late work that is done by the end of the hold."""
    slow = model_of(name="m", delay_ms=100)
    world = World(slow, model_of(name="n"))
    world.arrive(Arrival(0, slo(1000), "m"))
    late = world.arrive(Arrival(MS, slo(0.5, None, LATE), "n"))[0]
    world.run()
    assert world.ended[late].at_ns < 100 * MS
    assert world.batches[-1].at_ns == 100 * MS


def test_late_work_that_waited_earns_its_model_no_credit() -> None:
    """A model with a late request that waited for long takes no more than its share when its traffic returns."""
    only = variant("fp32", 0.9, 5, 5)
    world = World(model_of(only, name="m"), model_of(only, name="n"))
    world.arrive(*[Arrival(at * 3 * MS, slo(100), "m") for at in range(9000)])
    world.arrive(Arrival(SECOND, slo(1, None, LATE), "n"))
    world.arrive(*[Arrival(20 * SECOND + at * 3 * MS, slo(100), "n") for at in range(2000)])
    world.run(until_ns=26 * SECOND)
    time = {"m": 0, "n": 0}
    for batch in world.batches:
        if batch.at_ns > 21 * SECOND:
            time[batch.model] += batch.predicted_ns
    assert time["m"] == pytest.approx(time["n"], rel=0.2)


def test_late_work_leaves_half_of_the_queue_to_those_in_time() -> None:
    """However many may be late, a request that can still be in time finds a place."""
    world = World(model_of(), max_requests=100, defaults=Defaults(latency_ns=MS))
    patient = world.arrive(*[Arrival(0)] * 300)
    urgent = world.arrive(*[Arrival(MS, slo(100))] * 10)
    world.run()
    assert [world.outcome(number) for number in urgent] == [Outcome.OK] * 10
    outcomes = [world.outcome(number) for number in patient]
    assert set(outcomes) == {Outcome.LATE, Outcome.REJECTED}
    assert 49 <= outcomes.count(Outcome.LATE) <= 51


def test_late_bytes_leave_half_of_the_queue_to_those_in_time() -> None:
    """The bound in bytes holds for late work as the bound in requests does."""
    world = World(model_of(), max_bytes=10_000, defaults=Defaults(latency_ns=MS))
    patient = world.arrive(*[Arrival(0, size_bytes=1000)] * 30)
    urgent = world.arrive(*[Arrival(MS, slo(100), size_bytes=1000)] * 4)
    world.run()
    assert [world.outcome(number) for number in urgent] == [Outcome.OK] * 4
    assert [world.outcome(number) for number in patient].count(Outcome.LATE) <= 6


def test_work_that_finds_no_late_place_expires() -> None:
    """Of three requests that a slow batch makes hopeless, the two for whom there is room are served late."""
    world = World(model_of(), max_requests=4, service=lambda _, profiled_ns: 10 * profiled_ns)
    world.arrive(Arrival(0, slo(1000)))
    asked = world.arrive(*[Arrival(MS, slo(40, None, LATE))] * 3)
    world.run()
    assert [world.outcome(number) for number in asked] == [Outcome.LATE, Outcome.LATE, Outcome.EXPIRED]


def test_one_late_request_may_always_wait() -> None:
    """Bounds so small that half of them is nothing still let late work be served, one at a time."""
    world = World(model_of(), max_requests=1, max_bytes=100, defaults=Defaults(latency_ns=MS))
    numbers = world.arrive(*[Arrival(at * 50 * MS, size_bytes=90) for at in range(3)])
    world.run()
    assert [world.outcome(number) for number in numbers] == [Outcome.LATE] * 3


def test_a_full_late_queue_leads_to_what_was_asked_for_next() -> None:
    """Actions are tried in their order: who may not wait to be late may still be degraded."""
    world = World(model_of(), max_requests=4, defaults=Defaults(latency_ns=MS))
    world.arrive(*[Arrival(0, Slo(on_infeasible=(LATE,)))] * 3)
    asked = slo(9, 0.913, LATE, OnInfeasible.DEGRADE, hard=False)
    number = world.arrive(Arrival(0, asked))[0]
    world.run()
    assert world.outcome(number) is Outcome.DEGRADED


def test_requests_that_could_only_be_late_are_no_traffic() -> None:
    """A flood that finds the late queue full does not make the others' deadlines look short."""
    world = World(model_of(), max_requests=20)
    world.arrive(*[Arrival(at * MS, slo(0.001, None, LATE)) for at in range(500)])
    regular = world.arrive(*[Arrival(at * 50 * MS, slo(100)) for at in range(1, 10)])
    world.run()
    assert {world.ended[number].variant for number in regular} == {"fp32"}


def test_late_work_of_a_retired_model_comes_to_an_end() -> None:
    """Beside a model that always has something waiting, the late work of one that is to go takes its turns."""
    world = World(model_of(name="m"), model_of(name="n"))
    world.arrive(*[Arrival(at * MS, slo(100), "m") for at in range(3000)])
    late = world.arrive(*[Arrival(SECOND, slo(0.5, None, LATE), "n")] * 40)
    world.at(SECOND + MS, lambda: world.scheduler.retire_model(ModelKey("n", "1")))
    world.run(until_ns=2 * SECOND)
    assert all(number in world.ended for number in late)


def test_the_late_work_of_a_retired_model_takes_no_more_than_its_turns() -> None:
    """Thousands that starved for seconds do not shut the other model out when theirs is to go."""
    world = World(model_of(name="m"), model_of(name="n"))
    world.arrive(*[Arrival(at * MS, slo(100), "m") for at in range(6000)])
    world.arrive(*[Arrival(SECOND, slo(0.5, None, LATE), "n")] * 3000)
    world.at(5 * SECOND, lambda: world.scheduler.retire_model(ModelKey("n", "1")))
    world.run(until_ns=6 * SECOND)
    time = {"m": 0, "n": 0}
    for batch in world.batches:
        if batch.at_ns > 5 * SECOND:
            time[batch.model] += batch.predicted_ns
    assert time["m"] == pytest.approx(time["n"], rel=0.2)


def test_a_newcomer_is_told_of_the_late_work_that_takes_turns() -> None:
    """What is left of a retired model counts as the others' backlog; late work that only fills gaps does not."""
    one, other = model_of(name="m"), model_of(name="n")
    world = World(one, other)
    world.arrive(Arrival(0, slo(500), "n"), *[Arrival(0, slo(0.5, None, LATE), "n")] * 100)
    world.run(until_ns=0)
    assert world.scheduler.load(one, 0).others_backlog_ns == 0
    world.scheduler.retire_model(other.key)
    assert world.scheduler.load(one, 0).others_backlog_ns == other.late_backlog_ns() > 0


def test_a_model_that_nobody_asks_is_not_saturated_by_another() -> None:
    """The autoscaling signal of a model without requests is 0, however busy the executors are: after a reload too."""
    world = World(model_of(name="m"), model_of(name="n"))
    world.arrive(Arrival(0, slo(500), "m"))
    world.run(until_ns=0)
    assert world.scheduler.saturation(ModelKey("n", "1"), 0) == 0.0
