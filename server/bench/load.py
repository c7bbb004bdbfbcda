"""Open-loop load from one asyncio process: arrival times fixed in advance, whatever has been answered by then.

Rules of this file: bytes out and bytes in; nothing is parsed and nothing serialised while the load runs, since client
and server may share their cores. A latency counts from the instant a request was *due*, so that neither a slow client
nor a slow server can hide its own delays (no coordinated omission; G. Tene, "How NOT to Measure Latency", 2013).
"""

from __future__ import annotations

import asyncio
import gc
import selectors
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
import grpc.aio

from server.wire.inference import MODEL_INFER

CONNECT_S = 10.0
PATIENCE_S = 60.0
"""How long after the last request is sent the answers are waited for."""
UNANSWERED = "UNANSWERED"
_OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),  # else channels to one address share one connection
]

T = TypeVar("T")
Metadata = Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Answer:
    """How one request ended. Instants are ns since the load began; `code` is a gRPC status' name or `UNANSWERED`.

    `reply` is the serialised ModelInferResponse of an OK, `detail` the text of any other status.
    """

    due_ns: int
    sent_ns: int
    ended_ns: int
    code: str = "OK"
    reply: bytes = b""
    detail: str = ""

    @property
    def latency_ns(self) -> int:
        """From the instant it was due."""
        return self.ended_ns - self.due_ns


class Interrupted(Exception):
    """Ctrl-C ended a load before its last answer; `answers` are to the first of the messages, in order."""

    def __init__(self, answers: list[Answer]) -> None:
        super().__init__("interrupted")
        self.answers = answers


@asynccontextmanager
async def connected(
    url: str, connections: int = 1, trust: bytes | None = None
) -> AsyncIterator[list[grpc.aio.Channel]]:
    """So many channels, each its own connection, with TLS where there is a PEM bundle to trust."""
    async with AsyncExitStack() as stack:
        channels = []
        for _ in range(connections):
            if trust is None:
                channel = grpc.aio.insecure_channel(url, _OPTIONS)
            else:
                channel = grpc.aio.secure_channel(url, grpc.ssl_channel_credentials(trust), _OPTIONS)
            channels.append(await stack.enter_async_context(channel))
        yield channels


async def open_loop(
    channels: Sequence[grpc.aio.Channel],
    due_ns: Sequence[int],
    message: Callable[[int], bytes],
    metadata: Metadata = (),
) -> list[Answer]:
    """Send `message(i)` at instant `due_ns[i]`, in turns over the channels; the answers in the order of sending.

    A cancellation (Ctrl-C) ends the sending, and what was sent is still waited for; one that comes while there is only
    waiting ends that, and what is still out is UNANSWERED. Raises Interrupted, with the answers that there are, after
    either, and TimeoutError when a channel does not become ready.
    """
    await asyncio.wait_for(asyncio.gather(*(channel.channel_ready() for channel in channels)), CONNECT_S)
    calls = [channel.unary_unary(MODEL_INFER) for channel in channels]
    answers: list[Answer | None] = [None] * len(due_ns)
    pending: set[asyncio.Task[None]] = set()
    gc.collect()
    gc.freeze()  # what the run does not make need not be searched while it runs
    start_ns = time.perf_counter_ns()

    async def one(index: int, due: int) -> None:
        sent = time.perf_counter_ns() - start_ns
        code, reply, detail = UNANSWERED, b"", ""
        try:
            reply = await calls[index % len(calls)](message(index), metadata=metadata)
            code = "OK"
        except grpc.aio.AioRpcError as error:
            code, detail = error.code().name, error.details() or ""
        finally:
            answers[index] = Answer(due, sent, time.perf_counter_ns() - start_ns, code, reply, detail)

    async def send() -> None:
        for index, due in enumerate(due_ns):
            wait_ns = due - (time.perf_counter_ns() - start_ns)
            await asyncio.sleep(max(wait_ns, 0) / 1e9)  # even when behind: answers must be taken in
            task = asyncio.create_task(one(index, due))
            pending.add(task)
            task.add_done_callback(pending.discard)

    try:
        interrupted = await _cancelled(send())
    finally:
        gc.unfreeze()
    if pending:
        interrupted |= await _cancelled(asyncio.wait(pending, timeout=PATIENCE_S))
        late = [task for task in pending if task.cancel()]
        await asyncio.gather(*late, return_exceptions=True)
    got = [answer for answer in answers if answer is not None]
    if interrupted:
        raise Interrupted(got)
    return got


async def _cancelled(work: Awaitable[object]) -> bool:
    """Whether a cancellation ended the work, which is thereby dealt with."""
    try:
        await work
    except asyncio.CancelledError:
        asyncio.current_task().uncancel()  # type: ignore[union-attr] # a coroutine runs in a task
        return True
    return False


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a loop that wakes up to the microsecond: epoll would round every wait up to a millisecond.

    Every Ctrl-C is one cancellation of `main`; `asyncio.run` would give up at the second. Raises KeyboardInterrupt
    where `main` lets one through.
    """

    async def interruptible() -> T:
        if threading.current_thread() is threading.main_thread():
            task = asyncio.current_task()
            asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)  # type: ignore[union-attr]
        return await main

    try:
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
            return runner.run(interruptible())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
