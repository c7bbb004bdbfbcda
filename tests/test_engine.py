"""The engine's threads, with a real scheduler, a transport without a network and sessions that do as they are told."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping

import numpy as np
import pytest
from fakes import WAIT_S, FakeSession, Gate, World, answer, infer_call, one_variant, parameters_of, variant, wait_until

from server.events import Event, RequestEnded
from server.transport.transport import Call
from variants.runtimes.runtime import Array

MS = 1_000_000
INTERNAL, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNAVAILABLE, INVALID, NOT_FOUND = 13, 4, 8, 14, 3, 5


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


def test_a_request_that_would_fill_hundreds_of_batches_is_refused() -> None:
    """It is told the limit before anything of it is queued."""
    with one_variant() as world:
        call = infer_call(np.zeros((8 * 256 + 1, 2)).tolist())
        world.transport.send(call)
        status = world.transport.reply_to(call).status
        assert status is not None and status.code == INVALID and "2048" in status.message
        assert not world.sessions["fp32"].batches
