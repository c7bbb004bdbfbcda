"""Each published policy's own rule, on queues made by hand."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import pytest
from scheduling_models import MS, Arrival, model_of, queue_up, slo, variant

from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies import policy_factory
from server.scheduling.policies.clipper import Clipper
from server.scheduling.policies.load import WindowedLoad
from server.scheduling.policies.model_switching import tail_ns
from server.scheduling.policies.proteus_plan import Demand, make_plan
from server.scheduling.policy import Choice, Decision, Moment, Policy, Run

FP32, AMP, INT8, PRUNED, DISTILLED = range(5)
EVERY = 0b11111


def within(latency_ms: float, at_ms: float = 0, floor: float | None = None, **facts: object) -> Arrival:
    """A request that must be answered within so many milliseconds of its arrival."""
    return Arrival(int(at_ms * MS), slo(latency_ms, floor), **facts)  # type: ignore[arg-type]


def asked(
    name: str, *arrivals: Arrival, now_ms: float = 0, others: int = 0, model: ModelQueue | None = None
) -> Decision:
    """What a fresh policy decides for these requests where 60 ms are usual, beside so many others that are free."""
    model = model or model_of()
    model.note_arrival(1, 60 * MS, 0)
    policy = policy_factory(name)()
    for request in queue_up(model, *arrivals):
        policy.arrived(model, request, request.arrival_ns)
    return policy.decide(model, moment(now_ms, others))


def moment(now_ms: float, others: int = 0, executor: int = 0) -> Moment:
    """An idle executor beside so many others that are free."""
    return Moment(int(now_ms * MS), executor, [int(now_ms * MS)] * others)


def batch(decision: Decision) -> tuple[int, list[int]]:
    """Variant and members of the batch that was chosen."""
    assert decision.choice is not None
    return decision.choice.variant, [request.number for request in decision.choice.requests]


def given_up(decision: Decision) -> list[int]:
    """Who was given up."""
    return [request.number for request in decision.give_up]


def ran(choice: Choice, model: ModelQueue) -> Run:
    """The batch as it ran."""
    name = model.variants[choice.variant].name
    return Run(0, model.key, name, choice.variant, choice.requests, choice.samples, choice.predicted_ns, "", 0, 0, 1)


def finish(policy: Policy, model: ModelQueue, now_ms: float, took_ms: float) -> None:
    """Let the policy decide, and tell it how long its batch took."""
    choice = policy.decide(model, moment(now_ms)).choice
    assert choice is not None
    policy.finished(model, ran(choice, model), int(took_ms * MS), int((now_ms + took_ms) * MS))


def load_of(policy: Policy, model: ModelQueue, rate: float, seconds: float = 1.05, budget_ms: float = 60) -> None:
    """Let a policy see a steady stream that ends now."""
    for place in range(int(rate * seconds)):
        at_ns = int(place / rate * 1e9)
        (request,) = queue_up(model, within(budget_ms, at_ns / MS))
        policy.arrived(model, request, at_ns)
        model.remove(request)


def test_fixed_takes_the_largest_batch_that_the_head_has_time_for() -> None:
    """Of ten waiting with 30 ms, fp32 runs as many as it finishes in 30 ms."""
    model = model_of()
    variant, members = batch(asked("fixed-fp32", *[within(30)] * 10, model=model))
    size = len(members)
    assert (variant, members) == (FP32, list(range(size)))
    latest = 30 * MS - REPLY_RESERVE_NS
    assert model.latency.predict_ns(FP32, size) <= latest < model.latency.predict_ns(FP32, size + 1)


def test_fixed_gives_up_who_is_late_even_alone_and_whoever_may_not_run_on_it() -> None:
    """They would block the queue; who behind them can be served is."""
    decision = asked("fixed-distilled", within(2), within(50, floor=0.9), within(60))
    assert (batch(decision), given_up(decision)) == ((DISTILLED, [2]), [0, 1])


def test_batches_are_of_one_shape_the_most_urgent_first() -> None:
    """Two shapes wait in turn: the batch holds the first one's requests."""
    shapes: list[Hashable] = [(9,), (8,), (9,), (8,)]
    for name in ("fixed-fp32", "clockwork-fp32", "slackfit", "proteus-1s"):
        arrivals = [within(13.0 + place, shape=shape) for place, shape in enumerate(shapes)]
        assert set(batch(asked(name, *arrivals))[1]) <= {0, 2}


def test_fastest_is_the_variant_of_the_highest_throughput() -> None:
    """It is looked up on the model."""
    assert batch(asked("fixed-fastest", within(60)))[0] == DISTILLED


def test_early_drop_gives_up_the_head_that_would_shrink_the_batch() -> None:
    """With 16 behind it, a head that has time for four is given up and the batch keeps its size; without, it runs."""
    arrivals = [within(6), *[within(60)] * 16]
    kept, dropped = asked("fixed-fastest", *arrivals), asked("fixed-fastest+ed", *arrivals)
    assert (batch(kept)[1][0], len(batch(kept)[1]), given_up(kept)) == (0, 4, [])
    assert (batch(dropped), given_up(dropped)) == ((DISTILLED, list(range(1, 17))), [0])


def test_early_drop_keeps_the_batch_that_the_queue_can_fill() -> None:
    """The same head is served when too few wait behind it to make it late."""
    decision = asked("fixed-fastest+ed", within(6), within(60))
    assert (batch(decision)[1], given_up(decision)) == ([0, 1], [])


def test_early_drop_gives_up_mates_who_would_be_late_in_the_batch() -> None:
    """A request behind the head by priority, but with less time, is given up for the batch."""
    arrivals = [Arrival(0, slo(60, priority=1)), Arrival(0, slo(12, priority=8)), *[within(60)] * 15]
    decision = asked("nexus-pruned", *arrivals)
    assert given_up(decision) == [1]
    assert 1 not in batch(decision)[1]


def test_nexus_batches_cost_at_most_half_of_the_deadline() -> None:
    """With 60 ms each and much time left, int8 runs the largest batch that takes 30 ms, however many wait."""
    model = model_of()
    _, members = batch(asked("nexus-int8-static", *[within(60)] * 40, model=model))
    assert model.latency.predict_ns(INT8, len(members)) <= 30 * MS < model.latency.predict_ns(INT8, len(members) + 1)


def test_clipper_adds_one_after_a_full_batch_and_takes_off_a_tenth_after_a_slow_one() -> None:
    """Batches grow one by one while they are quick enough, then shrink by 10 %."""
    model, policy = model_of(), policy_factory("clipper-distilled")()
    queue_up(model, *[within(60)] * 40)
    for expected in range(1, 11):
        assert len(batch(policy.decide(model, moment(0)))[1]) == expected
        finish(policy, model, 0, 10)
    finish(policy, model, 0, 61)
    assert len(batch(policy.decide(model, moment(0)))[1]) == 9


def test_clipper_does_not_grow_on_batches_that_were_not_full() -> None:
    """A short queue says nothing about larger batches."""
    model, rule = model_of(), Clipper("distilled")
    (request,) = queue_up(model, within(60))
    for samples in (1, 1, 1):
        choice = Choice(DISTILLED, (request,), samples, 0, "")
        rule.finished(model, ran(choice, model), MS)
    assert rule.size(16, 16) == (2, 2)


def test_clockwork_leaves_out_who_would_be_late_in_the_larger_batch() -> None:
    """The largest batch that can be filled in time runs; who has left its queue stays for a smaller one."""
    decision = asked("clockwork-distilled", within(6), *[within(60)] * 16)
    assert (batch(decision), given_up(decision)) == ((DISTILLED, list(range(1, 17))), [])
    assert given_up(asked("clockwork-distilled+ed", within(6), *[within(60)] * 16)) == [0]


def test_clockwork_runs_only_supported_sizes() -> None:
    """Seven that wait make a batch of four."""
    assert len(batch(asked("clockwork-distilled", *[within(60)] * 7))[1]) == 4


def test_clockwork_believes_the_slowest_of_the_last_ten_for_a_second() -> None:
    """A batch of one that took 50 ms keeps requests with 40 ms out, until it is forgotten."""
    model, policy = model_of(), policy_factory("clockwork-distilled")()
    queue_up(model, within(5000))
    finish(policy, model, 0, 50)
    model.remove(model.queues[EVERY, (8, 8)].first())
    queue_up(model, within(40, at_ms=100))
    assert given_up(policy.decide(model, moment(100))) == [0]
    model.remove(model.queues[EVERY, (8, 8)].first())
    queue_up(model, within(40, at_ms=1100))
    assert batch(policy.decide(model, moment(1100))) == (DISTILLED, [0])


def test_a_window_measures_the_last_full_one() -> None:
    """The rate of a window is known at its end and holds until the next one's; an empty window counts."""
    load = WindowedLoad(1000 * MS)
    assert [load.arrived(1, at * MS) for at in range(0, 2000, 10)].count(True) == 1
    assert load.rate == pytest.approx(100)
    assert load.arrived(1, 2000 * MS)
    assert load.rate == pytest.approx(100)
    assert load.arrived(1, 4500 * MS)
    assert load.rate == 0.0


def test_tails_grow_with_the_load_to_infinity() -> None:
    """A variant's tail latency rises with the load, and there is none beyond what it can carry."""
    model = model_of()
    tails = [tail_ns(model, INT8, rate, 2) for rate in (0, 400, 800, 900)]
    assert tails == sorted(tails)
    assert tails[0] == pytest.approx(2 * 5.8 * MS)  # a request under way, then its own
    assert tail_ns(model, INT8, 1100, 2) == float("inf")
    assert tail_ns(model, INT8, 900, 4) < tails[-1]


@pytest.mark.parametrize(("rate", "chosen"), [(50, FP32), (400, AMP), (700, INT8), (900, PRUNED), (1600, DISTILLED)])
def test_model_switching_takes_the_most_accurate_variant_for_the_load(rate: float, chosen: int) -> None:
    """The higher the load of the last window, the faster the one variant; on two executors and 60 ms."""
    model, policy = model_of(), policy_factory("model-switching-1s")()
    load_of(policy, model, rate)
    queue_up(model, within(60, at_ms=1050))
    assert batch(policy.decide(model, moment(1050, others=1)))[0] == chosen


def test_model_switching_does_not_look_at_the_queue() -> None:
    """A burst after a quiet window is served with the quiet window's variant."""
    model, policy = model_of(), policy_factory("model-switching-1s")()
    load_of(policy, model, 50)
    for request in queue_up(model, *[within(60, at_ms=1050)] * 100):
        policy.arrived(model, request, 1050 * MS)
    assert batch(policy.decide(model, moment(1050, others=1)))[0] == FP32


def test_infaas_takes_the_slowest_variant_that_meets_the_slo() -> None:
    """Without load, the budget on arrival and the floor decide."""
    for latency_ms, floor, chosen in [(60, None, FP32), (10, None, AMP), (6.6, None, PRUNED), (60, 0.905, FP32)]:
        assert batch(asked("infaas", within(latency_ms, floor=floor)))[0] == chosen


def test_infaas_passes_over_variants_that_could_not_carry_the_load() -> None:
    """At 600 per second on two executors neither fp32 nor amp could; beyond every variant the fastest is taken."""
    for rate, chosen in [(600, INT8), (3000, DISTILLED)]:
        model, policy = model_of(), policy_factory("infaas")()
        load_of(policy, model, rate)
        queue_up(model, within(60, at_ms=1050))
        assert batch(policy.decide(model, moment(1050, others=1)))[0] == chosen


def test_slackfit_takes_the_largest_batch_of_the_bucket_below_the_slack() -> None:
    """The slack alone decides: with 20 ms it is distilled in a batch of 16 for one as for forty; with 70 ms fp32."""
    assert batch(asked("slackfit", within(20))) == (DISTILLED, [0])
    assert batch(asked("slackfit", *[within(20)] * 40)) == (DISTILLED, list(range(16)))
    assert batch(asked("slackfit", *[within(70)] * 40))[0] == FP32


def test_slackfit_falls_into_the_slack_trap_and_early_drop_gets_it_out() -> None:
    """With little slack literal SlackFit runs few of many that wait; with early drop it gives up the head for them."""
    arrivals = [within(6), *[within(60)] * 30]
    assert len(batch(asked("slackfit", *arrivals))[1]) <= 4
    dropped = asked("slackfit+ed", *arrivals)
    assert given_up(dropped) == [0]
    assert len(batch(dropped)[1]) > 8


def test_slackfit_q_gives_a_short_queue_a_more_accurate_variant() -> None:
    """One request with 20 ms gets fp32 where only what the queue can fill counts."""
    assert batch(asked("slackfit", within(20)))[0] == DISTILLED
    assert batch(asked("slackfit-q", within(20)))[0] == FP32


def test_maxbatch_takes_size_first_and_maxacc_accuracy() -> None:
    """Four that wait with 16 ms: the most accurate that runs all of them, or the most accurate at all."""
    arrivals = [within(16)] * 4
    assert batch(asked("maxbatch", *arrivals)) == (INT8, [0, 1, 2, 3])
    assert batch(asked("maxacc", *arrivals)) == (FP32, [0])


def plan_of(demand: Demand, executors: int = 2) -> tuple[int, ...]:
    """The variants that are planned for a demand with 60 ms."""
    model = model_of()
    model.note_arrival(1, 60 * MS, 0)
    return make_plan(model, demand, executors).variants


def test_proteus_plans_the_most_accurate_assignment_that_carries_the_demand() -> None:
    """More demand, faster variants, mixed where that is more accurate; beyond all of them the fastest everywhere."""
    assert plan_of({}) == (FP32, FP32)
    assert plan_of({EVERY: 200}) == (FP32, FP32)
    assert plan_of({EVERY: 2500}) == plan_of({EVERY: 5000}) == (DISTILLED, DISTILLED)
    fast, slow = sorted(plan_of({EVERY: 1000}), reverse=True)
    assert fast > slow


def test_proteus_plans_for_floors() -> None:
    """A strict class has an executor that may serve it, whatever the rest demands."""
    model = model_of()
    model.note_arrival(1, 60 * MS, 0)
    plan = make_plan(model, {EVERY: 2000, 0b1: 20}, 2)
    assert plan.variants == (FP32, DISTILLED)
    requests = queue_up(model, *[within(60, floor=0.913), within(60)] * 50)
    served = [plan.variants[plan.executor(request)] for request in requests]
    assert set(served[::2]) == {FP32}
    assert served[1::2].count(DISTILLED) > 35


def test_proteus_keeps_capacity_for_the_strict() -> None:
    """Of an executor that only fills up with strict requests, everybody else gets what is left."""
    model = model_of()
    model.note_arrival(1, 60 * MS, 0)
    plan = make_plan(model, {EVERY: 800, 0b1: 100}, 2)
    assert plan.variants == (FP32, DISTILLED)
    assert 0.0 < plan.ends[EVERY][0] < 0.1  # fp32 carries 167 per second


def test_proteus_gives_up_whom_its_variant_cannot_serve_and_asks_again() -> None:
    """A request that the planned variant would make late is given up; degraded, it may come back at once."""
    decision = asked("proteus-1s", within(8))
    assert (decision.choice, given_up(decision), decision.wake_ns) == (None, [0], 1)


def test_proteus_spreads_requests_as_planned() -> None:
    """Two executors with the same variant get half of the requests each."""
    model = model_of()
    model.note_arrival(1, 60 * MS, 0)
    plan = make_plan(model, {EVERY: 100}, 2)
    assert plan.ends[EVERY] == pytest.approx((0.5, 1.0))
    shares = [plan.executor(request) for request in queue_up(model, *[within(60)] * 100)]
    assert 45 <= shares.count(0) <= 55


def test_proteus_waits_for_a_batch_to_fill_until_the_head_must_start() -> None:
    """An executor beside waiting work idles; it asks to be woken at the latest start and then runs what there is."""
    model, policy = model_of(), policy_factory("proteus-1s")()
    queue_up(model, *[within(60)] * 2)
    waiting = policy.decide(model, moment(0))
    latest_ns = 60 * MS - REPLY_RESERVE_NS - model.latency.predict_ns(FP32, 2)
    assert (waiting.choice, waiting.wake_ns) == (None, latest_ns)
    assert batch(policy.decide(model, Moment(latest_ns, 0))) == (FP32, [0, 1])


def test_proteus_runs_a_full_batch_at_once() -> None:
    """What fits half of the deadline is full."""
    model = model_of()
    chosen, members = batch(asked("proteus-1s", *[within(60)] * 20, model=model))
    assert (chosen, len(members)) == (FP32, model.throughput_batch(FP32))


def test_proteus_runs_without_the_newcomer_who_would_make_the_head_late() -> None:
    """At the head's latest start for two, a third that comes waits for the next batch."""
    model, policy = model_of(), policy_factory("proteus-1s")()
    queue_up(model, *[within(60)] * 2, within(100))
    latest_ns = 60 * MS - REPLY_RESERVE_NS - model.latency.predict_ns(FP32, 2)
    assert batch(policy.decide(model, Moment(latest_ns, 0))) == (FP32, [0, 1])


def test_proteus_runs_an_overdue_queue_as_it_stands_and_early_drop_drops_its_head() -> None:
    """Where the executor was busy too long, the head is late in the batch, or given up for it."""
    arrivals = [within(20), *[within(80)] * 3]
    overdue, dropped = asked("proteus-1s", *arrivals), asked("proteus-1s+ed", *arrivals)
    assert (batch(overdue)[1], given_up(overdue)) == ([0, 1, 2, 3], [])
    assert (dropped.choice, given_up(dropped)) == (None, [0])  # the others still have time to wait


def test_proteus_keeps_a_plan_for_its_period() -> None:
    """A demand that grew shows in the plan of the next second with a period of 1 s, and not yet with one of 10 s."""

    def variant_after(name: str) -> int:
        model, policy = model_of(), policy_factory(name)()
        load_of(policy, model, 50, 1.5)
        arrivals: Sequence[Arrival] = [within(60, at_ms=1500 + place) for place in range(1000)]
        for request in queue_up(model, *arrivals):
            policy.arrived(model, request, request.arrival_ns)
            if request.number < 980:
                model.remove(request)
        return batch(policy.decide(model, moment(2500)))[0]

    assert variant_after("proteus-10s") == FP32
    assert variant_after("proteus-1s") > FP32


@pytest.mark.parametrize("name", ["fixed-fp32+ed", "infaas", "slackfit", "maxbatch", "maxacc", "clockwork-fp32"])
def test_a_request_of_many_samples_is_one_member(name: str) -> None:
    """Samples and not requests fill a batch, and nobody who does not fit it joins."""
    model = model_of(variant("fp32", 0.913, 2, 1, sizes=(1, 2, 4, 8)))
    decision = asked(name, within(60, samples=6), within(61, samples=5), within(62, samples=2), model=model)
    assert batch(decision)[1] == [0, 2]
    assert decision.choice is not None
    assert decision.choice.samples == 8
