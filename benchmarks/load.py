"""Load from one asyncio process over grpc.aio: open loop (arrival times fixed in advance) and closed loop.

An open-loop latency counts from the instant a request was due, not from when the client got round to sending it, so a
slow client or server cannot hide its own delays (no coordinated omission).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import grpc
import grpc.aio
import numpy as np

from protos import open_inference_pb2 as pb
from server.wire.inference import MODEL_INFER

OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


@dataclass(slots=True)
class Answer:
    """One request: when it was due (seconds from the start), how long it took, its end and what the server said."""

    due_s: float
    latency_s: float
    code: str
    parameters: Mapping[str, object] = field(default_factory=dict)


def request(
    model: str, name: str, array: np.ndarray[tuple[int, ...], np.dtype[np.float32]], **parameters: float | str
) -> bytes:
    """A serialised FP32 ModelInfer with one input."""
    message = pb.ModelInferRequest(model_name=model, raw_input_contents=[array.tobytes()])
    message.inputs.add(name=name, datatype="FP32", shape=array.shape)
    for key, value in parameters.items():
        if isinstance(value, str):
            message.parameters[key].string_param = value
        else:
            message.parameters[key].double_param = value
    return message.SerializeToString()


async def open_loop(url: str, due_s: Sequence[float], messages: Sequence[bytes]) -> list[Answer]:
    """Send message i (cyclic) at instant i of `due_s`, whatever has been answered by then."""
    async with grpc.aio.insecure_channel(url, OPTIONS) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(MODEL_INFER)
        start = time.perf_counter()

        async def one(index: int, due: float) -> Answer:
            code, parameters = await _send(call, messages[index % len(messages)])
            return Answer(due, time.perf_counter() - start - due, code, parameters)

        tasks = []
        for index, due in enumerate(due_s):
            wait = due - (time.perf_counter() - start)
            if wait > 0:
                await asyncio.sleep(wait)
            tasks.append(asyncio.create_task(one(index, due)))
        return await asyncio.gather(*tasks)


async def closed_loop(url: str, messages: Sequence[bytes], clients: int, seconds: float) -> list[Answer]:
    """So many clients, each sending its next request when it has the answer to the last; for so many seconds.

    Only what was answered within these seconds is returned, so that a rate is answers over time.
    """
    answers: list[Answer] = []
    async with grpc.aio.insecure_channel(url, OPTIONS) as channel:
        await channel.channel_ready()
        call = channel.unary_unary(MODEL_INFER)
        start = time.perf_counter()

        async def client(number: int) -> None:
            index = number
            while (now := time.perf_counter() - start) < seconds:
                code, parameters = await _send(call, messages[index % len(messages)])
                ended = time.perf_counter() - start
                if ended <= seconds:
                    answers.append(Answer(now, ended - now, code, parameters))
                index += clients

        await asyncio.gather(*(client(number) for number in range(clients)))
    return answers


async def _send(call: grpc.aio.UnaryUnaryMultiCallable, message: bytes) -> tuple[str, Mapping[str, object]]:
    try:
        reply = await call(message)
    except grpc.aio.AioRpcError as error:
        return error.code().name, {}
    response = pb.ModelInferResponse.FromString(reply)
    values = {
        key: getattr(value, str(value.WhichOneof("parameter_choice"))) for key, value in response.parameters.items()
    }
    return "OK", values


def percentile_ms(answers: Sequence[Answer], percent: float) -> float:
    """A percentile of the latencies, in milliseconds."""
    return float(np.percentile([answer.latency_s for answer in answers], percent)) * 1e3
