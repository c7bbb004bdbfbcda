"""What the listeners hear of a batch: the variants that were passed over for it, by name."""

from __future__ import annotations

from fakes import FakeSession, World, infer_call, variant

from server.endings import batch_record
from server.events import BatchRan, PassedOver
from server.inference import Inference, Part
from server.scheduling import policy
from server.scheduling.admission import make_request
from server.scheduling.scheduler import Run
from server.scheduling.slo import Slo
from server.transport.transport import Call
from server.wire.inference import parse_infer, read_request

S = 1_000_000_000
VARIANTS = [variant("fp32", 1.0, 10 * S), variant("amp", 0.95, 8 * S), variant("int8", 0.9, S // 1000)]


def world() -> World:
    """A server whose two better variants are said to take many seconds."""
    return World({each.name: FakeSession() for each in VARIANTS}, VARIANTS)


def batch_of(call: Call) -> BatchRan:
    """The batch that answers a call on a fresh server."""
    with world() as running:
        running.transport.send(call)
        running.transport.reply_to(call)
        (batch,) = [event for event in running.recorder.events if isinstance(event, BatchRan)]
    return batch


def test_a_batch_tells_which_variants_were_too_slow_for_it() -> None:
    """Of five seconds fp32 lacks more than five and amp more than three; nobody was passed over for fp32."""
    tight = batch_of(infer_call([[1, 1]], slo_latency_ms=5000.0))
    assert tight.variant == "int8"
    assert [(passed.variant, passed.reason) for passed in tight.passed_over] == [("fp32", "slack"), ("amp", "slack")]
    assert tight.passed_over[0].short > tight.passed_over[1].short + S
    assert tight.passed_over[1].short > 3 * S
    loose = batch_of(infer_call([[1, 1]], slo_latency_ms=60_000.0))
    assert (loose.variant, loose.passed_over) == ("fp32", ())


def test_only_more_accurate_variants_were_passed_over() -> None:
    """An overloaded decision looks at every variant: neither the one that ran nor a worse one was preferred to it."""
    running = world()
    model = running.model
    call = infer_call([[1, 1]])
    inference = Inference(call, read_request(parse_infer(call.message), model.signature), model)
    request = make_request(
        model.queue, Slo(), model.defaults, number=0, samples=1, size_bytes=0, shape=(), arrival_ns=0,
        payload=Part(inference, {}, 1),
    )  # fmt: skip
    passed_over = tuple(policy.PassedOver(place, "slack", 7) for place in range(3))
    run = Run(0, model.key, "amp", 1, (request,), 1, 5, "overload", 0, 0, 1, passed_over)
    assert batch_record(run, 5, failed=False).passed_over == (PassedOver("fp32", "slack", 7),)
