"""A failed batch: who is tried again, on which variant, and how late."""

from __future__ import annotations

import pytest
from scheduling_models import MS, Arrival, model_of, slo, variant
from scheduling_world import World

from server.scheduling.slo import OnInfeasible, Outcome

DEGRADE, LATE, REJECT = OnInfeasible.DEGRADE, OnInfeasible.LATE, OnInfeasible.REJECT


def test_a_failed_batch_is_retried_request_by_request_on_another_variant() -> None:
    """One failure costs nobody the answer: each member runs again, alone and elsewhere."""
    world = World(model_of(), fails=lambda run: len(run.requests) == 4)
    world.arrive(*[Arrival(0, slo(500))] * 4)
    world.run()
    assert world.outcomes() == {"ok": 4}
    assert [len(batch.members) for batch in world.batches] == [4, 1, 1, 1, 1]
    assert world.batches[0].variant == "fp32"
    assert all(batch.variant != "fp32" for batch in world.batches[1:])


def test_a_request_is_retried_once() -> None:
    """Two failures end it as failed; its batch-mates are unharmed."""
    world = World(model_of(), fails=lambda run: any(request.number == 2 for request in run.requests))
    world.arrive(*[Arrival(0, slo(500))] * 4)
    world.run()
    assert world.outcomes() == {"ok": 3, "failed": 1}
    assert sum(member.number == 2 for batch in world.batches for member in batch.members) == 2


def test_a_retry_never_leaves_the_floor() -> None:
    """Where no other variant satisfies a hard floor, a lone failure is final; batch-mates try again on the same."""
    world = World(model_of(), fails=lambda run: not run.requests[0].solo)
    alone = world.arrive(Arrival(0, slo(500, 0.913)))[0]
    together = world.arrive(*[Arrival(1000 * MS, slo(500, 0.913))] * 3)
    world.run()
    assert world.outcome(alone) is Outcome.FAILED
    assert world.variants_used(together) == ["fp32"] * 3


def test_a_retry_without_time_is_a_failure_at_once() -> None:
    """A request that could not be answered again in time, reply included, ends failed and not expired."""
    world = World(model_of(), service=lambda *_: 200 * MS - 3_200_000, fails=lambda _: True)
    number = world.arrive(Arrival(0, slo(200)))[0]  # 3.105 ms would be enough to compute, but not to reply too
    world.run()
    assert world.outcome(number) is Outcome.FAILED


def test_a_retry_without_time_is_late_for_who_asked_for_that() -> None:
    """Failed too near to its deadline to be tried again in time, it is answered late by another variant."""
    world = World(model_of(), fails=lambda run: not run.requests[0].solo, service=lambda *_: 199 * MS)
    number = world.arrive(Arrival(0, slo(200, None, LATE)))[0]
    world.run()
    assert (world.outcome(number), world.ended[number].at_ns) == (Outcome.LATE, 398 * MS)
    assert world.batches[0].variant != world.batches[1].variant


@pytest.mark.parametrize(
    ("on_infeasible", "outcome", "name"),
    [((DEGRADE, LATE), Outcome.DEGRADED, "amp"), ((LATE, DEGRADE), Outcome.LATE, "fp32"), ((), Outcome.FAILED, "none")],
)
def test_a_retry_too_late_for_the_floor_goes_on_in_the_order_that_was_asked_for(
    on_infeasible: tuple[OnInfeasible, ...], outcome: Outcome, name: str
) -> None:
    """Its batch failed when only the variant below its soft floor could be in time yet."""
    strict, fast = variant("fp32", 0.913, 40, 2), variant("amp", 0.9, 8, 0.5)
    world = World(model_of(strict, fast), fails=lambda run: not run.requests[0].solo)
    asked = slo(70, 0.913, *on_infeasible, hard=False)
    _, number = world.arrive(Arrival(0, slo(500, 0.913, hard=False)), Arrival(0, asked))
    world.run()
    assert (world.batches[0].variant, len(world.batches[0].members)) == ("fp32", 2)
    assert (world.outcome(number), world.ended[number].variant) == (outcome, name)


@pytest.mark.parametrize("asked", [(DEGRADE,), (REJECT, DEGRADE)])
def test_a_lone_failure_of_the_only_variant_of_a_soft_floor_is_degraded_if_asked_for(
    asked: tuple[OnInfeasible, ...],
) -> None:
    """No other variant keeps the floor; what comes after `reject` is not asked for."""
    world = World(model_of(), fails=lambda run: run.variant == "fp32")
    number = world.arrive(Arrival(0, slo(500, 0.913, *asked, hard=False)))[0]
    world.run()
    assert world.outcome(number) is (Outcome.DEGRADED if asked[0] is DEGRADE else Outcome.FAILED)


@pytest.mark.parametrize("asked", [(LATE, DEGRADE), (DEGRADE, LATE)])
def test_a_retry_that_needs_both_is_degraded_and_late(asked: tuple[OnInfeasible, ...]) -> None:
    """The only variant of its soft floor failed it after its deadline: both words help, in whichever order."""
    world = World(model_of(), fails=lambda run: run.variant == "fp32", service=lambda *_: 60 * MS)
    number = world.arrive(Arrival(0, slo(50, 0.913, *asked, hard=False)))[0]
    world.run()
    assert (world.outcome(number), world.ended[number].at_ns) == (Outcome.LATE, 120 * MS)


def test_a_retry_of_who_is_late_already_needs_no_room() -> None:
    """It had its place among the late work, which filled up while it ran: when its batch fails, it is tried again."""
    world = World(
        model_of(), max_requests=4, fails=lambda run: run.requests[0].number == 0 and not run.requests[0].solo
    )
    numbers = world.arrive(*[Arrival(at * MS, slo(1, None, LATE)) for at in (0, 1, 1)])
    world.run()
    assert [world.outcome(number) for number in numbers] == [Outcome.LATE] * 3
