"""The engine's threads, with a real scheduler, a transport without a network and sessions that do as they are told."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from fakes import WAIT_S, FakeSession, World, answer, infer_call, parameters_of, variant

from server.events import BatchRan, Event, Listener, RequestEnded
from server.scheduling.model_queue import ModelQueue
from server.scheduling.slo import ModelKey
from server.transport.transport import Call
from variants.runtimes.runtime import Array

MS = 1_000_000
INTERNAL, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE, INVALID, NOT_FOUND = 13, 4, 8, 14, 3, 5


class Gate:
    """Holds the first batch in the runtime until it is opened."""

    def __init__(self) -> None:
        self.entered = threading.Event()
        self.opened = threading.Event()

    def __call__(self, _: Array) -> None:
        if not self.opened.is_set():
            self.entered.set()
            assert self.opened.wait(WAIT_S)

    def wait_entered(self) -> None:
        assert self.entered.wait(WAIT_S)


def one_variant(
    before: Callable[[Array], object] = lambda _: None, executors: int = 1, listeners: Sequence[Listener] = ()
) -> World:
    """A world whose model has nothing but fp32."""
    return World({"fp32": FakeSession(before)}, [variant("fp32", 1.0, MS)], executors, listeners)


def test_a_request_is_answered_with_its_own_rows() -> None:
    """An inference comes back with the model's output for its input."""
    with one_variant() as world:
        call = infer_call([[1, 2], [3, 4]])
        world.transport.send(call)
        np.testing.assert_array_equal(answer(world.transport.reply_to(call)), [[2, 4], [6, 8]])


def test_requests_that_wait_together_run_together() -> None:
    """What arrives while the executor is busy shares the next batch, and everybody gets the own rows."""
    gate = Gate()
    with one_variant(gate) as world:
        first = infer_call([[0, 0]])
        world.transport.send(first)
        gate.wait_entered()
        calls = [infer_call([[n, n]]) for n in range(1, 6)]
        world.transport.send(*calls)
        gate.opened.set()
        for n, call in enumerate(calls, start=1):
            reply = world.transport.reply_to(call)
            np.testing.assert_array_equal(answer(reply), [[2 * n, 2 * n]])
            assert parameters_of(reply)["batch_size"] == 5


def test_the_response_tells_who_answered_and_how_long_it_took() -> None:
    """Every parameter of the contract is in the response, with its type."""
    with one_variant() as world:
        call = infer_call([[1, 2]])
        world.transport.send(call)
        parameters = parameters_of(world.transport.reply_to(call))
    assert {name: type(value) for name, value in parameters.items()} == {
        "variant": str,
        "variant_accuracy": float,
        "reason": str,
        "batch_size": int,
        "queue_us": int,
        "compute_us": int,
        "slo_met": bool,
        "floor_met": bool,
    }
    assert (parameters["variant"], parameters["slo_met"], parameters["floor_met"]) == ("fp32", True, True)


@pytest.mark.parametrize("rows", [[[1, 2]], [[1, 2, 3]]], ids=["answered", "refused"])
def test_whoever_has_an_answer_finds_it_counted(rows: list[list[float]]) -> None:
    """The listeners hear how a request ended before its client does."""
    replied: list[bool] = []

    def listen(event: Event) -> None:
        if isinstance(event, RequestEnded):
            replied.append(call in world.transport.replies)

    with one_variant(listeners=[listen]) as world:
        call = infer_call(rows)
        world.transport.send(call)
        world.transport.reply_to(call)
    assert replied == [False]


def test_a_listener_that_fails_costs_no_reply() -> None:
    """The client is answered and the other listeners are told."""

    def fail(event: Event) -> None:
        raise RuntimeError(f"a bug met {event}")

    with one_variant(listeners=[fail]) as world:
        call = infer_call([[1, 2]])
        world.transport.send(call)
        assert world.transport.reply_to(call).status is None
        assert world.recorder.outcomes() == ["ok"]


@pytest.mark.parametrize("rows", [1, 20], ids=["whole", "in parts"])
def test_an_answered_request_is_freed_at_once(rows: int) -> None:
    """Its arrays do not wait for Python to look for cycles, which it does by the number of objects, not their size."""
    outputs: list[weakref.ref[Array]] = []

    class Remembering(FakeSession):
        def run(self, inputs: Mapping[str, Array]) -> list[Array]:
            answer = super().run(inputs)
            outputs.extend(weakref.ref(array) for array in answer)
            return answer

    gc.disable()
    try:
        with World({"fp32": Remembering()}, [variant("fp32", 1.0, MS)]) as world:
            call = infer_call([[1, 2]] * rows)
            world.transport.send(call)
            world.transport.reply_to(call)
            wait_until(lambda: all(output() is None for output in outputs))
            assert outputs
    finally:
        gc.enable()


def test_a_drain_waits_until_the_last_reply_is_out() -> None:
    """An inference that has ended but not been replied to is not yet done with."""
    done: list[bool] = []

    def listen(event: Event) -> None:
        if isinstance(event, RequestEnded):
            done.append(world.engine.drain(0))

    with one_variant(listeners=[listen]) as world:
        call = infer_call([[1, 2]])
        world.transport.send(call)
        world.transport.reply_to(call)
        assert world.engine.drain(WAIT_S)
    assert done == [False]


def test_a_request_above_the_maximum_batch_is_split_and_put_together() -> None:
    """20 rows at a maximum of 8 run as three batches and come back as 20 rows in order."""
    with one_variant() as world:
        rows = [[n, -n] for n in range(20)]
        call = infer_call(rows)
        world.transport.send(call)
        np.testing.assert_array_equal(answer(world.transport.reply_to(call)), np.array(rows) * 2)
        assert max(len(batch) for batch in world.sessions["fp32"].batches) <= 8


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


def test_a_hopeless_request_is_refused_while_every_executor_is_busy() -> None:
    """The keeper ends it when it becomes hopeless, not when the executor comes back."""
    gate = Gate()
    with one_variant(gate) as world:
        world.transport.send(infer_call([[0, 0]]))
        gate.wait_entered()
        call = infer_call([[1, 1]], slo_latency_ms=50.0)
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        assert status is not None and status.code == DEADLINE_EXCEEDED
        gate.opened.set()


def test_new_work_is_admitted_while_every_executor_is_busy() -> None:
    """Bad input is refused at once although the only executor runs a batch."""
    gate = Gate()
    with one_variant(gate) as world:
        world.transport.send(infer_call([[0, 0]]))
        gate.wait_entered()
        call = infer_call([[1, 1]], slo_latency_ms=-1.0)
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        gate.opened.set()
        assert status is not None and status.code == INVALID


def test_draining_answers_what_was_admitted_and_refuses_the_rest() -> None:
    """A request in the runtime is answered, a newcomer gets UNAVAILABLE."""
    gate = Gate()
    with one_variant(gate) as world:
        admitted = infer_call([[1, 1]])
        world.transport.send(admitted)
        gate.wait_entered()
        drained: list[bool] = []
        drain = threading.Thread(target=lambda: drained.append(world.engine.drain(WAIT_S)))
        drain.start()
        wait_until(lambda: refused_with(world, UNAVAILABLE))
        gate.opened.set()
        drain.join(WAIT_S)
        assert drained == [True]
        assert world.transport.reply_to(admitted).status is None


def test_every_request_ends_in_one_outcome() -> None:
    """Answered, invalid and unknown requests together are as many outcomes as requests."""
    with one_variant(executors=2) as world:
        good = [infer_call([[n, n]]) for n in range(50)]
        invalid = [infer_call([[1, 1]], slo_min_accuracy=2.0) for _ in range(5)]
        unknown = [Call(c.method, c.message.replace(b"m", b"n", 1), c.arrival_ns, None, (), "") for c in good[:5]]
        world.transport.send(*good, *invalid, *unknown)
        for call in (*good, *invalid, *unknown):
            world.transport.reply_to(call)
        wait_until(lambda: len(world.recorder.outcomes()) == 60)
    assert world.recorder.outcomes() == ["invalid"] * 10 + ["ok"] * 50


@pytest.mark.parametrize("executors", [1, 2, 4])
def test_many_clients_lose_nothing(executors: int) -> None:
    """400 requests in small waves are all answered with their own rows."""
    with one_variant(executors=executors) as world:
        calls: list[Call] = []
        for wave in range(40):
            some = [infer_call([[wave, n]]) for n in range(10)]
            calls += some
            world.transport.send(*some)
        for index, call in enumerate(calls):
            wave, n = divmod(index, 10)
            np.testing.assert_array_equal(answer(world.transport.reply_to(call)), [[2 * wave, 2 * n]])


def refused_with(world: World, code: int) -> bool:
    """Send a request; True when it was refused with this status at once."""
    call = infer_call([[2, 2]], slo_latency_ms=5.0)
    world.transport.send(call)
    status = world.transport.reply_to(call).status
    return status is not None and status.code == code


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads get to a state that they must reach."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "never happened"
        threading.Event().wait(0.001)


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


def test_a_request_that_would_fill_hundreds_of_batches_is_refused() -> None:
    """It is told the limit before anything of it is queued."""
    with one_variant() as world:
        call = infer_call(np.zeros((8 * 256 + 1, 2)).tolist())
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        assert status is not None and status.code == INVALID and "2048" in status.message
        assert not world.sessions["fp32"].batches


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
