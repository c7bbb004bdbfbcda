"""Executors that die, come back, or seem stuck: nobody is forgotten, and the others carry on."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, ask, gamma_arrivals, model_of, slo, variant
from scheduling_world import World

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policy import Run
from server.scheduling.scheduler import Scheduler
from server.scheduling.slo import OnInfeasible, Outcome, Request, Slo
from variants.variant import REFERENCE

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT
SECOND = 1000 * MS


def started(executors: int, model: ModelQueue, *arrivals: Arrival) -> tuple[Scheduler, list[Request], Run]:
    """A scheduler whose first executor has begun a batch of these requests."""
    scheduler = Scheduler(executors, max_requests=100, max_bytes=1 << 20)
    scheduler.add_model(model)
    requests = [ask(model, arrival, number) for number, arrival in enumerate(arrivals)]
    for request in requests:
        assert scheduler.arrived(request, 0) == []
    run, _ = scheduler.decide(0, 0)
    assert run is not None
    assert set(run.requests) == set(requests)
    return scheduler, requests, run


def test_who_was_in_a_batch_that_died_is_tried_again_alone() -> None:
    """Each of the batch is answered by the executor that is left, once and by itself."""
    world = World(model_of(), executors=2)
    numbers = world.arrive(*[Arrival(0, slo(500))] * 4)
    world.at(MS, lambda: world.lose(0, 10 * SECOND))
    world.run()
    assert [len(batch.members) for batch in world.batches] == [4, 1, 1, 1, 1]
    assert {batch.executor for batch in world.batches[1:]} == {1}
    assert {world.outcome(number) for number in numbers} == {Outcome.OK}


def test_who_has_no_time_left_when_the_executor_dies_fails_at_once() -> None:
    """Of two in the batch, the one whose deadline is near ends as failed; the other is answered."""
    world = World(model_of(variant("fp32", 0.9, 5, 5)), executors=2)
    near, far = world.arrive(Arrival(0, slo(20)), Arrival(0, slo(500)))
    world.at(14 * MS, lambda: world.lose(0, 10 * SECOND))
    world.run()
    assert len(world.batches[0].members) == 2
    assert (world.outcome(near), world.ended[near].at_ns) == (Outcome.FAILED, 14 * MS)
    assert world.outcome(far) is Outcome.OK


def test_losing_an_idle_executor_ends_nobody() -> None:
    """The next request runs on the other; when both are lost it waits for one to come back."""
    world = World(model_of(), executors=2)
    world.at(0, lambda: world.lose(0, 300 * MS))
    alone = world.arrive(Arrival(MS, slo(100)))[0]
    world.at(100 * MS, lambda: world.lose(1, SECOND))
    patient = world.arrive(Arrival(200 * MS, slo(500)))[0]
    world.run()
    assert [batch.executor for batch in world.batches] == [1, 0]
    assert (world.outcome(alone), world.outcome(patient)) == (Outcome.OK, Outcome.OK)
    assert world.batches[1].at_ns == 300 * MS


@pytest.mark.parametrize("seed", [1, 2])
def test_one_slo_after_half_of_the_executors_were_lost_everybody_is_in_time(seed: int) -> None:
    """Within what the two that are left can carry: whoever comes 60 ms after the loss, or before it, is answered."""
    world = World(model_of(), executors=4, check=False)
    numbers = world.arrive(*gamma_arrivals(seed, 900, 1, 2.0, slo(60)))
    for executor in (0, 1):
        world.at(SECOND, lambda executor=executor: world.lose(executor, 10 * SECOND))  # type: ignore[misc]
    world.run()
    calm = [n for n in numbers if not SECOND - 60 * MS < world.arrivals[n].at_ns < SECOND + 60 * MS]
    assert {world.outcome(number) for number in calm} == {Outcome.OK}


def test_an_executor_that_comes_back_is_used_again() -> None:
    """After its return the batches are shared as before."""
    world = World(model_of(), executors=2)
    world.arrive(*[Arrival(at * 2 * MS, slo(60)) for at in range(500)])
    world.at(200 * MS, lambda: world.lose(0, 300 * MS))
    world.run()
    away = [batch for batch in world.batches if 200 * MS <= batch.at_ns < 500 * MS]
    back = [batch for batch in world.batches if batch.at_ns >= 500 * MS]
    assert {batch.executor for batch in away} == {1}
    assert {batch.executor for batch in back} == {0, 1}


def stuck_on(executor: int, taken_ns: int) -> World:
    """Two executors, of which the first batch on one takes so long; everything else goes as profiled."""
    stuck: list[Run] = []

    def service(run: Run, profiled_ns: int) -> int:
        if run.executor == executor and not stuck:
            stuck.append(run)
            return taken_ns
        return profiled_ns

    return World(model_of(), executors=2, service=service)


def test_what_a_stuck_executor_took_along_is_answered_by_the_others() -> None:
    """Far overdue, it is given up on: its request runs again elsewhere and is in time, long before it is done."""
    world = stuck_on(0, 10 * SECOND)
    number = world.arrive(Arrival(0, slo(600)))[0]
    others = world.arrive(*[Arrival(SECOND + at * 20 * MS, slo(60)) for at in range(50)])
    world.run()
    assert world.outcome(number) is Outcome.OK
    assert [batch.executor for batch in world.batches[:2]] == [0, 1]
    assert {world.outcome(other) for other in others} == {Outcome.OK}
    assert {batch.executor for batch in world.batches[1:]} == {1}


def test_a_pinned_request_is_tried_on_another_executor_when_its_own_is_stuck() -> None:
    """The executor is to blame and not the variant, so the pin is no reason to wait for it."""
    world = stuck_on(0, SECOND)
    number = world.arrive(Arrival(0, slo(600, variant=REFERENCE)))[0]
    world.run()
    assert (world.outcome(number), world.ended[number].variant) == (Outcome.OK, REFERENCE)
    assert [batch.executor for batch in world.batches] == [0, 1]


def test_who_waits_for_a_stuck_executor_in_vain_ends_at_the_deadline() -> None:
    """Too late to be tried elsewhere, it is told when its time is over, and not when the executor comes back."""
    world = stuck_on(0, SECOND)
    number = world.arrive(Arrival(0, slo(255, variant=REFERENCE)))[0]
    world.run()
    assert (world.outcome(number), world.ended[number].at_ns) == (Outcome.EXPIRED, 255 * MS + 1)


@pytest.mark.parametrize("latency_ms", [200, 255])
@pytest.mark.parametrize("on_infeasible", [(LATE,), (DEGRADE, LATE), (LATE, REJECT)])
def test_who_may_be_late_is_answered_late_by_another_executor(
    on_infeasible: tuple[OnInfeasible, ...], latency_ms: int
) -> None:
    """Over or too near, its deadline is no reason to wait an hour for the stuck one while another idles."""
    world = stuck_on(0, 3600 * SECOND)
    number = world.arrive(Arrival(0, slo(latency_ms, None, *on_infeasible, variant=REFERENCE)))[0]
    world.run(until_ns=SECOND)
    assert world.outcome(number) is Outcome.LATE
    assert [batch.executor for batch in world.batches] == [0, 1]


def test_late_that_comes_after_reject_is_not_asked_for_when_an_executor_is_stuck_either() -> None:
    """It ends like one that says `reject` alone."""
    world = stuck_on(0, 3600 * SECOND)
    plain, longer = world.arrive(*[Arrival(0, slo(200, None, *asked)) for asked in ((REJECT,), (REJECT, LATE))])
    world.run(until_ns=SECOND)
    assert world.outcome(longer) is world.outcome(plain) is Outcome.EXPIRED


def test_who_finds_no_room_for_late_work_ends_at_the_deadline() -> None:
    """It may be late, but as much late work waits as may: there it cannot wait, and for the executor not for ever."""
    asked = slo(255, None, LATE, variant=REFERENCE)
    scheduler, (request,), _ = started(2, model_of(), Arrival(0, asked))
    half = ask(scheduler.models[request.model], Arrival(0, slo(1, None, LATE), size_bytes=1 << 19), 1)
    assert scheduler.arrived(half, 0) == []
    assert scheduler.tick(251 * MS) == []
    assert request.queue is None
    assert scheduler.next_event_ns(251 * MS) == 255 * MS + 1
    assert [(end.request, end.outcome) for end in scheduler.tick(255 * MS + 1)] == [(request, Outcome.EXPIRED)]


def stuck_twice(asked: Slo) -> tuple[Scheduler, Request, Run, Run]:
    """A request that both executors got stuck on, one after the other, and its second and first run."""
    scheduler, (request,), first = started(2, model_of(variant(REFERENCE, 0.9, 4, 2)), Arrival(0, asked))
    assert scheduler.tick(260 * MS) == []
    run, _ = scheduler.decide(1, 260 * MS)
    assert run is not None
    assert scheduler.tick(600 * MS) == []
    assert request.queue is None
    assert not request.late  # it may yet be in time
    return scheduler, request, run, first


@pytest.mark.parametrize("asked", [Slo(), slo(1000, None, LATE)], ids=["named no latency", "asked for late"])
def test_who_may_be_late_waits_for_the_second_stuck_executor_as_long_as_it_takes(asked: Slo) -> None:
    """Nobody else is to answer it any more, and a late answer will do: the deadline is no reason to end it."""
    scheduler, request, run, _ = stuck_twice(asked)
    assert scheduler.tick(SECOND + 1) == []
    assert request.late
    assert scheduler.next_event_ns(SECOND + 1) is None
    assert list(scheduler.finished(run, 5 * SECOND, 4 * SECOND)) == [request]


def test_of_two_stuck_executors_the_first_to_come_back_answers() -> None:
    """It need not be the one that is waited for; the other's answer comes to nothing then."""
    scheduler, request, second, first = stuck_twice(slo(1000))
    assert list(scheduler.finished(first, 700 * MS, 700 * MS)) == [request]
    assert list(scheduler.finished(second, 800 * MS, 540 * MS)) == []
    assert scheduler.tick(2 * SECOND) == []


def test_who_did_not_ask_for_late_does_not_wait_for_the_second_stuck_executor_either() -> None:
    """It ends at its deadline."""
    scheduler, request, *_ = stuck_twice(slo(1000))
    assert scheduler.tick(SECOND) == []
    assert [(end.request, end.outcome) for end in scheduler.tick(SECOND + 1)] == [(request, Outcome.EXPIRED)]


@pytest.mark.parametrize("gone_ns", [700 * MS, SECOND + 2], ids=["in time", "late"])
def test_whose_client_goes_before_the_second_stuck_executor_is_back_ends_at_once(gone_ns: int) -> None:
    """Whether it is late already or not, it is not kept."""
    scheduler, request, *_ = stuck_twice(slo(1000, None, LATE))
    assert scheduler.tick(gone_ns - 1) == []
    assert not scheduler.cancelled(request)
    assert [end.request for end in scheduler.tick(gone_ns)] == [request]


def test_whose_client_has_gone_nobody_waits_for_a_stuck_executor() -> None:
    """It ends when the executor is given up on, or when its client goes after that, although it might be late."""
    asked = slo(200, None, LATE)
    scheduler, (early, late), _ = started(1, model_of(), *[Arrival(0, asked)] * 2)
    late.retried = late.late = True  # so nobody tries it again
    assert not scheduler.cancelled(early)
    assert [end.request for end in scheduler.tick(SECOND)] == [early]
    assert not scheduler.cancelled(late)
    assert [end.request for end in scheduler.tick(SECOND)] == [late]


def test_a_stuck_executor_that_fails_after_all_ends_only_who_waited_for_it() -> None:
    """The pinned request ends then; its batch-mate, which waits to be tried on another variant, is left alone."""
    pin, free = slo(600, variant=REFERENCE), slo(600)
    model = model_of()
    scheduler, (pinned, mate), run = started(1, model, Arrival(0, pin), Arrival(0, free))
    pinned.retried = True  # so nobody tries it again
    given_up_ns = 251 * MS + 10 * run.predicted_ns
    assert scheduler.tick(given_up_ns) == []
    assert list(model.regular) == [mate]
    ends = scheduler.failed(run, given_up_ns + MS, "incident")
    assert [(end.request, end.outcome) for end in ends] == [(pinned, Outcome.FAILED)]
    assert list(model.regular) == [mate]


def test_the_answer_of_a_stuck_executor_ends_those_who_still_wait_to_be_tried_again() -> None:
    """It comes before their second chance has begun, so it counts, and they do not run again."""
    model = model_of()
    scheduler, requests, run = started(1, model, *[Arrival(0, slo(900))] * 2)
    given_up_ns = 251 * MS + 10 * run.predicted_ns
    assert scheduler.tick(given_up_ns) == []
    assert set(model.regular) == set(requests)
    assert set(scheduler.finished(run, given_up_ns + MS, given_up_ns)) == set(requests)
    assert (model.waiting, scheduler.pool.idle) == (0, True)


def test_who_waits_for_a_stuck_executor_fails_when_it_dies() -> None:
    """It was given up on first and reported dead later: whoever only it could answer is told so."""
    scheduler, (request,), _ = started(1, model_of(), Arrival(0, slo(260, variant=REFERENCE)))
    given_up_ns = 251 * MS
    assert scheduler.tick(given_up_ns) == []
    ends = scheduler.lost(0, given_up_ns + MS, "incident")
    assert [(end.request, end.outcome) for end in ends] == [(request, Outcome.FAILED)]


@pytest.mark.parametrize("event", ["failed", "lost", "stuck"])
def test_a_bug_that_strikes_while_a_batch_is_tried_again_costs_nobody_the_end(event: str) -> None:
    """Who was seen to before it waits or has ended; the struck one and those behind it end with what comes next."""
    scheduler, requests, run = started(2, model_of(), *[Arrival(0, slo(900))] * 4)
    final, again, struck, behind = requests
    final.retried = True  # so nobody tries it again
    struck.samples = None  # type: ignore[assignment]
    strike = {
        "failed": lambda: scheduler.failed(run, MS, "incident"),
        "lost": lambda: scheduler.lost(0, MS, "incident"),
        "stuck": lambda: scheduler.tick(251 * MS + 10 * run.predicted_ns),
    }
    with pytest.raises(TypeError):
        strike[event]()
    ends = scheduler.lost(0, SECOND // 2, "incident") if event == "stuck" else scheduler.tick(MS)
    assert [(end.request, end.outcome) for end in ends] == [(each, Outcome.FAILED) for each in (final, struck, behind)]
    assert list(scheduler.models[run.model].regular) == [again]


def test_who_could_only_be_tried_again_on_the_lost_executor_waits_for_it() -> None:
    """The fast executor seems stuck and the other is too slow: the request is not dropped, its answer counts."""
    model = model_of(variant("fp32", 0.9, 10, 0, sizes=(1,)), variant("amp", 0.9, 10, 0, sizes=(1,)))
    scheduler, (request,), run = started(2, model, Arrival(0, slo(300)))
    for _ in range(5):
        scheduler.pool.observe(Run(1, model.key, "fp32", 0, (), 1, 1, "", 0, 0, run.slowdown), 8.0, 200 * MS)
    given_up_ns = 250 * MS + 1
    assert scheduler.arrived(ask(model, Arrival(given_up_ns - 1, slo(300)), 1), given_up_ns - 1) == []
    ends = [end for end in scheduler.tick(given_up_ns) if end.request is request]
    answered = scheduler.finished(run, given_up_ns + MS, given_up_ns)
    assert len(ends) + list(answered).count(request) == 1


def test_when_the_clock_jumps_ahead_the_hopeless_end_and_the_late_are_served() -> None:
    """After a host's minute of sleep every request that waits ends, and service goes on as before."""
    late = slo(60, None, LATE)
    world = World(model_of(), check=False)
    world.arrive(Arrival(0, slo(500)), *[Arrival(MS, slo(60))] * 3, *[Arrival(MS, late)] * 3)
    world.run(until_ns=MS)
    after = world.arrive(*[Arrival(60 * SECOND + at * 50 * MS, slo(60)) for at in range(10)])
    world.now_ns = 60 * SECOND - MS
    world.run()
    assert {world.outcome(number) for number in after} == {Outcome.OK}
    assert len(world.ended) == len(world.arrivals)
