"""Load for measurements: the open loop of `gearshift bench` on messages of one's own, and a closed loop beside it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np

from server.bench import load
from server.bench.load import Answer, connected
from server.bench.requests import encode_head, encode_inputs
from server.wire.inference import MODEL_INFER


def request(
    model: str, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], **parameters: float | str
) -> bytes:
    """A serialised FP32 ModelInfer with one input."""
    return encode_head(model, parameters=parameters) + encode_inputs({name: array}, {name: "FP32"})


async def open_loop(url: str, due_ns: Sequence[int], messages: Sequence[bytes]) -> list[Answer]:
    """Send message i (cyclic) at instant i of `due_ns`, whatever has been answered by then."""
    async with connected(url) as channels:
        return await load.open_loop(channels, due_ns, lambda index: messages[index % len(messages)])


async def closed_loop(url: str, messages: Sequence[bytes], clients: int, seconds: float) -> list[Answer]:
    """So many clients, each sending its next request when it has the answer to the last; for so many seconds.

    Only what was answered within these seconds is returned, so that a rate is answers over time.
    """
    answers: list[Answer] = []
    async with connected(url) as (channel,):
        await channel.channel_ready()
        call = channel.unary_unary(MODEL_INFER)
        start_ns, length_ns = time.perf_counter_ns(), seconds * 1e9

        async def client(number: int) -> None:
            index = number
            while (now_ns := time.perf_counter_ns() - start_ns) < length_ns:
                reply = await call(messages[index % len(messages)])
                ended_ns = time.perf_counter_ns() - start_ns
                if ended_ns <= length_ns:
                    answers.append(Answer(now_ns, now_ns, ended_ns, reply=reply))
                index += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
    return answers


def percentile_ms(answers: Sequence[Answer], percent: float) -> float:
    """A percentile of the latencies, in milliseconds."""
    return float(np.percentile([answer.latency_ns for answer in answers], percent)) / 1e6
