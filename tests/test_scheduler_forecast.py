"""What a model's forecast is told: which requests are traffic and how much of it, and which of them missed."""

from __future__ import annotations

from dataclasses import replace
from itertools import count

import pytest
from scheduling_models import MS, Arrival, ask, model_of, slo, variant

from server.scheduling.admission import Defaults, make_request
from server.scheduling.model_queue import ModelQueue
from server.scheduling.scheduler import Scheduler
from server.scheduling.slo import OnInfeasible, Outcome, Slo
from variants.variant import LatencyProfile, State

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT
NUMBERS = count()


def serving(model: ModelQueue, max_requests: int = 100) -> Scheduler:
    """A scheduler of one executor for this model."""
    scheduler = Scheduler(1, max_requests=max_requests, max_bytes=10_000)
    scheduler.add_model(model)
    return scheduler


def outcomes(scheduler: Scheduler, model: ModelQueue, now_ns: int, *asked: Slo) -> list[Outcome | None]:
    """What becomes of requests that arrive now; None for those admitted."""
    found = []
    for each in asked:
        ends = scheduler.arrived(ask(model, Arrival(now_ns, each), next(NUMBERS)), now_ns)
        found.append(ends[-1].outcome if ends else None)
    return found


@pytest.mark.parametrize(("length", "weight"), [(100, 1), (400, 4)])
def test_a_long_input_counts_as_as_many_short_ones_as_take_its_time(length: int, weight: int) -> None:
    """Ten inputs that take four times as long each are forecast like forty that do not."""
    short, long = LatencyProfile((1, 8), (MS, 8 * MS)), LatencyProfile((1, 8), (4 * MS, 32 * MS))
    model = model_of(replace(variant("fp32", 0.9, 0, 1), profile=long, lengths=((100, short), (400, long))))
    scheduler, plain = serving(model), model_of()
    facts = {"samples": 1, "size_bytes": 1, "shape": length, "arrival_ns": 0, "length": length}
    for number in range(10):
        request = make_request(model, slo(500), Defaults(MS), number=number, **facts)
        assert scheduler.arrived(request, 0) == []
        plain.note_arrival(weight, 500 * MS, 0)
    assert model.forecast.rate(20 * MS) == pytest.approx(plain.forecast.rate(20 * MS), rel=0.05)


def test_what_can_never_be_admitted_is_no_traffic() -> None:
    """More bytes than may ever wait count for nothing; who only finds the queue full would have been work."""
    model = model_of()
    scheduler = serving(model, max_requests=1)
    for number in range(5):
        (end,) = scheduler.arrived(ask(model, Arrival(0, slo(500), size_bytes=10_001), number), 0)
        assert end.outcome is Outcome.REJECTED
    assert (model.forecast.rate(20 * MS), model.typical_budget_ns) == (0.0, 0.0)
    assert outcomes(scheduler, model, 20 * MS, *[slo(500)] * 2) == [None, Outcome.REJECTED]
    assert outcomes(serving(plain := model_of()), plain, 20 * MS, *[slo(500)] * 2) == [None, None]
    assert model.forecast.rate(40 * MS) == plain.forecast.rate(40 * MS) > 0.0


def test_a_request_that_misses_is_told_once_however_often_it_goes_on() -> None:
    """Widened first and made late then, it counts like one that expires."""
    spreads = []
    for asked in (slo(50, 0.913, REJECT), slo(50, 0.913, DEGRADE, LATE, hard=False)):
        model = model_of()
        scheduler = serving(model)
        assert outcomes(scheduler, model, 0, asked) == [None]
        scheduler.tick(50 * MS)
        assert not model.queues
        spreads.append(model.forecast.spread.value)
    assert spreads[0] == spreads[1] > model_of().forecast.spread.value


def test_who_ends_because_its_variants_were_disabled_did_not_miss() -> None:
    """No caution could have saved it."""
    model = model_of()
    scheduler = serving(model)
    assert outcomes(scheduler, model, 0, slo(500, 0.913)) == [None]
    scheduler.set_states(model.key, {**model.states, "fp32": State.DISABLED})
    assert [end.outcome for end in scheduler.tick(MS)] == [Outcome.INFEASIBLE]
    assert model.forecast.spread.value == model_of().forecast.spread.value


def test_who_is_refused_as_too_late_missed() -> None:
    """Unlike late work that finds no room, and whoever finds the queue full, which is the operator's bound."""
    model = model_of(variant("fp32", 0.9, 50, 0))
    scheduler = serving(model, max_requests=3)
    calm = model.forecast.spread.value
    assert outcomes(scheduler, model, 0, slo(100)) == [None]
    assert scheduler.decide(0, 0)[0]
    assert outcomes(scheduler, model, MS, *[slo(60, None, LATE)] * 2) == [None, Outcome.REJECTED]
    assert model.forecast.spread.value == calm
    assert outcomes(scheduler, model, MS, slo(60)) == [Outcome.REJECTED]
    missed = model.forecast.spread.value
    assert missed > calm
    assert outcomes(scheduler, model, MS, *[slo(500)] * 3) == [None, None, Outcome.REJECTED]
    assert calm < model.forecast.spread.value <= missed
