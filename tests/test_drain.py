"""The drain test on hand-made backlogs; `choose` tests what FitDrain makes of it."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, model_of, queue_up, slo, variant

from server.scheduling.drain import left_behind, lost, shortage
from server.scheduling.forecast import ArrivalForecast
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policy import Moment

ONE = variant("fp32", 0.9, 9, 1, sizes=(1, 2, 4, 8))


def lone(*arrivals: Arrival) -> ModelQueue:
    """One variant of 9 + n ms, and these requests."""
    model = model_of(ONE)
    queue_up(model, *arrivals)
    return model


def test_nobody_left_is_nobody_late() -> None:
    """An empty queue drains whenever the executor comes back."""
    assert shortage(left_behind(lone(), Moment(0, 0)), 10**12) == (0, 0)


def test_one_left_behind_is_late_by_what_is_missing() -> None:
    """A request that could start only when the executor is free, and then runs alone."""
    model = lone(Arrival(0, slo(30)))
    run_ns = model.latency.crowded_ns(0, 1)
    free_ns = 30 * MS - REPLY_RESERVE_NS - run_ns
    assert shortage(left_behind(model, Moment(0, 0)), free_ns) == (0, 0)
    assert shortage(left_behind(model, Moment(0, 0)), free_ns + 7) == (7, 0)


def test_another_executor_that_is_free_in_time_takes_it() -> None:
    """What the deciding executor cannot do in time, an idle one can."""
    model = lone(Arrival(0, slo(30)))
    assert shortage(left_behind(model, Moment(0, 0, [0])), 10**12) == (0, 0)


def test_those_taken_do_not_count() -> None:
    """A batch that takes all leaves nobody."""
    model = lone(*[Arrival(0, slo(30))] * 3)
    taken = [entry[2] for queue in model.queues.values() for entry in queue.entries]
    assert shortage(left_behind(model, Moment(0, 0), taken), 10**12).waiting_ns == 0
    assert shortage(left_behind(model, Moment(0, 0), taken[:2]), 10**12).waiting_ns > 0


def test_a_tight_request_before_patient_ones_runs_in_a_batch_that_fits_it() -> None:
    """A full batch would be too long for the first; a small one saves it, and the others still have time."""
    model = lone(Arrival(0, slo(13.5)), *[Arrival(0, slo(500))] * 40)
    assert shortage(left_behind(model, Moment(0, 0)), 0) == (0, 0)


def test_a_backlog_beyond_what_is_tested_one_by_one_counts_as_a_fluid() -> None:
    """A thousand requests with a second each cannot drain on one executor; with a hundred seconds they can."""
    assert shortage(left_behind(lone(*[Arrival(0, slo(1000))] * 1000), Moment(0, 0)), 0).waiting_ns > 0
    assert shortage(left_behind(lone(*[Arrival(0, slo(100_000))] * 1000), Moment(0, 0)), 0) == (0, 0)


def test_the_weight_of_those_who_would_be_late_is_what_a_batch_loses() -> None:
    """Who is late is left out, and the others are played on without them."""
    model = lone(Arrival(0, slo(15)), Arrival(0, slo(30)), Arrival(0, slo(100)), Arrival(0, slo(101)))
    waiting = left_behind(model, Moment(0, 0))
    assert lost(waiting, 0, 9.0) == 0.0
    assert lost(waiting, 10 * MS, 9.0) == 1.0
    assert lost(waiting, 70 * MS, 9.0) == 2.0
    assert lost(waiting, 700 * MS, 9.0) == 4.0
    assert lost(waiting, 700 * MS, 2.0) == 3.0
    model.regular.first().weight = 0.25
    assert lost(waiting, 10 * MS, 9.0) == 0.25
    first = [model.regular.first()]
    assert lost(waiting.without(first), 10 * MS, 9.0) == 0.0


def test_the_most_urgent_request_of_another_model_counts() -> None:
    """An executor that is kept too long makes the other model's request late."""
    rival = lone(Arrival(0, slo(40)))
    needed_ns = rival.latency.predict_ns(0, 1) + REPLY_RESERVE_NS
    moment = Moment(0, 0, (), [rival])
    assert shortage(left_behind(model_of(ONE), moment), 40 * MS - needed_ns) == (0, 0)
    assert shortage(left_behind(model_of(ONE), moment), 40 * MS - needed_ns + 1) == (1, 0)


class Asked(ArrivalForecast):
    """A forecast of so many samples, whatever is asked, that takes note of the load."""

    def __init__(self, samples: float) -> None:
        super().__init__()
        self.samples, self.loads = samples, list[float]()

    def rate(self, now_ns: int) -> float:
        """Fifty samples a second."""
        return 50.0

    def expected(self, duration_ns: int, now_ns: int, load: float = 0.0) -> float:
        """Always as many."""
        self.loads.append(load)
        return self.samples


def test_the_forecast_is_asked_for_the_load_of_this_host() -> None:
    """The share of two executors' time that the arrivals take at least."""
    model = lone(Arrival(0, slo(60)))
    model.forecast = asked = Asked(1.0)
    shortage(left_behind(model, Moment(0, 0, [0])), 10 * MS)
    assert asked.loads == [pytest.approx(50 * model.least_cost_ns() / 1e9 / 2)]
    assert asked.loads[0] > 0.05


def test_an_urgent_request_of_another_model_takes_time_from_those_to_come() -> None:
    """What is due before a newcomer would be is work like one's own."""
    rival = lone(Arrival(0, slo(50)))
    mine = lone(Arrival(0, slo(60)))
    mine.forecast = Asked(1000.0)
    taken = [mine.regular.first()]
    alone = shortage(left_behind(mine, Moment(0, 0), taken), 10 * MS).arriving_ns
    beside = shortage(left_behind(mine, Moment(0, 0, (), [rival]), taken), 10 * MS).arriving_ns
    assert beside - alone == rival.latency.predict_ns(0, 1)


def test_a_patient_request_of_another_model_waits_behind_more_urgent_ones() -> None:
    """What another model has a minute for makes nobody here late, whoever waits here or is about to come."""
    rival = model_of(variant("fp32", 0.9, 149, 1))
    queue_up(rival, Arrival(0, slo(60_000)))
    mine = lone(Arrival(0, slo(60)), Arrival(0, slo(60)))
    assert shortage(left_behind(mine, Moment(0, 0, (), [rival])), 10 * MS) == (0, 0)
