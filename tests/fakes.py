"""Fakes that tests share: a transport without a network, a session without a runtime, a listener that remembers."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from protos import open_inference_pb2 as pb
from server.engine import Engine
from server.events import Event, Listener, RequestEnded
from server.models import Models, ServedModel
from server.scheduling.admission import Defaults
from server.scheduling.model_queue import ModelQueue
from server.scheduling.policies import PolicyFactory
from server.scheduling.policies.fitdrain import FitDrain
from server.scheduling.scheduler import Scheduler
from server.scheduling.slo import ModelKey
from server.transport.transport import Call, Reply, Taken
from server.wire.inference import MODEL_INFER, Signature
from variants.runtimes.runtime import Array
from variants.variant import Interval, LatencyProfile, State, TensorSpec, Variant

WAIT_S = 10
"""How long a test waits for what must happen before it calls it a hang."""


class FakeTransport:
    """Calls are put in by `send` and `cancel`; replies are kept by call."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._calls: list[Call] = []
        self._cancelled: list[Call] = []
        self._woken = False
        self.waiting = False
        """Whether a thread waits in `take`."""
        self.replies: dict[Call, list[Reply]] = {}

    def start(self) -> int:
        return 0

    def stop(self, grace_ns: int) -> None:
        pass

    def take(self, timeout_ns: int | None) -> Taken:
        with self._changed:
            timeout_s = None if timeout_ns is None else timeout_ns / 1e9
            self.waiting = True
            self._changed.wait_for(lambda: self._calls or self._cancelled or self._woken, timeout_s)
            self.waiting = False
            taken = Taken(self._calls, self._cancelled)
            self._calls, self._cancelled, self._woken = [], [], False
            return taken

    def wake(self) -> None:
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def reply(self, replies: Sequence[Reply]) -> None:
        with self._changed:
            for reply in replies:
                self.replies.setdefault(reply.call, []).append(reply)
            self._changed.notify_all()

    def send(self, *calls: Call) -> None:
        """Let calls arrive together."""
        with self._changed:
            self._calls += calls
            self._changed.notify_all()

    def cancel(self, call: Call) -> None:
        """Let the client of a call go away."""
        with self._changed:
            call.cancelled = True
            self._cancelled.append(call)
            self._changed.notify_all()

    def reply_to(self, call: Call) -> Reply:
        """The one reply to a call, waited for."""
        with self._changed:
            assert self._changed.wait_for(lambda: call in self.replies, WAIT_S), f"no reply to {call}"
            assert len(self.replies[call]) == 1
            return self.replies[call][0]


class FakeSession:
    """Doubles its input `x`. `before` runs first, with the batch; it may block or raise."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (-1, 2)),)
    batch_axis = True

    def __init__(self, before: Callable[[Array], object] = lambda _: None) -> None:
        self.before = before
        self.batches: list[Array] = []

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        self.batches.append(inputs["x"])
        self.before(inputs["x"])
        return [inputs["x"] * 2]


class Recorder:
    """Remembers every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def outcomes(self) -> list[str]:
        """The outcomes so far, sorted."""
        return sorted(event.outcome for event in self.events if isinstance(event, RequestEnded))


class NoServices:
    """Services for tests of inferences alone."""

    def answer(self, call: Call) -> Sequence[Reply]:
        raise AssertionError(f"unexpected call {call.method}")

    def forget(self, call: Call) -> None:
        pass


def variant(name: str, score: float, latency_ns: int, state: State = State.ELIGIBLE, sizes: int = 8) -> Variant:
    """A measured variant whose latency hardly grows with the batch; its drop is what `score` lacks to 1."""
    profile = LatencyProfile((1, sizes), (latency_ns, latency_ns + sizes * latency_ns // 100))
    drop = Interval(1 - score, 1 - score, 1 - score)
    return Variant(name, state, "", "fp32", "fake", "cpu", Interval(score, score, score), drop, profile)


class World:
    """An engine with one model `m` over fakes; `with` lets its threads serve, else the test does their work."""

    def __init__(
        self,
        sessions: Mapping[str, FakeSession],
        variants: Sequence[Variant],
        executors: int = 1,
        listeners: Sequence[Listener] = (),
        policy: PolicyFactory = FitDrain,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.transport = FakeTransport()
        self.recorder = Recorder()
        self.models = Models()
        self.engine = Engine(
            scheduler=Scheduler(executors, max_requests=1000, max_bytes=1 << 30, policy=policy),
            models=self.models,
            transport=self.transport,
            services=NoServices(),
            listeners=[*listeners, self.recorder],
            executors=executors,
            clock=clock,
        )
        queue = ModelQueue(ModelKey("m", "1"), variants)
        signature = Signature(FakeSession.inputs, FakeSession.outputs, 8)
        defaults = Defaults(latency_ns=WAIT_S * 1_000_000_000)
        self.sessions = sessions
        self.model = ServedModel("m", "1", signature, tuple(variants), {}, dict(sessions), queue, defaults, 0)
        self.engine.add_model(self.model)

    def __enter__(self) -> World:
        self.engine.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.engine.stop()


def infer_call(rows: Sequence[Sequence[float]], deadline_ns: int | None = None, **parameters: str | float) -> Call:
    """A ModelInfer for model `m` with these rows as `x`; parameters become string or double parameters."""
    array = np.array(rows, np.float32)
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=array.shape)
    for name, value in parameters.items():
        if isinstance(value, str):
            request.parameters[name].string_param = value
        else:
            request.parameters[name].double_param = value
    return Call(MODEL_INFER, request.SerializeToString(), time.monotonic_ns(), deadline_ns, (), "test")


def answer(reply: Reply) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """The rows of `y` in a reply."""
    assert reply.message is not None, reply.status
    response = pb.ModelInferResponse.FromString(reply.message)
    return np.frombuffer(response.raw_output_contents[0], np.float32).reshape(tuple(response.outputs[0].shape))


def parameters_of(reply: Reply) -> dict[str, object]:
    """The response parameters as plain values."""
    assert reply.message is not None, reply.status
    response = pb.ModelInferResponse.FromString(reply.message)
    return {
        key: getattr(value, str(value.WhichOneof("parameter_choice"))) for key, value in response.parameters.items()
    }


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
    return World({"fp32": FakeSession(before)}, [variant("fp32", 1.0, 1_000_000)], executors, listeners)


def wait_until(condition: Callable[[], bool]) -> None:
    """Let other threads get to a state that they must reach."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "never happened"
        threading.Event().wait(0.001)
