"""What holds for every policy, whatever the traffic, and how policies are named.

`World` itself checks every batch: one shape, hard floors, sizes measured, requests that must run alone.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from scheduling_models import MS, Arrival, gamma_arrivals, model_of, slo, variant
from scheduling_world import World, noisy

from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies import check_policy, policy_factory
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.slo import OnInfeasible, Outcome, Slo
from variants.variant import State

PUBLISHED = [
    "fixed-fastest",
    "fixed-fp32",
    "clipper-fp32",
    "nexus-fp32",
    "clockwork-fp32",
    "model-switching-1s",
    "model-switching-0.1s",
    "infaas",
    "proteus-10s",
    "proteus-1s",
    "slackfit",
    "slackfit-q",
    "maxbatch",
    "maxacc",
]
ALL = ["fitdrain", *(name + suffix for name in PUBLISHED for suffix in ("", "+ed"))]
every_policy = pytest.mark.parametrize("name", ALL)
LATE, DEGRADE = OnInfeasible.LATE, OnInfeasible.DEGRADE


def uneven() -> ModelQueue:
    """Variants measured at different batch sizes, one of which must not batch."""
    return model_of(
        variant("fp32", 0.913, 6, 4, sizes=(1, 2, 4, 8)),
        variant("amp", 0.912, 5, 2.6, sizes=(2, 3)),
        variant("int8-static", 0.905, 4, 1.8, sizes=(1, 2, 4, 8), batchable=False),
        variant("distilled", 0.872, 2, 0.7),
    )


def rough_traffic(seed: int) -> list[Arrival]:
    """Bursts of mixed floors, budgets, shapes, sizes, priorities and ways to be served late or degraded."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    arrivals = []
    for arrival in gamma_arrivals(seed, 700, 8, 0.5, slo(60)):
        asked = Slo(
            latency_ns=random.choice([5, 20, 60, 60, 200]) * MS,
            min_accuracy=random.choice([None, None, 0.9, 0.913]),
            hard=random.random() < 0.5,
            on_infeasible=random.choice([None, (LATE,), (DEGRADE,), (DEGRADE, LATE)]),
            variant=random.choice([None] * 9 + ["fp32"]),
            priority=random.choice([0, 0, 1, 8]),
        )
        samples, shape = random.choice([1, 1, 1, 3, 8]), random.choice([(8,), (8,), (9,)])
        cancel_at_ns = arrival.at_ns + 10 * MS if random.random() < 0.05 else None
        arrivals.append(Arrival(arrival.at_ns, asked, samples=samples, shape=shape, cancel_at_ns=cancel_at_ns))
    return arrivals


def rough_world(name: str, seed: int) -> World:
    """A finished run through rough traffic, with noise, failing batches and a variant that goes and comes back."""
    random = Random(seed)  # noqa: S311 - repeatable on purpose
    world = World(
        uneven(),
        executors=1 + seed % 3,
        service=noisy(seed, 0.2),
        fails=lambda _: random.random() < 0.02,
        policy=policy_factory(name),
    )
    world.arrive(*rough_traffic(seed))
    world.at(200 * MS, lambda: world.set_state("fp32", State.DISABLED))
    world.at(400 * MS, lambda: world.set_state("fp32", State.ELIGIBLE))
    return world.run()


@every_policy
@pytest.mark.parametrize("seed", [0, 1])
def test_every_request_ends_once_and_equal_runs_are_equal(name: str, seed: int) -> None:
    """Through all that traffic can bring each request has one end, nothing is kept, and a second run is the same."""
    world, again = rough_world(name, seed), rough_world(name, seed)
    assert sorted(world.ended) == list(range(len(world.arrivals)))
    assert all((model.waiting, model.waiting_bytes) == (0, 0) for model in world.scheduler.models.values())
    assert world.outcomes()["ok"] > 10
    assert (world.batches, world.ended) == (again.batches, again.ended)


@every_policy
def test_a_hard_floor_holds(name: str) -> None:
    """In overload, whoever asked for the reference gets it or nothing."""
    world = World(model_of(), executors=2, policy=policy_factory(name))
    world.arrive(*gamma_arrivals(3, 500, 4, 0.5, slo(60, 0.913)), *gamma_arrivals(4, 1000, 4, 0.5, slo(60)))
    world.run()
    strict = {number for number, arrival in enumerate(world.arrivals) if arrival.slo.min_accuracy}
    assert {world.ended[number].variant for number in strict} <= {"fp32", "none"}
    assert any(batch.members for batch in world.batches)


@every_policy
@pytest.mark.parametrize("executors", [1, 4])
def test_light_load_is_answered_in_time(name: str, executors: int) -> None:
    """Sparse requests that every variant could serve are all answered in time, whatever the number of executors."""
    world = World(model_of(), executors=executors, policy=policy_factory(name))
    world.arrive(*[Arrival(at * 50 * MS, slo(60)) for at in range(60)])
    assert world.run().outcomes() == {Outcome.OK.value: 60}


@every_policy
def test_one_variant_that_must_not_batch_is_enough(name: str) -> None:
    """With a single variant that runs one request at a time, requests of several samples are answered too."""
    world = World(model_of(variant("fp32", 0.913, 2, 1, batchable=False)), policy=policy_factory(name))
    world.arrive(*[Arrival(0, slo(300), samples=1 + place % 3) for place in range(20)])
    assert world.run().outcomes() == {Outcome.OK.value: 20}
    assert all(len(batch.members) == 1 for batch in world.batches)


@every_policy
def test_the_loss_of_an_executor_is_survived(name: str) -> None:
    """What arrives after one of three executors has gone is answered by the others, whichever went."""
    for gone in (0, 1, 2):
        world = World(model_of(), executors=3, policy=policy_factory(name))
        world.arrive(*[Arrival(at * 50 * MS, slo(60)) for at in range(60)])
        world.at(1030 * MS, lambda world=world, gone=gone: world.lose(gone, 10**12))  # type: ignore[misc]
        world.run()
        assert world.outcomes() == {Outcome.OK.value: 60}, gone


@pytest.mark.parametrize("name", [name for name in ALL if "fp32" in name])
def test_a_service_of_one_variant_gives_up_whom_it_cannot_serve(name: str) -> None:
    """A request that the one variant cannot finish even alone is given up and blocks nobody."""
    world = World(model_of(), policy=policy_factory(name))
    hopeless, served = world.arrive(Arrival(0, slo(8)), Arrival(0, slo(60)))
    world.run()
    assert (world.outcome(hopeless), world.outcome(served)) == (Outcome.EXPIRED, Outcome.OK)
    assert world.ended[hopeless].at_ns == 0


def test_who_is_given_up_and_comes_back_degraded_does_not_wait_for_an_event() -> None:
    """A request that a service of one variant gives up, and that asked to be degraded, runs at once."""
    world = World(model_of(), policy=policy_factory("fixed-fastest"))
    (number,) = world.arrive(Arrival(0, slo(60, 0.913, DEGRADE, hard=False)))
    world.run()
    assert world.outcome(number) is Outcome.DEGRADED
    assert world.batches[0].at_ns <= 1


def test_the_default_is_fitdrain_and_there_is_one_instance_per_model() -> None:
    """Names make factories; what a policy learns of one model it does not carry to the next."""
    assert policy_factory("fitdrain") is FitDrain
    factory = policy_factory("proteus-1s+ed")
    assert factory() is not factory()


@pytest.mark.parametrize("name", ["", "fifo", "fixed", "fixed-", "nexus", "fitdrain+ed", "slackfit-3", "proteus-2s"])
def test_an_unknown_name_is_told_what_there_is(name: str) -> None:
    """The error names the wrong name and the right ones."""
    with pytest.raises(ValueError, match=r"fitdrain, fixed-<variant or fastest>.*slackfit.*proteus-1s.*\+ed"):
        policy_factory(name)


@pytest.mark.parametrize("kind", ["fixed", "clipper", "nexus", "clockwork"])
def test_a_policy_of_one_variant_needs_one_that_takes_traffic(kind: str) -> None:
    """A variant that is not there, does not take traffic or cannot run is told, with those that could be named."""
    rejected = variant("amp", 0.91, 2, 1, state=State.REJECTED)
    unmeasured = replace(variant("int8", 0.9, 2, 1, state=State.UNSUPPORTED), profile=None)
    model = model_of(variant("fp32", 0.913, 2, 1), rejected, unmeasured)
    for name, why in (("bf16", "is not there"), ("amp", "is rejected"), ("int8", "cannot run here")):
        with pytest.raises(ValueError, match=rf"{kind}-{name}.*'{name}' of m, which {why}; .*traffic: fp32$"):
            check_policy(f"{kind}-{name}+ed", model)
    check_policy(f"{kind}-fp32+ed", model)
    check_policy(f"{kind}-fastest", model)


@pytest.mark.parametrize("name", ["fixed-bf16", "clockwork-bf16+ed"])
def test_decisions_never_raise(name: str) -> None:
    """Even unchecked, a policy for a variant that is not there only gives everybody up."""
    world = World(model_of(), policy=policy_factory(name))
    world.arrive(Arrival(0, slo(60)))
    assert world.run().outcomes() == {Outcome.EXPIRED.value: 1}
