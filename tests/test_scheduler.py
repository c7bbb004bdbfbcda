from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, ask, model_of, queue_up, slo, variant
from scheduling_world import World

from server.errors import Overloaded
from server.scheduling.admission import QUEUE_FULL_RETRY_NS
from server.scheduling.model_queue import REPLY_RESERVE_NS, ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policy import Decision, Moment
from server.scheduling.scheduler import End, Scheduler
from server.scheduling.slo import OnInfeasible, Outcome, Request, Slo
from variants.variant import State

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT
SECOND = 1000 * MS


def test_an_idle_server_answers_a_loose_slo_with_the_reference() -> None:
    """One request at a time, each with time to spare, all run on fp32 and are ok."""
    world = World(model_of())
    world.arrive(*[Arrival(second * SECOND, slo(500)) for second in range(5)])
    assert world.run().variants_used() == ["fp32"] * 5
    assert world.outcomes() == {"ok": 5}


def test_the_ends_say_why() -> None:
    """Infeasible, overloaded and expired are told apart: never, not now, and no longer."""
    world = World(model_of(), service=lambda *_: 400 * MS)
    never, first, later = world.arrive(Arrival(0, slo(2)), Arrival(0, slo(1000)), Arrival(MS, slo(10)))
    no_longer = world.arrive(Arrival(MS, slo(390)))[0]  # predicted to start in time, but the executor overruns
    world.run()
    assert world.outcome(never) is Outcome.INFEASIBLE
    assert world.outcome(first) is Outcome.OK
    assert world.outcome(later) is Outcome.REJECTED
    assert world.outcome(no_longer) is Outcome.EXPIRED
    quickest_ns = model_of().latency.predict_ns(4, 1)
    assert world.ended[no_longer].at_ns == 391 * MS - REPLY_RESERVE_NS - quickest_ns + 1  # the instant it was lost
    assert world.ended[later].at_ns == MS


def test_a_deadline_that_had_passed_on_arrival_expires() -> None:
    """Such a request is neither infeasible nor rejected; one that may be late is served late."""
    world = World(model_of())
    passed = world.arrive(Arrival(10 * MS, rpc_deadline_ns=9 * MS))[0]
    late = world.arrive(Arrival(10 * MS, Slo(on_infeasible=(LATE,)), rpc_deadline_ns=9 * MS))[0]
    rejected = world.arrive(Arrival(10 * MS, Slo(on_infeasible=(REJECT, LATE)), rpc_deadline_ns=9 * MS))[0]
    world.run()
    assert [world.outcome(n) for n in (passed, late, rejected)] == [Outcome.EXPIRED, Outcome.LATE, Outcome.EXPIRED]


def test_a_request_that_degrades_while_it_waits_is_served_in_time() -> None:
    """An executor that overruns costs a waiting request its floor, as it asked, and not its deadline."""
    world = World(model_of(), service=lambda run, profiled_ns: 82 * MS if run.requests[0].number == 0 else profiled_ns)
    world.arrive(Arrival(0, slo(500)))
    waiting = world.arrive(Arrival(MS, slo(90, 0.913, DEGRADE, hard=False)))[0]
    world.run()
    assert world.outcome(waiting) is Outcome.DEGRADED
    assert world.ended[waiting].at_ns <= 91 * MS


def test_a_pinned_request_runs_on_its_variant_in_any_state_but_disabled() -> None:
    """A pin is obeyed though a better variant would do; together with others on the same variant it shares batches."""
    world = World(model_of())
    world.at(0, lambda: world.set_state("pruned", State.QUARANTINED))
    pinned = world.arrive(*[Arrival(MS, slo(500, variant="pruned"))] * 2)
    unknown = world.arrive(Arrival(MS, slo(500, variant="int4")))[0]
    world.at(2 * MS, lambda: world.set_state("pruned", State.DISABLED))
    disabled = world.arrive(Arrival(3 * MS, slo(500, variant="pruned")))[0]
    world.run()
    assert world.variants_used(pinned) == ["pruned", "pruned"]
    assert world.batches[0].reason == "pinned"
    assert (world.outcome(unknown), world.outcome(disabled)) == (Outcome.INVALID, Outcome.INFEASIBLE)


def test_a_variant_whose_batch_mates_would_change_answers_runs_requests_alone() -> None:
    """Thirty requests on a variant that must not batch make thirty batches."""
    world = World(model_of(variant("fp32", 0.913, 2, 1, batchable=False)))
    world.arrive(*[Arrival(0, slo(500))] * 30, *[Arrival(0, Slo(latency_ns=MS, on_infeasible=(LATE,)))] * 3)
    world.run()
    assert [len(batch.members) for batch in world.batches] == [1] * 33


def test_different_shapes_never_share_a_batch() -> None:
    """Interleaved shapes are batched each by itself."""
    world = World(model_of())
    world.arrive(*[Arrival(0, slo(500), shape=(8, 8 + at % 3)) for at in range(30)])
    world.run()
    assert len(world.batches) < 30
    assert all(len({member.shape for member in batch.members}) == 1 for batch in world.batches)


def test_a_shape_that_looks_like_a_number_is_only_a_shape() -> None:
    """A request that is tried again alone stays alone, though a client's shape equals its number."""
    world = World(model_of(), fails=lambda run: run.requests[0].number == 7 and not run.requests[0].solo)
    world.arrive(*[Arrival(at * SECOND, slo(500), shape=(0,)) for at in range(7)])
    world.arrive(Arrival(10 * SECOND, slo(500), shape=(9,)), *[Arrival(10 * SECOND + MS, slo(500), shape=(7,))] * 4)
    world.run()
    assert world.outcomes() == {"ok": 12}
    assert [[m.number for m in batch.members] for batch in world.batches if any(m.retried for m in batch.members)] == [
        [7]
    ]


def test_samples_fill_batches_not_requests() -> None:
    """Requests of five samples go three to a batch of at most sixteen."""
    world = World(model_of())
    world.arrive(*[Arrival(0, slo(1000), samples=5)] * 6)
    world.run()
    assert [batch.samples for batch in world.batches] == [15, 15]
    assert world.outcomes() == {"ok": 6}


def test_large_requests_become_hopeless_before_small_ones() -> None:
    """A request of many samples needs longer, so it ends sooner than a small one with an earlier deadline."""
    world = World(model_of(variant("fp32", 0.9, 0, 10)), service=lambda *_: 500 * MS)
    world.arrive(Arrival(0, slo(1000)))
    small, large = world.arrive(Arrival(MS, slo(300)), Arrival(MS, slo(310, None), samples=16))
    world.run()
    assert world.outcome(small) is world.outcome(large) is Outcome.EXPIRED
    assert world.ended[large].at_ns < world.ended[small].at_ns


def test_a_waiting_request_that_is_cancelled_never_runs() -> None:
    """Cancelled in the queue, it is in no batch, and its neighbours are."""
    world = World(model_of())
    world.arrive(Arrival(0, slo(500)), Arrival(MS, slo(500)), Arrival(MS, slo(500), cancel_at_ns=2 * MS))
    world.run()
    assert world.outcomes() == {"ok": 2, "cancelled": 1}
    assert [member.number for batch in world.batches for member in batch.members] == [0, 1]


def test_a_running_request_that_is_cancelled_is_not_tried_again() -> None:
    """When its batch fails, the one whose client went away ends and the others are retried."""
    world = World(model_of(), fails=lambda run: len(run.requests) == 3)
    world.arrive(*[Arrival(0, slo(500))] * 2, Arrival(0, slo(500), cancel_at_ns=MS))
    world.run()
    assert world.outcomes() == {"ok": 2, "cancelled": 1}
    assert [member.number for batch in world.batches[1:] for member in batch.members] == [0, 1]


def test_cancelling_what_has_ended_or_runs_changes_nothing() -> None:
    """`cancelled` says False, and the end comes by itself."""
    model = model_of()
    scheduler = Scheduler(1, max_requests=10, max_bytes=10_000)
    scheduler.add_model(model)
    request = ask(model, Arrival(0, slo(500)))
    assert scheduler.arrived(request, 0) == []
    run, _ = scheduler.decide(0, 0)
    assert run is not None
    assert not scheduler.cancelled(request)
    scheduler.finished(run, 10 * MS, 10 * MS)
    assert not scheduler.cancelled(request)
    assert scheduler.waiting == scheduler.waiting_bytes == scheduler.busy_executors == 0


def test_the_queue_is_bounded_in_count_and_bytes() -> None:
    """Beyond either bound a request is refused as overloaded, and a place that becomes free can be taken."""
    world = World(model_of(), max_requests=3, max_bytes=1000)
    world.arrive(Arrival(0, slo(500)))
    fits = world.arrive(*[Arrival(MS, slo(500), size_bytes=10)] * 3)
    full = world.arrive(Arrival(MS, slo(500), size_bytes=10))[0]
    again = world.arrive(Arrival(15 * MS, slo(500), size_bytes=1000))[0]
    heavy = world.arrive(Arrival(15 * MS, slo(500), size_bytes=1))[0]
    world.run(until_ns=16 * MS)
    assert world.outcome(full) is world.outcome(heavy) is Outcome.REJECTED
    world.run()
    huge = world.arrive(Arrival(world.now_ns, slo(500), size_bytes=1001))[0]
    world.run()
    assert world.outcome(huge) is Outcome.REJECTED, "it would not fit into an empty queue"
    assert [world.outcome(number) for number in (*fits, again)] == [Outcome.OK] * 4


def test_who_finds_the_queue_full_is_told_to_come_back_when_it_has_drained() -> None:
    """The hint is the time that the executors need for what waits, and never so short that it invites a storm."""
    scheduler = Scheduler(2, max_requests=500, max_bytes=10_000)
    short, long = model_of(name="short"), model_of(name="long")
    for model, waiting in [(short, 10), (long, 500)]:
        scheduler.add_model(model)
        queue_up(model, *[Arrival(0, slo(5000), model=model.key.name, size_bytes=1)] * waiting)
    hints_ns = []
    for model, size_bytes in [(short, 9_999), (long, 1)]:
        (end,) = scheduler.arrived(ask(model, Arrival(0, slo(5000), size_bytes=size_bytes), 1000), 0)
        assert isinstance(end.error, Overloaded)
        hints_ns.append(end.error.retry_after_ns)
    drained_ns = [model.backlog_ns() // 2 for model in (short, long)]
    assert drained_ns[0] < QUEUE_FULL_RETRY_NS < drained_ns[1]
    assert hints_ns == [QUEUE_FULL_RETRY_NS, drained_ns[1]]


class Faulty(FitDrain):
    """Gives up on everything that model `m` has waiting, and has a bug that other models meet."""

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:
        if request.solo:
            raise RuntimeError("a bug")

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        if model.key.name != "m":
            raise RuntimeError("a bug")
        return Decision(give_up=tuple(model.regular))


@pytest.mark.parametrize("call", ["decide", "arrived", "arrived and refused"])
def test_who_ended_before_a_bug_struck_is_told_by_the_next_call(call: str) -> None:
    """One model's requests are taken out, then something raises: their ends are not lost with it."""
    scheduler = Scheduler(1, max_requests=2, max_bytes=1000, policy=Faulty)
    m, n = model_of(), model_of(name="n")
    scheduler.add_model(m)
    scheduler.add_model(n)
    request = ask(m, Arrival(0, slo(50)))
    waiting = ask(n, Arrival(0, slo(500)), 1)
    assert [*scheduler.arrived(request, 0), *scheduler.arrived(waiting, 0)] == []
    ended: list[End] = []
    if call == "decide":
        with pytest.raises(RuntimeError):
            scheduler.decide(0, 0)
    else:
        struck = ask(n, Arrival(50 * MS, slo(500)), 2)
        struck.solo = True
        with pytest.raises(RuntimeError):
            scheduler.arrived(struck, 50 * MS)
        if call == "arrived and refused":
            refused = ask(n, Arrival(50 * MS, slo(500)), 3)
            *ended, own = scheduler.arrived(refused, 50 * MS)
            assert own.request is refused
    ended += scheduler.tick(50 * MS)
    assert [(end.request, end.outcome) for end in ended] == [(request, Outcome.EXPIRED)]


def test_a_queue_delay_holds_a_batch_until_the_delay_is_over() -> None:
    """A lone request starts exactly when the delay ends, together with what came meanwhile."""
    world = World(model_of(delay_ms=5))
    world.arrive(Arrival(0, slo(500)), Arrival(3 * MS, slo(500)))
    world.run()
    assert [(batch.at_ns, len(batch.members)) for batch in world.batches] == [(5 * MS, 2)]


def test_a_full_batch_is_not_held() -> None:
    """As many samples as the fastest variant takes start at once."""
    world = World(model_of(delay_ms=50))
    world.arrive(*[Arrival(0, slo(500))] * 15, Arrival(2 * MS, slo(500)))
    world.run()
    assert world.batches[0].at_ns == 2 * MS


def test_a_tight_deadline_is_not_held() -> None:
    """A delay longer than a request can wait does not cost its deadline."""
    world = World(model_of(delay_ms=400))
    world.arrive(Arrival(0, slo(30)), Arrival(SECOND, slo(4)))
    world.run()
    assert world.outcomes() == {"ok": 2}


def test_a_hold_that_ends_while_every_executor_is_busy_asks_for_nothing() -> None:
    """`next_event_ns` never names a past instant for which nobody could do anything."""
    world = World(model_of(delay_ms=5))
    world.arrive(*[Arrival(at * MS, slo(500)) for at in range(60)])
    world.run()  # World asserts that each next event lies in the future
    assert world.outcomes() == {"ok": 60}


def test_disabling_a_variant_ends_only_those_who_have_no_other() -> None:
    """Of two who wait, the one whose floor only that variant satisfies ends as infeasible; the other runs elsewhere."""
    world = World(model_of())
    world.arrive(Arrival(0, slo(500)))
    strict, free, late = world.arrive(
        Arrival(MS, slo(500, 0.913)), Arrival(MS, slo(500)), Arrival(MS, slo(1, 0.913, LATE))
    )
    world.at(2 * MS, lambda: world.set_state("fp32", State.DISABLED))
    world.run()
    assert world.outcome(strict) is world.outcome(late) is Outcome.INFEASIBLE
    assert world.ended[free].variant == "amp"


def test_a_quarantined_variant_takes_no_traffic_from_the_queue_either() -> None:
    """Requests that waited when it was quarantined run on what is still eligible; a pinned one keeps its variant."""
    world = World(model_of())
    world.arrive(Arrival(0, slo(500)))
    waiting = world.arrive(*[Arrival(MS, slo(500))] * 3)
    pinned = world.arrive(Arrival(MS, slo(500, variant="fp32")))
    world.at(2 * MS, lambda: world.set_state("fp32", State.QUARANTINED))
    world.run()
    assert set(world.variants_used(waiting)) == {"amp"}
    assert world.variants_used(pinned) == ["fp32"]


def test_a_retry_keeps_off_a_variant_that_lost_its_eligibility() -> None:
    """A batch that fails after its alternative was quarantined is not tried again there."""
    model = [variant("fp32", 0.913, 6, 4), variant("amp", 0.912, 5, 2.6)]
    world = World(model_of(*model), fails=lambda run: run.variant == "fp32")
    number = world.arrive(Arrival(0, slo(500)))[0]
    world.at(MS, lambda: world.set_state("amp", State.QUARANTINED))
    world.run()
    assert world.outcome(number) is Outcome.FAILED


def test_disabling_the_only_variant_large_enough_ends_a_large_request_that_is_not_the_first() -> None:
    """A request of many samples is found among small ones of its class when no variant left can take it."""
    variants = [variant("fp32", 0.913, 6, 4), variant("amp", 0.912, 5, 2.6, sizes=(1, 2, 4))]
    world = World(model_of(*variants))
    world.arrive(Arrival(0, slo(2000)), Arrival(MS, slo(900)))
    large = world.arrive(Arrival(MS, slo(1000), samples=10))[0]
    world.at(2 * MS, lambda: world.set_state("fp32", State.DISABLED))
    world.run()
    assert world.outcomes() == {"ok": 2, "infeasible": 1}
    assert world.ended[large].at_ns == 2 * MS
