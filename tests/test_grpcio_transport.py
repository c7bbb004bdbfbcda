"""The grpcio transport against real gRPC clients, with a thread that echoes in place of the engine."""

from __future__ import annotations

import asyncio
import gc
import gzip
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from server.transport.grpcio_transport import MAX_STREAM_BACKLOG, GrpcioTransport, Limits
from server.transport.transport import Call, Kind, Reply, Status

SECOND = 1_000_000_000
METHODS: Mapping[str, Kind] = {
    "/test.Echo/Unary": "unary",
    "/test.Echo/Watch": "server_stream",
    "/test.Echo/Chat": "bidi",
}


def echo(call: Call) -> list[Reply]:
    """Answer with what came; the first words steer the test's engine."""
    match call.message.split(b" ", 1)[0]:
        case b"hold":
            return []
        case b"twice":
            return [Reply(call, b"1", final=False), Reply(call, b"2")]
        case b"again":
            return [Reply(call, b"once"), Reply(call, b"again")]
        case b"fail":
            details = status_pb2.Status(code=8, message="busy")
            details.details.add().Pack(error_details_pb2.RetryInfo())
            status = Status(8, "bu\nsy é", details.SerializeToString())
            return [Reply(call, status=status, trailing=(("gearshift-reason", "full"),))]
        case b"trail":
            return [Reply(call, call.message, trailing=(("gearshift-variant", "fp32"),))]
        case _:
            return [Reply(call, call.message)]


@dataclass
class Echo:
    """A transport, its port, and what its engine thread saw."""

    transport: GrpcioTransport
    port: int
    calls: list[Call] = field(default_factory=list)
    cancelled: list[Call] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)
    running: bool = True

    def run(self) -> None:
        while self.running:
            taken = self.transport.take(None)
            with self.changed:
                self.calls += taken.calls
                self.cancelled += taken.cancelled
                self.changed.notify_all()
            self.transport.reply([reply for call in taken.calls for reply in echo(call)])

    def until(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, timeout=20)


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[Echo]:
    """A running transport with its echo thread; parametrise indirectly with other limits."""
    limits = getattr(request, "param", Limits())
    transport = GrpcioTransport(METHODS, "127.0.0.1:0", limits=limits)
    echo_server = Echo(transport, transport.start())
    thread = threading.Thread(target=echo_server.run)
    thread.start()
    yield echo_server
    transport.stop(0)
    echo_server.running = False
    transport.wake()
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def channel(server: Echo) -> Iterator[grpc.Channel]:
    """A client's connection to the server."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        yield channel


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Every test also proves that neither grpc nor asyncio had an unhandled exception to log."""
    yield
    gc.collect()  # a task that died unobserved complains when it is collected
    noise = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert noise == []


def test_unary_call_carries_everything_the_engine_needs(server: Echo, channel: grpc.Channel) -> None:
    """A call arrives with its path, bytes, metadata, peer, arrival instant and deadline."""
    before = time.monotonic_ns()
    answer = channel.unary_unary("/test.Echo/Unary")(
        b"x\0y", timeout=10, metadata=(("key", "value"), ("raw-bin", b"\0"))
    )
    assert answer == b"x\0y"
    (call,) = server.calls
    assert (call.method, call.message, call.stream, call.cancelled) == ("/test.Echo/Unary", b"x\0y", None, False)
    assert {("key", "value"), ("raw-bin", b"\0")} <= set(call.metadata)
    assert call.peer.startswith("ipv4:127.0.0.1:")
    assert before < call.arrival_ns < time.monotonic_ns()
    assert call.deadline_ns is not None
    assert 5 * SECOND < call.deadline_ns - call.arrival_ns <= 10 * SECOND


@pytest.mark.parametrize("timeout_s", [1.001, 2.001, 10.01, 101.0])
def test_a_deadline_is_not_later_than_the_clients(server: Echo, channel: grpc.Channel, timeout_s: float) -> None:
    """GRPC rounds longer timeouts up on their way; a client must not give up before we think its time has passed."""
    channel.unary_unary("/test.Echo/Unary")(b"x", timeout=timeout_s)
    (call,) = server.calls
    assert call.deadline_ns is not None
    assert call.deadline_ns - call.arrival_ns <= timeout_s * SECOND


def test_no_deadline_is_none(server: Echo, channel: grpc.Channel) -> None:
    """A client that sets no deadline gives a call without one."""
    channel.unary_unary("/test.Echo/Unary")(b"x")
    assert server.calls[0].deadline_ns is None


def test_unknown_method_is_unimplemented(server: Echo, channel: grpc.Channel) -> None:
    """A path outside the table never reaches the engine."""
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/test.Echo/Nope")(b"x")
    assert error.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert server.calls == []


def test_status_details_and_trailing_metadata_reach_the_client(channel: grpc.Channel, server: Echo) -> None:
    """A refusal carries its code, text, google.rpc.Status and trailing metadata."""
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/test.Echo/Unary")(b"fail")
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert error.value.details() == "bu\nsy é"
    trailing = dict(error.value.trailing_metadata())
    assert trailing["gearshift-reason"] == "full"
    assert status_pb2.Status.FromString(trailing["grpc-status-details-bin"]).message == "busy"


def test_trailing_metadata_on_success(channel: grpc.Channel, server: Echo) -> None:
    """A successful reply's trailing metadata arrives too."""
    _, rpc = channel.unary_unary("/test.Echo/Unary").with_call(b"trail")
    assert ("gearshift-variant", "fp32") in rpc.trailing_metadata()


def test_stream_answers_every_message_and_ends_ok(channel: grpc.Channel, server: Echo) -> None:
    """A bidirectional stream ends with OK once the client half-closed and every message had its final reply."""
    rpc = channel.stream_stream("/test.Echo/Chat")(iter([b"a", b"twice", b"b"]))
    assert list(rpc) == [b"a", b"1", b"2", b"b"]
    assert rpc.code() == grpc.StatusCode.OK
    assert len({id(call.stream) for call in server.calls}) == 1
    assert server.calls[0].stream is not None


def test_second_final_reply_is_dropped(channel: grpc.Channel, server: Echo) -> None:
    """A call is answered once, even when the engine errs."""
    assert list(channel.stream_stream("/test.Echo/Chat")(iter([b"again", b"a"]))) == [b"once", b"a"]


def test_empty_stream_ends_ok(channel: grpc.Channel, server: Echo) -> None:
    """A stream without messages needs no engine to end."""
    rpc = channel.stream_stream("/test.Echo/Chat")(iter([]))
    assert list(rpc) == []
    assert rpc.code() == grpc.StatusCode.OK


def test_status_ends_the_whole_stream_and_reports_its_open_calls(channel: grpc.Channel, server: Echo) -> None:
    """A status in a stream ends the rpc; calls still waiting in it are reported cancelled."""
    rpc = channel.stream_stream("/test.Echo/Chat")(iter([b"hold", b"a", b"fail"]))
    with pytest.raises(grpc.RpcError) as error:
        list(rpc)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    server.until(lambda: len(server.cancelled) == 1)
    assert server.cancelled[0].message == b"hold"


def test_server_stream_gets_many_replies_until_the_final_one(channel: grpc.Channel, server: Echo) -> None:
    """The one call of a server-streaming rpc is answered until a final reply."""
    assert list(channel.unary_stream("/test.Echo/Watch")(b"twice")) == [b"1", b"2"]


def test_endless_server_stream_ends_by_the_clients_cancel(channel: grpc.Channel, server: Echo) -> None:
    """A watch that the client leaves is reported cancelled, and a late reply to it goes nowhere."""
    rpc = channel.unary_stream("/test.Echo/Watch")(b"hold")
    server.until(lambda: len(server.calls) == 1)
    server.transport.reply([Reply(server.calls[0], b"first", final=False)])
    assert next(rpc) == b"first"
    rpc.cancel()
    server.until(lambda: len(server.cancelled) == 1)
    server.transport.reply([Reply(server.calls[0], b"late")])
    assert channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"


def test_client_cancel_is_reported_once(channel: grpc.Channel, server: Echo) -> None:
    """A cancelled unary call is marked and reported exactly once, and its late reply is dropped."""
    rpc = channel.unary_unary("/test.Echo/Unary").future(b"hold")
    server.until(lambda: len(server.calls) == 1)
    rpc.cancel()
    server.until(lambda: len(server.cancelled) == 1)
    assert server.cancelled == server.calls
    assert server.calls[0].cancelled
    server.transport.reply([Reply(server.calls[0], b"late")])
    assert channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"
    assert len(server.cancelled) == 1


def test_disconnect_reports_every_open_call(server: Echo) -> None:
    """A closed connection cancels its unary and stream calls alike."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        rpcs = [  # kept: a client's rpc that nobody holds cancels itself
            channel.unary_unary("/test.Echo/Unary").future(b"hold"),
            channel.stream_stream("/test.Echo/Chat")(iter([b"hold 1", b"hold 2"])),
        ]
        server.until(lambda: len(server.calls) == 3)
        assert len(rpcs) == 2
    server.until(lambda: len(server.cancelled) == 3)
    assert set(server.cancelled) == set(server.calls)


def test_deadline_cancels_the_call(channel: grpc.Channel, server: Echo) -> None:
    """When the gRPC deadline passes the client gets DEADLINE_EXCEEDED and the engine a cancellation."""
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/test.Echo/Unary")(b"hold", timeout=0.2)
    assert error.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    server.until(lambda: len(server.cancelled) == 1)


def test_two_hundred_concurrent_calls(server: Echo) -> None:
    """Every one of many concurrent callers gets its own answer."""

    async def many() -> list[bytes]:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary("/test.Echo/Unary")
            return list(await asyncio.gather(*(call(b"%d" % index) for index in range(200))))

    assert asyncio.run(many()) == [b"%d" % index for index in range(200)]


def test_cancel_storm_leaves_nothing_behind(server: Echo) -> None:
    """A thousand cancelled calls are each reported once at most, all that arrived are, and the server still answers."""

    async def storm() -> None:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            call = channel.unary_unary("/test.Echo/Unary")
            chat = channel.stream_stream("/test.Echo/Chat")
            for _ in range(10):
                rpcs = [call(b"hold %d" % index) for index in range(90)]
                streams = [chat(iter([b"hold", b"x"])) for _ in range(10)]
                await asyncio.sleep(0)
                await asyncio.gather(*(rpc.read() for rpc in streams[:5]))
                for rpc in rpcs + streams:
                    rpc.cancel()
            assert await call(b"alive") == b"alive"

    asyncio.run(storm())
    held = [call for call in server.calls if call.message.startswith(b"hold")]
    server.until(lambda: len(server.cancelled) >= len([c for c in server.calls if c.message.startswith(b"hold")]))
    assert len(server.cancelled) == len(set(server.cancelled))
    assert set(held) <= set(server.cancelled)
    assert all(call.cancelled and not call.rpc.open for call in server.cancelled)  # type: ignore[attr-defined]


@pytest.mark.parametrize("server", [Limits(max_message_bytes=1000)], indirect=True)
def test_oversized_message_is_resource_exhausted(channel: grpc.Channel, server: Echo) -> None:
    """A message above the limit is refused by gRPC itself, one at the limit is not."""
    call = channel.unary_unary("/test.Echo/Unary")
    assert len(call(bytes(1000))) == 1000
    with pytest.raises(grpc.RpcError) as error:
        call(bytes(1001))
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    rpc = channel.stream_stream("/test.Echo/Chat")(iter([b"a", bytes(1001)]))
    with pytest.raises(grpc.RpcError) as error:
        list(rpc)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(server.calls) == 2


@pytest.mark.parametrize("server", [Limits(max_message_bytes=100_000)], indirect=True)
def test_compressed_bomb_is_refused_by_its_real_size(channel: grpc.Channel, server: Echo) -> None:
    """The limit counts decompressed bytes: a small message that unpacks to a large one does not get through."""
    bomb = bytes(50_000_000)
    assert len(gzip.compress(bomb)) < 100_000
    with pytest.raises(grpc.RpcError) as error:
        channel.unary_unary("/test.Echo/Unary")(bomb, compression=grpc.Compression.Gzip)
    assert error.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert server.calls == []


def test_stream_that_never_reads_is_held_back(server: Echo, channel: grpc.Channel) -> None:
    """A stream has a bounded number of unanswered requests; the rest wait at the client."""
    total = MAX_STREAM_BACKLOG + 50
    rpc = channel.stream_stream("/test.Echo/Chat")(iter([b"hold"] * total))
    server.until(lambda: len(server.calls) == MAX_STREAM_BACKLOG)
    assert channel.unary_unary("/test.Echo/Unary")(b"x") == b"x"
    assert len(server.calls) == MAX_STREAM_BACKLOG + 1
    server.transport.reply([Reply(call, b"done") for call in server.calls if call.stream is not None])
    server.until(lambda: len(server.calls) == total + 1)
    rpc.cancel()


def test_stop_lets_open_calls_finish(server: Echo, channel: grpc.Channel) -> None:
    """Within its grace, a stopping transport still delivers the answers of calls it has accepted."""
    rpc = channel.unary_unary("/test.Echo/Unary").future(b"hold")
    server.until(lambda: len(server.calls) == 1)
    stopping = threading.Thread(target=server.transport.stop, args=(20 * SECOND,))
    stopping.start()
    server.transport.reply([Reply(server.calls[0], b"answer")])
    assert rpc.result(timeout=20) == b"answer"
    stopping.join(20)
    assert not stopping.is_alive()


def test_stop_cancels_what_outlives_the_grace(server: Echo, channel: grpc.Channel) -> None:
    """After the grace the rest is cut off, reported cancelled, and a late reply is harmless."""
    rpc = channel.unary_unary("/test.Echo/Unary").future(b"hold")
    server.until(lambda: len(server.calls) == 1)
    server.transport.stop(0)
    assert rpc.exception(timeout=20) is not None
    server.until(lambda: server.cancelled == server.calls)
    server.transport.reply([Reply(server.calls[0], b"late")])


def test_bound_port_is_an_os_error(server: Echo) -> None:
    """Two transports never share a port, and the second one says so."""
    second = GrpcioTransport(METHODS, f"127.0.0.1:{server.port}")
    with pytest.raises(OSError, match="cannot bind"):
        second.start()


def test_wake_before_take_is_not_lost() -> None:
    """A wake that comes first makes the next take return at once, and only that one."""
    transport = GrpcioTransport(METHODS, "127.0.0.1:0")
    transport.wake()
    assert transport.take(None) == ([], [])
    before = time.monotonic_ns()
    assert transport.take(20_000_000) == ([], [])
    assert time.monotonic_ns() - before >= 15_000_000
