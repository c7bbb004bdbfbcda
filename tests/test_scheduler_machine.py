"""What holds for the bare scheduler after any sequence of events, however its callers and executors behave."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_driver import LENGTHS, Ask, Driver, Setup
from scheduling_models import MS, variant

from server.scheduling.slo import OnInfeasible, Slo
from variants.variant import Interval, LatencyProfile, State, Variant

NAMES = ["fp32", "amp", "int8-static", "pruned"]
POLICIES = ["slackfit+ed", "maxacc", "nexus-fastest", "clockwork-fastest+ed", "proteus-1s+ed", "model-switching-0.1s"]


@st.composite
def families(draw: st.DrawFn) -> tuple[Variant, ...]:
    """One to four variants of any speed and accuracy; a busy neighbour and long inputs may slow them."""
    lengths, crowd = draw(st.booleans()), draw(st.sampled_from([1.0, 1.0, 1.5, 3.0]))
    return tuple(_variant(draw, name, crowd, lengths=lengths) for name in NAMES[: draw(st.integers(1, 4))])


def _variant(draw: st.DrawFn, name: str, crowd: float, *, lengths: bool) -> Variant:
    accuracy = 0.9 if name == "fp32" else draw(st.sampled_from([0.8, 0.86, 0.9, 0.95]))
    drop = max(0.0, 0.9 - accuracy)
    made = variant(
        name,
        accuracy,
        draw(st.integers(0, 10)),
        draw(st.integers(1, 8)) / 2,
        sizes=draw(st.sampled_from([(1, 2, 4, 8), (1, 3), (1,), (2, 8)])),
        batchable=draw(st.booleans()) or draw(st.booleans()),
        state=State.ELIGIBLE if name == "fp32" else draw(st.sampled_from([State.ELIGIBLE] * 3 + [State.UNVERIFIED])),
    )
    alone = made.profile
    assert alone is not None
    return replace(
        made,
        score=Interval(accuracy, accuracy - 0.01, accuracy + 0.01),
        drop=None if name == "fp32" else Interval(drop, drop - 0.01, drop + 0.01),
        crowded=None if crowd == 1.0 else _slower(alone, crowd),
        lengths=((10, alone), (40, _slower(alone, 3.0))) if lengths else (),
    )


def _slower(profile: LatencyProfile, factor: float) -> LatencyProfile:
    return LatencyProfile(profile.batch_sizes, tuple(int(ns * factor) for ns in profile.latencies_ns))


def setups(policies: list[str]) -> st.SearchStrategy[Setup]:
    """Servers of two models."""
    delays = st.sampled_from([0, 0, 5])
    return st.builds(
        Setup,
        families=st.tuples(families(), families()),
        delays_ms=st.tuples(delays, delays),
        executors=st.integers(1, 3),
        max_requests=st.sampled_from([4, 1000]),
        max_bytes=st.sampled_from([60, 10**6]),
        policy=st.sampled_from(policies),
    )


asks = st.builds(
    Ask,
    slo=st.builds(
        Slo,
        latency_ns=st.none() | st.integers(1, 120).map(lambda ms: ms * MS) | st.just(2000 * MS),
        min_accuracy=st.none() | st.sampled_from([0.79, 0.8, 0.85, 0.9]),
        max_accuracy_drop=st.none() | st.sampled_from([0.0, 0.01, 0.04, 0.11]),
        hard=st.none() | st.booleans(),
        on_infeasible=st.none()
        | st.just((OnInfeasible.LATE,))
        | st.lists(st.sampled_from(list(OnInfeasible)), max_size=3, unique=True).map(tuple),
        variant=st.sampled_from([None] * 5 + ["fp32", "pruned"]),
        priority=st.sampled_from([0, 0, 1, 8]),
    ),
    model=st.sampled_from("mmn"),
    samples=st.sampled_from([1, 1, 1, 2, 5]),
    size_bytes=st.sampled_from([0, 10, 25]),
    shape=st.sampled_from(list(LENGTHS)),
    rpc_ms=st.none() | st.sampled_from([0, 30, 3000]),
    ago_ns=st.sampled_from([0, 0, MS]),
)
herds = st.lists(asks, min_size=1, max_size=4) | st.tuples(asks, st.integers(2, 6)).map(
    lambda pair: [pair[0]] * pair[1]
)
numbers = st.integers(0, 1 << 16)
pauses = st.sampled_from([1, MS // 10, MS, 4 * MS, 20 * MS, 300 * MS, 10_000 * MS])
states = st.sampled_from([State.DISABLED, State.QUARANTINED, State.ELIGIBLE])


class SchedulerMachine(RuleBasedStateMachine):
    """Clients, executors and operators in any order; every step is taken again by a second scheduler at the end."""

    driver: Driver
    policies: ClassVar[tuple[str, ...]] = ("fitdrain",)

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """A server at rest."""
        self.driver = Driver(data.draw(setups(list(self.policies))))
        self.steps: list[tuple[str, tuple[object, ...]]] = []
        self.sound = True

    def step(self, name: str, *arguments: object) -> None:
        """Take a step and remember it."""
        self.sound = False
        getattr(self.driver, name)(*arguments)
        self.sound = True
        self.steps.append((name, arguments))

    @rule(herd=herds, asked=st.booleans())
    def arrive(self, herd: list[Ask], asked: bool) -> None:
        """Clients send requests; the idle executors may look at them at once, or somebody is slow."""
        for ask in herd:
            self.step("arrive", ask)
        if asked:
            self.step("settle")

    @rule(pause=pauses)
    def wait(self, pause: int) -> None:
        """Time passes, and nobody notices."""
        self.step("wait", pause)

    @rule(early_ns=st.sampled_from([0, 1]))
    def follow(self, early_ns: int) -> None:
        """Time passes until the scheduler wants to be asked, or to the last instant before that."""
        self.step("follow", early_ns)

    @precondition(lambda self: self.driver.idle)
    @rule(which=numbers)
    def decide(self, which: int) -> None:
        """One idle executor asks for work."""
        self.step("decide", self.driver.idle[which % len(self.driver.idle)])

    @precondition(lambda self: self.driver.running)
    @rule(which=numbers, share=st.sampled_from([0.0, 0.3, 0.9, 1.0, 1.3, 4.0, 12.0]), asked=st.booleans())
    def finish(self, which: int, share: float, asked: bool) -> None:
        """A batch ends well, sooner or later than predicted."""
        self.step("finish", self._busy(which), share)
        if asked:
            self.step("settle")

    @precondition(lambda self: self.driver.running)
    @rule(which=numbers, times=st.integers(1, 3))
    def fail(self, which: int, times: int) -> None:
        """A batch fails, and perhaps what is tried next."""
        for _ in range(times):
            if self.driver.running:
                self.step("fail", self._busy(which))
                self.step("settle")

    @precondition(lambda self: any(model.late for model in self.driver.scheduler.models.values()))
    @rule(name=st.sampled_from("mn"), latencies_ms=st.lists(st.integers(10, 90), min_size=1, max_size=3))
    def age(self, name: str, latencies_ms: list[int]) -> None:
        """Late work has waited long when others come who can be in time."""
        self.step("wait", 600 * MS)
        for latency_ms in latencies_ms:
            self.step("arrive", Ask(Slo(latency_ms * MS), name))
        self.step("settle")

    @precondition(lambda self: self.driver.running)
    @rule()
    def stick(self) -> None:
        """The running batches take so long that their executors are given up on; the others are asked."""
        self.step("wait", 251 * MS + 10 * max(run.predicted_ns for run in self.driver.running.values()))
        self.step("settle")

    @rule(which=numbers)
    def lose_or_regain(self, which: int) -> None:
        """An executor dies with whatever it does, or a dead one comes back."""
        executor = which % self.driver.setup.executors
        self.step("regain" if executor in self.driver.dead else "lose", executor)

    @precondition(lambda self: self.driver.open)
    @rule(which=numbers)
    def cancel(self, which: int) -> None:
        """A client goes away."""
        self.step("cancel", self.driver.open[which % len(self.driver.open)])

    @rule(name=st.sampled_from("mn"), changed=st.sampled_from(NAMES), state=states)
    def set_state(self, name: str, changed: str, state: State) -> None:
        """A variant is taken out of service, or back."""
        self.step("set_state", name, changed, state)

    @rule(name=st.sampled_from("mn"))
    def reload(self, name: str) -> None:
        """A model is loaded anew."""
        self.step("reload", name)

    def teardown(self) -> None:
        """Everybody ends, nothing stays behind, and the same steps lead to the same log."""
        if not getattr(self, "sound", False):
            return
        self.step("drain")
        again = Driver(self.driver.setup)
        for name, arguments in self.steps:
            getattr(again, name)(*arguments)
        assert again.log == self.driver.log

    def _busy(self, which: int) -> int:
        return list(self.driver.running)[which % len(self.driver.running)]


class PublishedPolicies(SchedulerMachine):
    """The same under the policies of others, which may overrun deadlines but neither floors nor anybody's end."""

    policies = tuple(POLICIES)


often = settings(max_examples=80, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = often
TestPublishedPolicies = PublishedPolicies.TestCase
TestPublishedPolicies.settings = settings(often, max_examples=30)
