"""What holds for the scheduler whatever the traffic.

`World` itself checks every batch and, after every instant, that counts add up, that no executor idles beside work that
may start, and that the next event lies in the future.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scheduling_models import MS, Arrival, variant
from scheduling_world import World

from server.scheduling.admission import Defaults
from server.scheduling.model_queue import ModelQueue
from server.scheduling.scheduler import Run
from server.scheduling.slo import ModelKey, OnInfeasible, Outcome, Slo
from server.simulation.virtual_server import Service, exact
from variants.variant import State, Variant

REFUSED = {Outcome.REJECTED, Outcome.INFEASIBLE, Outcome.EXPIRED}
quickly = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])

sizes = st.sampled_from([(1, 2, 4, 8), (1, 3), (1,), (2, 8)])


@st.composite
def families(draw: st.DrawFn) -> list[Variant]:
    """One to four variants: any latencies, sizes and accuracies, some equal, some useless, some unable to batch."""
    names = ["fp32", "amp", "int8-static", "pruned"][: draw(st.integers(1, 4))]
    return [
        variant(
            name,
            0.9 if name == "fp32" else draw(st.sampled_from([0.8, 0.85, 0.9, 0.95])),
            draw(st.integers(0, 10)),
            draw(st.integers(1, 8)) / 2,
            sizes=draw(sizes),
            batchable=draw(st.booleans()) or draw(st.booleans()),
            state=State.ELIGIBLE
            if name == "fp32"
            else draw(st.sampled_from([State.ELIGIBLE] * 3 + [State.UNVERIFIED])),
            reference_accuracy=0.9,
        )
        for name in names
    ]


actions = st.lists(st.sampled_from(list(OnInfeasible)), max_size=3, unique=True).map(tuple)
slos = st.builds(
    Slo,
    latency_ns=st.none() | st.integers(1, 120).map(lambda ms: ms * MS),
    min_accuracy=st.none() | st.sampled_from([0.8, 0.85, 0.9, 0.95]),
    max_accuracy_drop=st.none() | st.sampled_from([0.0, 0.05]),
    hard=st.booleans(),
    on_infeasible=st.none() | actions,
    variant=st.sampled_from([None, None, None, "fp32", "pruned"]),
    priority=st.sampled_from([0, 0, 1, 8]),
)
instants = st.integers(0, 60).map(lambda half_ms: half_ms * MS // 2)
arrivals = st.builds(
    Arrival,
    at_ns=instants,
    slo=slos,
    model=st.sampled_from(["m", "m", "n"]),
    samples=st.sampled_from([1, 1, 1, 2, 5]),
    size_bytes=st.integers(0, 100),
    shape=st.sampled_from([(8,), (9,)]),
    rpc_deadline_ns=st.none() | st.integers(0, 100).map(lambda ms: ms * MS),
    cancel_at_ns=st.none() | instants,
)


@dataclass(frozen=True, slots=True)
class Scenario:
    """Everything that decides a run."""

    families: tuple[list[Variant], list[Variant]]
    arrivals: list[Arrival]
    changes: list[tuple[int, str, State]]
    executors: int
    delays_ms: tuple[int, int]
    max_requests: int
    max_bytes: int
    seed: int
    failure_rate: float
    outlier_rate: float

    def run(self) -> World:
        """A finished world."""
        random = Random(self.seed)  # noqa: S311 - repeatable on purpose
        models = [
            ModelQueue(ModelKey(name, "1"), family, delay_ms * MS)
            for name, family, delay_ms in zip("mn", self.families, self.delays_ms, strict=True)
        ]
        world = World(
            *models,
            executors=self.executors,
            defaults=Defaults(40 * MS, max_accuracy_drop=0.05),
            max_requests=self.max_requests,
            max_bytes=self.max_bytes,
            service=self._service(random),
            fails=lambda _: random.random() < self.failure_rate,
        )
        world.arrive(*self.arrivals)
        names = {variant.name for variant in models[0].variants}
        for instant_ns, name, state in self.changes:
            if name in names:
                world.at(instant_ns, lambda name=name, state=state: world.set_state(name, state))  # type: ignore[misc]
        return world.run()

    def _service(self, random: Random) -> Service:
        def service(_: Run, profiled_ns: int) -> int:
            slow = 10 if random.random() < self.outlier_rate else 1
            return max(1, int(profiled_ns * slow * random.uniform(0.7, 1.3)))

        return service


scenarios = st.builds(
    Scenario,
    families=st.tuples(families(), families()),
    arrivals=st.lists(arrivals, max_size=40),
    changes=st.lists(
        st.tuples(
            instants,
            st.sampled_from(["fp32", "amp", "pruned"]),
            st.sampled_from([State.DISABLED, State.QUARANTINED, State.ELIGIBLE]),
        ),
        max_size=4,
    ),
    executors=st.integers(1, 3),
    delays_ms=st.tuples(st.sampled_from([0, 0, 5]), st.sampled_from([0, 0, 5])),
    max_requests=st.sampled_from([4, 1000]),
    max_bytes=st.sampled_from([300, 10**9]),
    seed=st.integers(0, 2**32),
    failure_rate=st.sampled_from([0.0, 0.1, 0.6]),
    outlier_rate=st.sampled_from([0.0, 0.1]),
)


@quickly
@given(scenarios)
def test_every_request_ends_exactly_once_and_leaves_nothing_behind(scenario: Scenario) -> None:
    """Through cancels, failures, full queues and changes of state, each request has one end and no memory is kept."""
    world = scenario.run()
    assert sorted(world.ended) == list(range(len(scenario.arrivals)))
    for model in world.scheduler.models.values():
        assert (model.waiting, model.waiting_bytes) == (0, 0)
        for left in (model.regular, model.late):
            assert not (left.queues or left.by_shape or left.classes or left.samples)
        assert not model._by_deadline
    assert world.scheduler.busy_executors == 0
    assert world.scheduler.next_event_ns(world.now_ns) is None


@quickly
@given(scenarios)
def test_no_hard_floor_and_no_pin_is_ever_broken(scenario: Scenario) -> None:
    """Whoever asked for a hard floor or one variant ran, if at all, on a variant whose proof satisfies it."""
    world = scenario.run()
    families = dict(zip("mn", scenario.families, strict=True))
    for batch in world.batches:
        used = next(variant for variant in families[batch.model] if variant.name == batch.variant)
        for member in batch.members:
            slo = scenario.arrivals[member.number].slo
            if slo.variant is not None:
                assert used.name == slo.variant
            elif slo.hard:
                assert used.proven_accuracy >= (slo.min_accuracy or 0.0)
                assert slo.max_accuracy_drop is None or used.proven_drop <= slo.max_accuracy_drop


@quickly
@given(scenarios)
def test_what_becomes_hopeless_ends_at_detection(scenario: Scenario) -> None:
    """An expired request ends before its deadline, on arrival if that had passed, or when its executor is given up."""
    world = scenario.run()
    given_up_ns = {
        member.number: batch.at_ns + max(10 * batch.predicted_ns, 250 * MS) + 1  # when an executor counts as stuck
        for batch in world.batches
        for member in batch.members
    }
    for number, ended in world.ended.items():
        if ended.outcome is Outcome.EXPIRED:
            request = world.requests[number]
            assert ended.at_ns <= max(request.deadline_ns, request.arrival_ns, given_up_ns.get(number, 0))


@quickly
@given(scenarios)
def test_a_default_latency_is_never_a_reason_to_refuse(scenario: Scenario) -> None:
    """In unbounded queues with lasting variants, a request without floor, latency or pin is always tried."""
    plain = [
        replace(arrival, slo=Slo(priority=arrival.slo.priority), rpc_deadline_ns=None, samples=1)
        if place % 2
        else arrival
        for place, arrival in enumerate(scenario.arrivals)
    ]
    world = replace(scenario, arrivals=plain, changes=[], max_requests=10**6, max_bytes=10**9).run()
    for number in range(1, len(plain), 2):
        assert world.outcome(number) not in REFUSED


@settings(quickly, max_examples=40)
@given(scenarios)
def test_equal_seeds_give_equal_runs(scenario: Scenario) -> None:
    """Batches and ends are the same to the nanosecond: every tie is broken on purpose."""
    first, second = scenario.run(), scenario.run()
    assert first.batches == second.batches
    assert first.ended == second.ended


@quickly
@given(
    family=families(),
    asked=st.lists(slos, min_size=1, max_size=6),
    samples=st.sampled_from([1, 2, 5]),
    delay_ms=st.sampled_from([0, 1, 7, 50]),
    executors=st.integers(1, 2),
)
def test_an_idle_server_that_obeys_next_event_lets_no_feasible_request_expire(
    family: list[Variant], asked: list[Slo], samples: int, delay_ms: int, executors: int
) -> None:
    """One request at a time, at any queue delay: it is refused on arrival as never feasible, or answered in time."""
    model = ModelQueue(ModelKey("m", "1"), family, delay_ms * MS)
    world = World(model, executors=executors, defaults=Defaults(120 * MS), service=exact)
    numbers = world.arrive(*[Arrival(at * 1000 * MS, slo, samples=samples) for at, slo in enumerate(asked)])
    world.run()
    for number in numbers:
        ended, arrival = world.ended[number], world.arrivals[number]
        if number in world.requests and world.requests[number].late:
            assert ended.outcome is Outcome.LATE or ended.at_ns <= world.requests[number].deadline_ns
        elif ended.outcome in (Outcome.INFEASIBLE, Outcome.INVALID):
            assert ended.at_ns == arrival.at_ns
        else:
            assert ended.outcome in (Outcome.OK, Outcome.DEGRADED)


@quickly
@given(
    family=families(),
    budgets_ms=st.lists(st.integers(20, 200), min_size=2, max_size=25),
    floors=st.lists(st.sampled_from([None, 0.85, 0.9]), min_size=25, max_size=25),
    executors=st.integers(1, 2),
)
def test_admitted_requests_are_answered_in_time_when_all_goes_as_predicted(
    family: list[Variant], budgets_ms: list[int], floors: list[float | None], executors: int
) -> None:
    """A herd at one instant and nothing after it: what is let in and is not overloaded meets its deadline."""
    world = World(ModelQueue(ModelKey("m", "1"), family), executors=executors)
    world.arrive(
        *[Arrival(0, Slo(ms * MS, floor)) for ms, floor in zip(budgets_ms, floors, strict=False)],
    )
    world.run()
    overloaded = any(batch.reason == "overload" for batch in world.batches)
    for ended in world.ended.values():
        assert ended.outcome is not Outcome.LATE
        assert overloaded or ended.outcome is not Outcome.EXPIRED
