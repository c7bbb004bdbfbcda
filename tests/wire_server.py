"""A server made of the wire functions and the grpcio transport only: identity models, no engine.

It proves the wire alone against stock clients: a model named as a datatype, lower case, answers what it is sent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from server.errors import NotFound, ServingError
from server.transport.grpcio_transport import GrpcioTransport
from server.transport.transport import Call, Reply, Status
from server.wire import health, inference, metadata, reflection, variants
from server.wire.metadata import BatchFacts, Duration, IndexEntry, ModelFacts, StatisticsFacts
from server.wire.status_codes import to_status
from server.wire.tensors import quoted
from variants.datatypes import DATATYPES
from variants.variant import TensorSpec

SERVICE = f"/{inference.SERVICE}/"


def model(name: str) -> ModelFacts:
    """The identity of one datatype over [-1, -1], batched up to 8; `scalar` has no batch dimension."""
    if name == "scalar":
        spec = TensorSpec("x", "FP32", ())
        return ModelFacts(name, ("1",), "identity", inference.Signature((spec,), (spec,), 0))
    if name.upper() not in DATATYPES:
        raise NotFound(f"there is no model {quoted(name)}")
    shape = (-1, -1)
    return ModelFacts(
        name,
        ("1", "3"),
        "identity",
        inference.Signature((TensorSpec("x", name.upper(), shape),), (TensorSpec("y", name.upper(), shape),), 8),
        executors=2,
        parameters={"variants": "fp32"},
    )


def infer(message: bytes) -> bytes:
    """Answer a ModelInferRequest with its own inputs."""
    parsed = inference.parse_infer(message)
    signature = model(parsed.model_name).signature
    request = inference.read_request(parsed, signature)
    (array,) = request.inputs.values()
    name = signature.outputs[0].name
    batched = signature.max_batch_size > 0
    return inference.encode_response(request, "3", {name: array}, {"variant": "fp32"}, batched=batched)


def stream_infer(message: bytes) -> bytes:
    """The same in a stream, where errors are answers."""
    try:
        return inference.encode_stream_response(infer(message))
    except ServingError as error:
        return inference.encode_stream_error(str(error), inference.parse_infer(message).id)


def statistics(name: str) -> StatisticsFacts:
    """Figures that a client can recognise."""
    return StatisticsFacts(
        name=name,
        version="3",
        last_inference_ms=1234,
        samples=5,
        batches=6,
        success=Duration(1, 100),
        fail=Duration(2, 200),
        queue=Duration(3, 300),
        compute_input=Duration(4, 400),
        compute_infer=Duration(5, 500),
        compute_output=Duration(6, 600),
        batch_sizes=(BatchFacts(4, Duration(1, 1), Duration(2, 2), Duration(3, 3)),),
    )


def index(message: bytes) -> bytes:
    """One good and one bad model."""
    entries = [IndexEntry("fp32", "3", "READY"), IndexEntry("bad", "1", "UNAVAILABLE", "broken")]
    return metadata.encode_index(entries[:1] if metadata.read_index(message) else entries)


def check(message: bytes) -> bytes:
    """The server is well, one model is not."""
    service = health.read_service(message)
    return health.encode_check(service, {"": True, "live": True, "fp32": False}.get(service))


def known(name: str) -> bytes:
    """Nothing, for a model that exists."""
    model(name)
    return b""


def facts(message: bytes) -> ModelFacts:
    """The model that a request names."""
    return model(metadata.read_model(message)[0])


ANSWERS: Mapping[str, Callable[[bytes], bytes]] = {
    **dict.fromkeys(reflection.METHODS, reflection.answer),
    health.CHECK: check,
    f"{SERVICE}ModelInfer": infer,
    f"{SERVICE}ModelStreamInfer": stream_infer,
    f"{SERVICE}ServerLive": lambda _: metadata.encode_live(True),
    f"{SERVICE}ServerReady": lambda _: metadata.encode_ready(True),
    f"{SERVICE}ModelReady": lambda message: metadata.encode_ready(bool(facts(message))),
    f"{SERVICE}ServerMetadata": lambda _: metadata.encode_server_metadata("9.9", administration=True),
    f"{SERVICE}ModelMetadata": lambda message: metadata.encode_model_metadata(facts(message)),
    f"{SERVICE}ModelConfig": lambda message: metadata.encode_model_config(facts(message)),
    f"{SERVICE}ModelStatistics": lambda message: metadata.encode_statistics([statistics(facts(message).name)]),
    f"{SERVICE}RepositoryIndex": index,
    f"{SERVICE}RepositoryModelLoad": lambda message: known(metadata.read_load(message)),
    f"{SERVICE}RepositoryModelUnload": lambda message: known(metadata.read_unload(message)),
}


def reply(call: Call) -> Reply:
    """The answer or the error, as the transport wants it."""
    try:
        return Reply(call, ANSWERS[call.method](call.message))
    except ServingError as error:
        return Reply(call, status=Status(*to_status(error)))


@contextmanager
def wire_server() -> Iterator[int]:
    """Serve until left; gives the port."""
    methods: dict[str, Any] = {**inference.METHODS, **variants.METHODS, **health.METHODS, **reflection.METHODS}
    transport = GrpcioTransport(methods, "127.0.0.1:0")
    port = transport.start()
    running = True

    def run() -> None:
        while running:
            transport.reply([reply(call) for call in transport.take(None).calls])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield port
    finally:
        transport.stop(0)
        running = False
        transport.wake()
        thread.join()
