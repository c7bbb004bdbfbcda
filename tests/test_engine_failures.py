"""A runtime, a client, a listener or a reload lets the engine down: nobody else is harmed, nobody is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import WAIT_S, FakeSession, Gate, World, answer, infer_call, one_variant, parameters_of, variant, wait_until

from server.events import BatchRan, Event, RequestEnded
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.policy import Decision, Moment
from server.scheduling.slo import ModelKey, Request
from server.transport.transport import Call, Reply, Taken
from variants.runtimes.runtime import Array

MS = 1_000_000
INTERNAL, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE, INVALID, NOT_FOUND = 13, 4, 8, 14, 3, 5


def test_a_listener_that_fails_costs_no_reply() -> None:
    """The client is answered and the other listeners are told."""

    def fail(event: Event) -> None:
        raise RuntimeError(f"a bug met {event}")

    with one_variant(listeners=[fail]) as world:
        call = infer_call([[1, 2]])
        world.transport.send(call)
        assert world.transport.reply_to(call).status is None
        assert world.recorder.outcomes() == ["ok"]


def test_cancelling_one_of_a_running_batch_leaves_its_mates_unharmed() -> None:
    """The others of the batch are answered; the cancelled one gets nothing and counts once."""
    gate = Gate()
    with one_variant(gate) as world:
        calls = [infer_call([[n, n]]) for n in range(3)]
        world.transport.send(*calls)
        gate.wait_entered()
        running = [call for call in calls if world.sessions["fp32"].batches[0][0, 0] * 1.0 == calls.index(call)]
        victim = running[0]
        world.transport.cancel(victim)
        wait_until(lambda: "cancelled" in world.recorder.outcomes())
        gate.opened.set()
        for call in calls:
            if call is not victim:
                assert world.transport.reply_to(call).status is None
    assert world.recorder.outcomes() == ["cancelled", "ok", "ok"]


def test_a_cancelled_request_that_waits_never_runs() -> None:
    """Its rows are in no batch."""
    gate = Gate()
    with one_variant(gate) as world:
        first, waiting, last = infer_call([[0, 0]]), infer_call([[7, 7]]), infer_call([[1, 1]])
        world.transport.send(first)
        gate.wait_entered()
        world.transport.send(waiting)
        world.transport.cancel(waiting)
        world.transport.send(last)
        gate.opened.set()
        world.transport.reply_to(last)
        assert not any((batch == 7).any() for batch in world.sessions["fp32"].batches)


def test_one_poisonous_request_fails_alone() -> None:
    """A batch that fails is tried again request by request, so the innocent are answered."""
    gate = Gate()

    def poisoned(batch: Array) -> None:
        gate(batch)
        if (batch == 13).any():
            raise RuntimeError("poison /secret/path")

    with one_variant(poisoned) as world:
        world.transport.send(infer_call([[0, 0]]))
        gate.wait_entered()
        good, bad = [infer_call([[n, n]]) for n in range(4)], infer_call([[13, 13]])
        world.transport.send(*good[:2], bad, *good[2:])
        gate.opened.set()
        for n, call in enumerate(good):
            np.testing.assert_array_equal(answer(world.transport.reply_to(call)), [[2 * n, 2 * n]])
        status = world.transport.reply_to(bad).status
        assert status is not None and status.code == INTERNAL
        assert "secret" not in status.message and "incident" in status.message


def test_a_failed_variant_is_replaced_by_another_once() -> None:
    """The request is answered by the other variant, with reason retry."""

    def broken(_: Array) -> None:
        raise RuntimeError("broken")

    sessions = {"fp32": FakeSession(broken), "int8": FakeSession()}
    with World(sessions, [variant("fp32", 1.0, MS), variant("int8", 0.9, MS // 2)]) as world:
        call = infer_call([[1, 1]])
        world.transport.send(call)
        parameters = parameters_of(world.transport.reply_to(call))
        assert (parameters["variant"], parameters["reason"]) == ("int8", "retry")
        failed = [event for event in world.recorder.events if isinstance(event, BatchRan) and event.failed]
        assert [event.variant for event in failed] == ["fp32"]


def test_a_failure_is_counted_for_the_variant_that_failed() -> None:
    """The client and the listeners are told which variant it was; who never got one counts under none."""

    def broken(_: Array) -> None:
        raise RuntimeError("broken")

    with one_variant(broken) as world:
        failed, refused = infer_call([[1, 1]]), infer_call([[1, 1]], slo_min_accuracy=2.0)
        world.transport.send(failed, refused)
        assert ("gearshift-variant", "fp32") in world.transport.reply_to(failed).trailing
        world.transport.reply_to(refused)
    ends = {event.outcome: event.variant for event in world.recorder.events if isinstance(event, RequestEnded)}
    assert ends == {"failed": "fp32", "invalid": "none"}


def test_a_model_that_loses_rows_answers_nobody_wrongly() -> None:
    """An output with another number of rows is a failure, not somebody else's answer."""

    class Lossy(FakeSession):
        def run(self, inputs: dict[str, Array]) -> list[Array]:  # type: ignore[override]
            return [super().run(inputs)[0][:-1]]

    with World({"fp32": Lossy()}, [variant("fp32", 1.0, MS)]) as world:
        call = infer_call([[1, 1]])
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        assert status is not None and status.code == INTERNAL


@pytest.mark.parametrize("executors", [1, 2, 4])
def test_a_retry_does_not_wait_for_the_next_call(executors: int) -> None:
    """What waits again after a failure is seen by whichever executor leads, although no call arrives."""

    def broken(_: Array) -> None:
        wait_until(lambda: world.transport.waiting)
        raise RuntimeError("broken")

    sessions = {"fp32": FakeSession(broken), "int8": FakeSession()}
    with World(sessions, [variant("fp32", 1.0, MS), variant("int8", 0.9, MS // 2)], executors) as world:
        call = infer_call([[1, 1]])
        world.transport.send(call)
        assert parameters_of(world.transport.reply_to(call))["variant"] == "int8"


def test_an_answer_that_cannot_be_encoded_harms_no_other() -> None:
    """A split request whose parts do not fit together fails alone; the server drains."""

    class Widening(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> list[Array]:
            doubled = super().run(inputs)[0]
            return [np.pad(doubled, ((0, 0), (0, len(doubled) - 1)))]

    with World({"fp32": Widening()}, [variant("fp32", 1.0, MS)]) as world:
        split, mate = infer_call([[n, n] for n in range(11)]), infer_call([[5, 5]])
        world.transport.send(split, mate)
        status = world.transport.reply_to(split).status
        assert status is not None and status.code == INTERNAL
        assert answer(world.transport.reply_to(mate))[0, 0] == 10
        assert world.engine.drain(WAIT_S)
    assert world.recorder.outcomes() == ["failed", "ok"]


class Struck(FitDrain):
    """Has a bug that `struck` lets it meet, in `decide` or on the second part of a request."""

    struck = False

    def arrived(self, model: ModelQueue, request: Request, now_ns: int) -> None:
        if self.struck and model.waiting > 1:
            raise RuntimeError("a bug")

    def decide(self, model: ModelQueue, moment: Moment) -> Decision:
        if self.struck:
            raise RuntimeError("a bug")
        return super().decide(model, moment)


class Stepped:
    """An engine without threads, whose clock stands still until it is told the time in ms: the test does each step."""

    def __init__(self) -> None:
        self.now_ns = 10**15
        self.policy = Struck()
        one = {"fp32": FakeSession()}, [variant("fp32", 1.0, MS)]
        self.world = World(*one, policy=lambda: self.policy, clock=lambda: self.now_ns)

    def call(self, latency_ms: float, rows: int = 1) -> Call:
        """A call that arrives now and is admitted, or not."""
        call = infer_call([[0, 0]] * rows, slo_latency_ms=float(latency_ms))
        call.arrival_ns = self.now_ns
        self.world.engine.handle(Taken([call], []))
        return call

    def codes(self, *calls: Call) -> list[int | None]:
        """The status codes that calls were told; None for those without a reply."""
        replies = [self.world.transport.replies.get(call, []) for call in calls]
        return [reply[0].status.code if reply and reply[0].status is not None else None for reply in replies]


def test_who_expired_before_the_policy_met_a_bug_is_told_at_once() -> None:
    """The scheduler has let go of it by then, and will not speak of it again."""
    stepped = Stepped()
    hopeless, patient = stepped.call(20), stepped.call(500)
    stepped.now_ns += 20 * MS
    stepped.policy.struck = True
    with pytest.raises(RuntimeError):
        stepped.world.engine.decide(0)
    assert stepped.codes(hopeless, patient) == [DEADLINE_EXCEEDED, None]


def test_who_expired_while_a_call_was_half_admitted_is_told_although_the_call_fails() -> None:
    """Admitting its first part found somebody hopeless; its second part met a bug."""
    stepped = Stepped()
    hopeless = stepped.call(20)
    stepped.now_ns += 20 * MS
    stepped.policy.struck = True
    assert stepped.codes(hopeless, stepped.call(500, rows=9)) == [DEADLINE_EXCEEDED, INTERNAL]


def test_an_end_that_cannot_be_told_costs_neither_another_its_own_nor_a_batch_its_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A reply that fails is that client's loss alone."""
    stepped = Stepped()
    lost, told, patient = stepped.call(20), stepped.call(20), stepped.call(500)
    reply = stepped.world.transport.reply

    def failing(replies: Sequence[Reply]) -> None:
        if any(each.call is lost for each in replies):
            raise OSError("no way to this client")
        reply(replies)

    monkeypatch.setattr(stepped.world.transport, "reply", failing)
    stepped.now_ns += 20 * MS
    run, _ = stepped.world.engine.decide(0)
    assert run is not None
    stepped.world.engine.execute(run)
    assert stepped.codes(lost, told) == [None, DEADLINE_EXCEEDED]
    assert answer(stepped.world.transport.reply_to(patient)).shape == (1, 2)


def test_a_client_that_goes_while_its_batch_is_answered_harms_no_mate() -> None:
    """Between the run and its own answer one client goes: it is let go of, and the third of the batch is answered."""
    gate = Gate()

    def listen(event: Event) -> None:
        in_batch = isinstance(event, RequestEnded) and event.outcome == "ok" and world.recorder.outcomes() == ["ok"]
        if in_batch:  # the first of the three, about to be replied to
            world.transport.cancel(goes)
            wait_until(lambda: "cancelled" in world.recorder.outcomes())

    with one_variant(gate, listeners=[listen]) as world:
        world.transport.send(infer_call([[0, 0]]))
        gate.wait_entered()
        first, goes, last = (infer_call([[n, n]]) for n in range(3))
        world.transport.send(first, goes, last)
        gate.opened.set()
        for call in (first, last):
            assert world.transport.reply_to(call).status is None
    assert world.recorder.outcomes() == ["cancelled", "ok", "ok", "ok"]


def test_a_request_for_a_model_that_was_just_replaced_never_runs_on_the_new_one() -> None:
    """The floor class of a request refers to the ranking of the model it was read for."""
    with one_variant() as world:
        old = world.model
        swapped = [variant("other", 1.0, MS), variant("fp32", 0.5, MS)]
        new = replace(old, variants=tuple(swapped), queue=ModelQueue(ModelKey("m", "1"), swapped))
        world.engine.add_model(new)
        world.models.add(old)  # as seen by a thread that looked the model up a moment earlier
        call = infer_call([[1, 1]])
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        assert status is not None and status.code == UNAVAILABLE
