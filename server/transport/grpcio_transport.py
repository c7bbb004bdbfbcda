"""The transport that always works: Python's grpc.aio behind the bulk boundary.

Rules: this file moves bytes and knows no message. grpc.aio's event loop lives in one thread of its own and owns every
rpc; other threads reach it only through `reply` (one wake-up of the loop per batch of replies) and it reaches them
only through the lists that `take` empties. A call ends exactly once: by its final reply or by being reported cancelled.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio

from server.transport.transport import Call, Kind, Reply, Taken

MAX_STREAM_BACKLOG = 256
"""Requests of one stream that may be unanswered or unsent before its next one is read: bounds what a client that
sends and never reads can make us hold."""

_CODES: Mapping[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_LONGEST_S = 365 * 86_400.0  # a deadline further off is as good as this, and waits must not overflow
_DETAILS = "grpc-status-details-bin"
_ROUNDED_UP = 0.01
"""By how much gRPC's core rounds timeouts of a second and more up on their way: the client gives up before that."""


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM texts. With `client_ca` every client must show a certificate that it signed."""

    certificate: bytes
    key: bytes
    client_ca: bytes | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What clients may do.

    A client may ping every `min_ping_interval_ns`; ours goes out after `keepalive_ns` of silence and finds the dead.
    """

    max_message_bytes: int = 64 << 20
    max_concurrent_streams: int = 1024
    min_ping_interval_ns: int = 5_000_000_000
    keepalive_ns: int = 60_000_000_000

    def channel_arguments(self) -> list[tuple[str, int]]:
        """As gRPC's own names and units."""
        return [
            ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share
            ("grpc.max_receive_message_length", self.max_message_bytes),
            ("grpc.max_send_message_length", self.max_message_bytes),
            ("grpc.max_concurrent_streams", self.max_concurrent_streams),
            ("grpc.http2.min_recv_ping_interval_without_data_ms", self.min_ping_interval_ns // 1_000_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", self.keepalive_ns // 1_000_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ]


@dataclass(slots=True, eq=False)
class _Rpc:
    """One rpc: the replies to send, and the calls that still wait for their final one. Touched by the loop only."""

    open: set[Call] = field(default_factory=set)
    replies: deque[Reply] = field(default_factory=deque)
    half_closed: bool = True
    changed: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(slots=True, eq=False, kw_only=True)
class _AioCall(Call):
    rpc: _Rpc


class GrpcioTransport:
    """Serves the methods of a table, full path -> kind; any other path is UNIMPLEMENTED."""

    def __init__(
        self, methods: Mapping[str, Kind], address: str, *, limits: Limits = Limits(), tls: Tls | None = None
    ) -> None:
        """Nothing is bound before `start`; `address` is HOST:PORT, port 0 picks a free one."""
        self._methods = dict(methods)
        self._address = address
        self._limits = limits
        self._tls = tls
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread
        self._server: Any
        self._arrived = threading.Condition()
        self._calls: list[Call] = []
        self._cancelled: list[Call] = []
        self._woken = False

    def start(self) -> int:
        """Bind and accept; returns the bound port. Raises OSError if the address cannot be bound."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpcio-transport", daemon=True)
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._serve(), self._loop).result()
        except BaseException:
            self._close()
            raise

    def take(self, timeout_ns: int | None) -> Taken:
        """All waiting calls and cancellations at once; waits for the first, for `wake`, or for the timeout."""
        with self._arrived:
            if not (self._calls or self._cancelled or self._woken):
                self._arrived.wait(None if timeout_ns is None else timeout_ns / 1e9)
            taken = Taken(self._calls, self._cancelled)
            self._calls, self._cancelled, self._woken = [], [], False
        return taken

    def wake(self) -> None:
        """Make a thread that is waiting in `take`, or the next one to wait, return at once."""
        with self._arrived:
            self._woken = True
            self._arrived.notify()

    def reply(self, replies: Sequence[Reply]) -> None:
        """Send many replies; never blocks. After `stop` they go nowhere, as their clients have."""
        try:
            self._loop.call_soon_threadsafe(self._deliver, replies)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def stop(self, grace_ns: int) -> None:
        """Stop accepting, let open rpcs finish for at most `grace_ns`, then close; their calls are then cancelled."""
        if self._loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._server.stop(grace_ns / 1e9), self._loop).result()
        self._close()

    def _close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _settle(self) -> None:
        """Let cancelled handlers finish, so that their calls are reported and nothing is destroyed while pending."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self) -> int:
        self._server = grpc.aio.server(handlers=self._handlers(), options=self._limits.channel_arguments())
        try:
            if self._tls is None:
                port: int = self._server.add_insecure_port(self._address)
            else:
                pair = [(self._tls.key, self._tls.certificate)]
                credentials = grpc.ssl_server_credentials(pair, self._tls.client_ca, self._tls.client_ca is not None)
                port = self._server.add_secure_port(self._address, credentials)
        except RuntimeError as error:
            raise OSError(f"cannot bind {self._address}") from error
        await self._server.start()
        return port

    def _handlers(self) -> list[Any]:
        """One generic handler per service, of bytes-in, bytes-out methods."""
        services: dict[str, dict[str, Any]] = defaultdict(dict)
        for path, kind in self._methods.items():
            _, service, method = path.split("/")
            match kind:
                case "unary":
                    handler = grpc.unary_unary_rpc_method_handler(self._unary(path))
                case "server_stream":
                    handler = grpc.unary_stream_rpc_method_handler(self._server_stream(path))
                case "bidi":
                    handler = grpc.stream_stream_rpc_method_handler(self._bidi(path))
            services[service][method] = handler
        return [grpc.method_handlers_generic_handler(*service) for service in services.items()]

    def _unary(self, method: str) -> Callable[[bytes, Any], Awaitable[bytes]]:
        async def serve(message: bytes, context: Any) -> bytes:
            rpc = _Rpc()
            self._accept(rpc, method, message, context, None)
            try:
                while not rpc.replies:
                    await rpc.changed.wait()
            finally:
                self._abandon(rpc)
            reply = rpc.replies.popleft()
            await _finish(context, reply)
            return reply.message or b""

        return serve

    def _server_stream(self, method: str) -> Callable[[bytes, Any], Awaitable[None]]:
        async def serve(message: bytes, context: Any) -> None:
            rpc = _Rpc()
            self._accept(rpc, method, message, context, None)
            await self._write(rpc, context)

        return serve

    def _bidi(self, method: str) -> Callable[[Any, Any], Awaitable[None]]:
        async def serve(_: Any, context: Any) -> None:
            rpc = _Rpc(half_closed=False)
            reader = asyncio.ensure_future(self._read(rpc, method, context))
            try:
                await self._write(rpc, context)
            finally:
                reader.cancel()

        return serve

    async def _read(self, rpc: _Rpc, method: str, context: Any) -> None:
        """Turn each message into a call until the client half-closes or goes away."""
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self._accept(rpc, method, message, context, rpc)
                while len(rpc.open) + len(rpc.replies) >= MAX_STREAM_BACKLOG:
                    rpc.changed.clear()
                    await rpc.changed.wait()
        finally:
            rpc.half_closed = True
            rpc.changed.set()

    async def _write(self, rpc: _Rpc, context: Any) -> None:
        """Send replies in the order given until the rpc is complete or a status ends it."""
        try:
            while rpc.replies or rpc.open or not rpc.half_closed:
                if not rpc.replies:
                    rpc.changed.clear()
                    await rpc.changed.wait()
                    continue
                reply = rpc.replies.popleft()
                rpc.changed.set()
                if reply.message is not None:
                    await context.write(reply.message)
                if reply.status is not None or reply.trailing:
                    await _finish(context, reply)
                if reply.status is not None:
                    return
        finally:
            self._abandon(rpc)

    def _accept(self, rpc: _Rpc, method: str, message: bytes, context: Any, stream: object | None) -> None:
        arrival_ns = time.monotonic_ns()
        remaining = context.time_remaining()  # None: no deadline; 0 or less: it has passed
        if remaining is not None and remaining >= 1:
            remaining *= 1 - _ROUNDED_UP
        call = _AioCall(
            method=method,
            message=message,
            arrival_ns=arrival_ns,
            deadline_ns=None if remaining is None else arrival_ns + int(min(remaining, _LONGEST_S) * 1e9),
            metadata=context.invocation_metadata() or (),
            peer=context.peer(),
            stream=stream,
            rpc=rpc,
        )
        rpc.open.add(call)
        with self._arrived:
            self._calls.append(call)
            self._arrived.notify()

    def _abandon(self, rpc: _Rpc) -> None:
        """Report the calls that nobody waits for any more."""
        if not rpc.open:
            return
        for call in rpc.open:
            call.cancelled = True
        with self._arrived:
            self._cancelled.extend(rpc.open)
            self._arrived.notify()
        rpc.open.clear()

    def _deliver(self, replies: Sequence[Reply]) -> None:
        for reply in replies:
            call = reply.call
            if not isinstance(call, _AioCall) or call not in call.rpc.open:
                continue  # its client has gone, or it had its final reply
            if reply.final or reply.status is not None:
                call.rpc.open.discard(call)
            call.rpc.replies.append(reply)
            call.rpc.changed.set()


async def _finish(context: Any, reply: Reply) -> None:
    """Set what follows the last message; for a status that is not OK this ends the handler by an exception."""
    status = reply.status
    trailing: tuple[tuple[str, str | bytes], ...] = reply.trailing
    if status is not None and status.details:
        trailing = (*trailing, (_DETAILS, status.details))
    if status is None or status.code == 0:
        context.set_trailing_metadata(trailing)
    else:
        await context.abort(_CODES.get(status.code, grpc.StatusCode.UNKNOWN), status.message, trailing)
