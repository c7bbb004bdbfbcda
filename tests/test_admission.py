from __future__ import annotations

import re
from dataclasses import replace

import pytest
from scheduling_models import MS, Arrival, ask, five_variants, queue_up, slo, variant

from server.errors import Infeasible, NotFound, Overloaded
from server.scheduling.admission import Defaults, Load, refusal
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.slo import ModelKey, OnInfeasible, Request, Slo
from variants.variant import Interval, State

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT
IDLE = Load(now_ns=0, free_ns=[0], others_backlog_ns=0, late_room=10**9)
BUSY = Load(now_ns=0, free_ns=[10_000 * MS], others_backlog_ns=0, late_room=10**9)


def model_of(**states: State) -> ModelQueue:
    """The five variants, some in another state."""
    model = ModelQueue(ModelKey("m", "1"), five_variants())
    model.set_states({**model.states, **states})
    return model


def names(model: ModelQueue, places: int) -> list[str]:
    """The variants of a bit set, best first."""
    return [variant.name for place, variant in enumerate(model.variants) if places >> place & 1]


def made(slo: Slo, defaults: Defaults | None = None, **facts: object) -> Request:
    """The request that an idle server makes of this SLO at instant 0."""
    return ask(model_of(), Arrival(0, slo, **facts), defaults=defaults)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("slo", "floor_class"),
    [
        (Slo(), ["fp32", "amp", "int8-static", "pruned", "distilled"]),
        (Slo(min_accuracy=0.0), ["fp32", "amp", "int8-static", "pruned", "distilled"]),
        (Slo(min_accuracy=0.9), ["fp32", "amp", "int8-static"]),
        (Slo(min_accuracy=0.905), ["fp32", "amp", "int8-static"]),
        (Slo(max_accuracy_drop=0.0), ["fp32"]),
        (Slo(max_accuracy_drop=0.0101), ["fp32", "amp", "int8-static"]),
        (Slo(min_accuracy=0.9, max_accuracy_drop=0.002), ["fp32", "amp"]),
        (Slo(min_accuracy=0.9, hard=False), ["fp32", "amp", "int8-static"]),
        (Slo(variant="pruned"), ["pruned"]),
        (Slo(variant="pruned", min_accuracy=0.999, max_accuracy_drop=0.0), ["pruned"]),
    ],
)
def test_the_floor_class_is_what_is_proven_to_satisfy_the_floor(slo: Slo, floor_class: list[str]) -> None:
    """Both bounds apply, a bound that is just met is met, and a pin makes the accuracy fields void."""
    assert names(model_of(), made(slo).allowed) == floor_class


@pytest.mark.parametrize("state", [state for state in State if state is not State.ELIGIBLE])
def test_only_eligible_variants_take_traffic_that_does_not_pin(state: State) -> None:
    """Whatever other state a variant is in, no floor class holds it."""
    model = model_of(amp=state)
    assert "amp" not in names(model, ask(model, Arrival(0)).allowed)


@pytest.mark.parametrize("state", [State.DOMINATED, State.UNVERIFIED, State.REJECTED, State.QUARANTINED])
def test_a_pin_reaches_a_variant_that_takes_no_other_traffic(state: State) -> None:
    """A client may ask for a measured variant by name though the server would not choose it."""
    model = model_of(pruned=state)
    request = ask(model, Arrival(0, Slo(variant="pruned", latency_ns=100 * MS)))
    assert names(model, request.allowed) == ["pruned"]
    assert refusal(model, request, IDLE) is None


def test_pinning_what_does_not_exist_is_not_found() -> None:
    """An unknown variant is NotFound, and the message names it."""
    with pytest.raises(NotFound, match="int4"):
        made(Slo(variant="int4"))


def test_pinning_a_disabled_variant_is_infeasible() -> None:
    """It exists, but nothing may run on it."""
    model = model_of(pruned=State.DISABLED)
    with pytest.raises(Infeasible, match=r"pruned .*disabled"):
        ask(model, Arrival(0, Slo(variant="pruned")))


def test_a_floor_that_no_variant_satisfies_is_infeasible_and_says_what_could_be_had() -> None:
    """The message lists variant, accuracy and latency of what is achievable."""
    with pytest.raises(Infeasible, match=r"fp32 \(accuracy 0\.9130, 11\.80 ms\)"):
        made(Slo(min_accuracy=0.99))


def test_a_soft_floor_that_no_variant_satisfies_degrades_if_it_may() -> None:
    """With `degrade`, the best that there is must do; without it the floor is as good as hard."""
    model = model_of()
    request = ask(model, Arrival(0, Slo(min_accuracy=0.99, hard=False, on_infeasible=(DEGRADE,))))
    assert refusal(model, request, IDLE) is None
    assert request.asked == 0
    assert request.allowed == model.eligible
    with pytest.raises(Infeasible):
        made(Slo(min_accuracy=0.99, hard=False, on_infeasible=(LATE, REJECT)))


@pytest.mark.parametrize(
    ("slo", "defaults", "expected"),
    [
        (Slo(), Defaults(MS), (DEGRADE, LATE)),
        (Slo(), Defaults(MS, on_infeasible=(REJECT,)), (DEGRADE, LATE)),
        (Slo(latency_ns=MS), Defaults(MS), (REJECT,)),
        (Slo(latency_ns=MS), Defaults(MS, on_infeasible=(LATE,)), (LATE,)),
        (Slo(latency_ns=MS, on_infeasible=(DEGRADE,)), Defaults(MS, on_infeasible=(LATE,)), (DEGRADE,)),
        (Slo(on_infeasible=(REJECT,)), Defaults(MS), (REJECT,)),
    ],
)
def test_what_to_do_when_infeasible_comes_from_the_request_then_the_model(
    slo: Slo, defaults: Defaults, expected: tuple[OnInfeasible, ...]
) -> None:
    """A request that names no latency is degraded or late; one that does takes its own word, the model's, or reject."""
    assert made(slo, defaults).on_infeasible == expected


def test_a_grpc_deadline_is_a_latency_that_was_named() -> None:
    """A request with only an rpc deadline is refused like any other that named its latency."""
    assert made(Slo(), rpc_deadline_ns=5 * MS).on_infeasible == (REJECT,)


@pytest.mark.parametrize(
    ("latency_ms", "rpc_deadline_ms", "deadline_ms"),
    [(None, None, 70), (40, None, 40), (None, 30, 30), (40, 30, 30), (40, 90, 40), (900, 90, 90)],
)
def test_the_smallest_of_all_deadlines_counts(
    latency_ms: int | None, rpc_deadline_ms: int | None, deadline_ms: int
) -> None:
    """SLO latency and gRPC deadline bound each other; the default counts only where neither is given."""
    slo = Slo(latency_ns=None if latency_ms is None else latency_ms * MS)
    rpc_deadline_ns = None if rpc_deadline_ms is None else rpc_deadline_ms * MS
    assert made(slo, Defaults(70 * MS), rpc_deadline_ns=rpc_deadline_ns).deadline_ns == deadline_ms * MS


def test_the_models_own_floor_is_soft() -> None:
    """A request that names no floor takes the model's, and may be degraded below it since nobody asked for it."""
    request = made(Slo(), Defaults(MS, max_accuracy_drop=0.002))
    assert names(model_of(), request.allowed) == ["fp32", "amp"]
    assert request.fallback


def test_the_models_own_floor_is_hard_for_who_says_so() -> None:
    """`slo_floor=hard` counts also where the floor itself is the model's."""
    request = made(Slo(hard=True, on_infeasible=(DEGRADE,)), Defaults(1000 * MS, max_accuracy_drop=0.002))
    assert request.fallback == 0


def test_naming_any_floor_replaces_the_models_whole_floor() -> None:
    """A request's own minimum is not combined with the model's maximum drop, and is hard."""
    request = made(Slo(min_accuracy=0.89), Defaults(MS, max_accuracy_drop=0.002))
    assert names(model_of(), request.allowed) == ["fp32", "amp", "int8-static", "pruned"]
    assert request.fallback == 0


@pytest.mark.parametrize(("priority", "share"), [(1, 0.5), (0, 1.0), (2, 1.0), (3, 1.5), (8, 4.0), (2**40, 4.0)])
def test_priority_moves_the_place_in_the_queue_by_a_share_of_the_budget(priority: int, share: float) -> None:
    """The place is fixed at arrival and lies in the future by that share, so whatever waits is overtaken ever less."""
    model = model_of()
    request = ask(model, Arrival(7 * MS, Slo(latency_ns=100 * MS, priority=priority)))
    run_ns = model.latency.idle_ns(model.fastest(request.allowed) or 0, 1)
    assert request.order_ns == 7 * MS + int(share * 100 * MS) - run_ns


def test_of_equal_deadlines_the_slower_run_is_ahead() -> None:
    """The place is the latest start: a floor that only a slow variant meets, or more samples, must start earlier."""
    model, slo = model_of(), Slo(latency_ns=100 * MS)
    plain, large = ask(model, Arrival(0, slo)), ask(model, Arrival(0, slo, samples=8))
    strict = ask(model, Arrival(0, replace(slo, min_accuracy=0.913)))
    assert plain.order_ns - strict.order_ns == model.latency.idle_ns(0, 1) - model.latency.idle_ns(4, 1)
    assert plain.order_ns - large.order_ns == model.latency.idle_ns(4, 8) - model.latency.idle_ns(4, 1)
    degraded = ask(
        model, Arrival(0, replace(slo, min_accuracy=0.99, hard=False, on_infeasible=(OnInfeasible.DEGRADE,)))
    )
    assert degraded.order_ns == plain.order_ns


def test_a_request_too_large_for_the_floor_it_asked_for_is_placed_by_what_can_run_it() -> None:
    """Only the variant below its soft floor was measured at so many samples."""
    variants = variant("fp32", 0.913, 6, 4, sizes=(1, 2)), variant("int8-static", 0.9, 4, 1.8)
    model = ModelQueue(ModelKey("m", "1"), variants)
    soft = Slo(latency_ns=100 * MS, min_accuracy=0.913, hard=False, on_infeasible=(OnInfeasible.DEGRADE,))
    placed = [ask(model, Arrival(0, each, samples=8)).order_ns for each in (soft, replace(soft, min_accuracy=0.9))]
    assert placed == [100 * MS - model.latency.idle_ns(1, 8)] * 2


def test_an_slo_no_variant_meets_even_when_idle_is_infeasible() -> None:
    """The message names what it would take, on an idle server as on a busy one."""
    for load in (IDLE, BUSY):
        model = model_of()
        error = refusal(model, ask(model, Arrival(0, Slo(latency_ns=2 * MS))), load)
        assert isinstance(error, Infeasible)
        assert "even when idle" in str(error)


def test_an_slo_that_only_the_queue_prevents_is_overload_with_when_to_try_again() -> None:
    """The retry hint is by how much this request would be late."""
    model = model_of()
    error = refusal(model, ask(model, Arrival(0, Slo(latency_ns=100 * MS))), BUSY)
    assert isinstance(error, Overloaded)
    quickest_ns = model.quickest_ns(model.eligible, 1)
    assert quickest_ns is not None
    assert error.retry_after_ns == 10_000 * MS + quickest_ns + REPLY_RESERVE_NS - 100 * MS


def test_an_idle_server_is_never_too_busy() -> None:
    """However tight the SLO, at rest it is met or can never be met: a client is not sent to try again for ever."""
    model = model_of()
    for budget_ns in range(REPLY_RESERVE_NS, 15 * MS, MS // 50):
        for floor in (0.0, 0.9, 0.913):
            error = refusal(model, ask(model, Arrival(0, Slo(latency_ns=budget_ns, min_accuracy=floor))), IDLE)
            assert not isinstance(error, Overloaded), budget_ns


def test_what_a_refusal_offers_can_be_had() -> None:
    """Asking an idle server for exactly an offered variant and latency is not refused."""
    model = model_of()
    error = refusal(model, ask(model, Arrival(0, Slo(latency_ns=MS))), IDLE)
    offered = re.findall(r"([\w-]+) \(accuracy [\d.]+, ([\d.]+) ms\)", str(error))
    assert [name for name, _ in offered] == [variant.name for variant in model.variants]
    for name, latency_ms in offered:
        request = ask(model, Arrival(0, Slo(variant=name, latency_ns=int(float(latency_ms) * MS))))
        assert refusal(model, request, IDLE) is None


def test_a_slow_spell_makes_a_request_wait_for_better_times_not_infeasible() -> None:
    """When the host runs slower than profiled, a tight SLO is refused as overload: it could be met at rest."""
    model = model_of()
    for batch in range(10):
        model.latency.observe(4, 1, 3 * model.latency.profiled_ns(4, 1), batch * 10 * MS)
    assert isinstance(refusal(model, ask(model, Arrival(0, Slo(latency_ns=4 * MS))), IDLE), Overloaded)


def test_more_samples_than_any_variant_was_measured_at_cannot_run() -> None:
    """A request above every profile is infeasible, whatever it asks for otherwise."""
    model = model_of()
    request = ask(model, Arrival(0, Slo(on_infeasible=(DEGRADE, LATE)), samples=17))
    assert isinstance(refusal(model, request, IDLE), Infeasible)


def test_what_was_asked_for_is_tried_in_its_order() -> None:
    """`late,degrade` waits at the floor it asked for; `degrade,late` takes the lower variant in time."""
    model = model_of()
    tight = {"latency_ns": 5 * MS, "min_accuracy": 0.9, "hard": False}
    late = ask(model, Arrival(0, Slo(**tight, on_infeasible=(LATE, DEGRADE))))  # type: ignore[arg-type]
    degraded = ask(model, Arrival(0, Slo(**tight, on_infeasible=(DEGRADE, LATE))))  # type: ignore[arg-type]
    assert refusal(model, late, IDLE) is refusal(model, degraded, IDLE) is None
    assert (late.late, late.allowed) == (True, late.asked)
    assert (degraded.late, names(model, degraded.allowed)[-1]) == (False, "distilled")


def test_reject_ends_the_list() -> None:
    """What comes after `reject` is not tried."""
    model = model_of()
    request = ask(model, Arrival(0, Slo(latency_ns=100 * MS, on_infeasible=(REJECT, LATE))))
    assert isinstance(refusal(model, request, BUSY), Overloaded)


def test_a_hard_floor_is_never_degraded() -> None:
    """`degrade` has nothing to widen where the floor is hard; `late` then keeps the floor."""
    model = model_of()
    tight = Slo(latency_ns=5 * MS, min_accuracy=0.9, on_infeasible=(DEGRADE, LATE))
    request = ask(model, Arrival(0, tight))
    assert refusal(model, request, IDLE) is None
    assert (request.late, request.allowed) == (True, request.asked)


@pytest.mark.parametrize("load", [IDLE, BUSY])
@pytest.mark.parametrize("default_ms", [1, 100])
def test_a_default_latency_is_no_reason_to_refuse(load: Load, default_ms: int) -> None:
    """A request that named no latency waits, whatever the default is and however busy the server."""
    model = model_of()
    request = ask(model, Arrival(0), defaults=Defaults(default_ms * MS))
    assert refusal(model, request, load) is None
    assert request.late == (load is BUSY or default_ms == 1)


def test_the_work_ahead_counts_and_the_work_behind_does_not() -> None:
    """A newcomer waits for those before it in order, spread over the executors, not for those after it."""
    tight, loose = Slo(latency_ns=50 * MS), Slo(latency_ns=5000 * MS)
    behind, ahead = model_of(), model_of()
    queue_up(behind, *[Arrival(0, loose)] * 200)
    queue_up(ahead, *[Arrival(0, tight)] * 200)
    newcomer = Slo(latency_ns=60 * MS)
    assert refusal(behind, ask(behind, Arrival(0, newcomer)), IDLE) is None
    assert isinstance(refusal(ahead, ask(ahead, Arrival(0, newcomer)), IDLE), Overloaded)
    assert refusal(ahead, ask(ahead, Arrival(0, newcomer)), Load(0, [0] * 8, 0, None)) is None


def test_other_models_hold_a_newcomer_up_by_no_more_than_its_own_work_ahead() -> None:
    """Executors are shared fairly, so another model's endless backlog does not refuse the first request of this one."""
    model = model_of()
    flooded = Load(0, [0], others_backlog_ns=10**15, late_room=None)
    assert refusal(model, ask(model, Arrival(0, Slo(latency_ns=10 * MS))), flooded) is None


def test_a_model_with_one_variant_serves() -> None:
    """A bare model, served as its own reference without evidence, takes requests without a floor and refuses floors."""
    bare = variant("fp32", 0.0, 5, 1)
    model = ModelQueue(ModelKey("m", "1"), [bare])
    assert refusal(model, ask(model, Arrival(0)), IDLE) is None
    with pytest.raises(Infeasible):
        ask(model, Arrival(0, Slo(min_accuracy=0.5)))


def test_no_drop_means_the_reference_even_where_another_is_proven_better() -> None:
    """A ceiling of 0 is about who answers, not about a bound."""
    better = replace(variant("distilled", 0.95, 1, 1), drop=Interval(-0.02, -0.03, -0.01))
    model = ModelQueue(ModelKey("m", "1"), [variant("fp32", 0.94, 10, 1), better])
    assert model.variants[0].name == "distilled"
    assert names(model, ask(model, Arrival(0, Slo(max_accuracy_drop=0.0))).allowed) == ["fp32"]


def test_pinning_a_variant_that_cannot_run_here_says_why() -> None:
    """It exists, so it is not unknown; the reason is the one that is listed."""
    amp = replace(variant("amp", 0.9, 1, 1), profile=None, state=State.UNSUPPORTED, reason="no bf16 here")
    model = ModelQueue(ModelKey("m", "1"), [variant("fp32", 0.94, 10, 1), amp])
    with pytest.raises(Infeasible, match="no bf16 here"):
        ask(model, Arrival(0, Slo(variant="amp")))


def test_a_soft_floor_that_could_be_degraded_on_an_idle_server_is_overload_on_a_busy_one() -> None:
    """Too slow for its floor even at rest, and in time below it: a busy server says come back, not never."""
    model = ModelQueue(ModelKey("m", "1"), [variant("fp32", 0.9, 39, 1), variant("int8-static", 0.85, 9, 1)])
    asked = slo(30, 0.9, OnInfeasible.DEGRADE, OnInfeasible.REJECT, hard=False)
    idle, busy = Load(0, [0], 0, None), Load(0, [25 * MS], 0, None)
    assert refusal(model, ask(model, Arrival(0, asked)), idle) is None
    error = refusal(model, ask(model, Arrival(0, asked)), busy)
    assert isinstance(error, Overloaded)
    assert error.retry_after_ns


def test_what_an_idle_server_answers_is_never_called_infeasible() -> None:
    """Behind one batch, a request that the learnt margin allows at rest is told to come back."""
    model = ModelQueue(ModelKey("m", "1"), [variant("fp32", 0.9, 9, 1)])
    for batch in range(300):
        model.latency.observe(0, 1, 10 * MS, batch * 10 * MS)
    model.latency.refresh(3000 * MS)
    asked = ask(model, Arrival(3000 * MS, slo(11)))
    assert refusal(model, asked, Load(3000 * MS, [3000 * MS], 0, None)) is None
    assert isinstance(refusal(model, asked, Load(3000 * MS, [3005 * MS], 0, None)), Overloaded)
