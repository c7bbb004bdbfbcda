"""What an unmodified tritonclient sees; run as `python stock_client.py HOST:PORT`, in a process without our stubs."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio_client
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

ARRAYS = {
    "BOOL": np.array([[True, False, True]]),
    **{
        f"{kind}{bits}": np.array([[0, 1, 2**7 - 1]], f"{kind.lower()}{bits}")
        for kind in ("INT", "UINT")
        for bits in (8, 16, 32, 64)
    },
    "FP16": np.array([[0.5, -1, 65504]], np.float16),
    "FP32": np.array([[0.5, -1, 1e38]], np.float32),
    "FP64": np.array([[0.5, -1, 1e300]], np.float64),
    "BYTES": np.array([["a", "é", ""]], np.object_),
    "BF16": np.array([[0.5, -1, 3e38]], ml_dtypes.bfloat16),
}
TYPED = {"BOOL": "bool", "INT64": "int64", "UINT64": "uint64", "FP32": "fp32", "FP64": "fp64", "BYTES": "bytes"}


def tensor(datatype: str, array: np.ndarray[Any, Any]) -> client.InferInput:
    """The client's input of one array."""
    made = client.InferInput("x", array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def check(datatype: str, result: client.InferResult) -> None:
    """The result equals what was sent."""
    got, sent = result.as_numpy("y"), ARRAYS[datatype]
    if datatype == "BYTES":
        got = np.vectorize(lambda value: value.decode(), otypes=[object])(got)
    np.testing.assert_array_equal(got, sent)


def expect(code: str, text: str, call: Callable[..., object], *arguments: Any, **options: Any) -> None:
    """The call fails with this status and a text that contains the other."""
    try:
        call(*arguments, **options)
    except InferenceServerException as error:
        assert error.status() == f"StatusCode.{code}", error
        assert text in error.message(), error
    else:
        raise AssertionError(f"expected {code}")


def describe(server: client.InferenceServerClient) -> None:
    """Health, metadata, configuration, statistics, repository."""
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("fp32")
    about = server.get_server_metadata()
    assert (about.name, about.version) == ("gearshift", "9.9")
    assert {"statistics", "model_configuration", "model_repository"} <= set(about.extensions)
    facts = server.get_model_metadata("fp32")
    assert (facts.name, list(facts.versions), facts.platform) == ("fp32", ["1", "3"], "identity")
    assert (facts.inputs[0].name, facts.inputs[0].datatype, list(facts.inputs[0].shape)) == ("x", "FP32", [-1, -1])
    config = server.get_model_config("bytes").config
    assert (config.max_batch_size, config.WhichOneof("scheduling_choice")) == (8, "dynamic_batching")
    assert (list(config.input[0].dims), config.output[0].data_type) == ([-1], 13)
    assert config.instance_group[0].count == 2
    assert config.parameters["variants"].string_value == "fp32"
    assert server.get_model_config("scalar").config.WhichOneof("scheduling_choice") is None
    stats = server.get_inference_statistics("fp32").model_stats[0]
    assert (stats.last_inference, stats.inference_count, stats.execution_count) == (1234, 5, 6)
    assert [d.ns for d in (stats.inference_stats.success, stats.inference_stats.compute_output)] == [100, 600]
    assert (stats.batch_stats[0].batch_size, stats.batch_stats[0].compute_infer.count) == (4, 2)
    index = server.get_model_repository_index().models
    assert [(m.name, m.state, m.reason) for m in index] == [("fp32", "READY", ""), ("bad", "UNAVAILABLE", "broken")]
    server.load_model("fp32")
    server.unload_model("fp32")
    expect("INVALID_ARGUMENT", "not accepted", server.load_model, "fp32", config="{}")
    expect("NOT_FOUND", "'nope'", server.get_model_metadata, "nope")
    expect("UNIMPLEMENTED", "", server.get_system_shared_memory_status)
    expect("UNIMPLEMENTED", "", server.get_trace_settings)


def raw(server: client.InferenceServerClient) -> None:
    """Every datatype raw, with and without parameters; classification; errors."""
    for datatype, array in ARRAYS.items():
        parameters = {"slo_latency_ms": 20, "slo_min_accuracy": 0.5, "variant": "fp32", "custom": True}
        options = {"request_id": "7", "priority": 1, "timeout": 1000, "parameters": parameters}
        result = server.infer(datatype.lower(), [tensor(datatype, array)], **options)
        check(datatype, result)
        response = result.get_response()
        assert (response.id, response.model_version) == ("7", "3")
        assert response.parameters["variant"].string_param == "fp32"
    classes = [client.InferRequestedOutput("y", class_count=2)]
    result = server.infer("fp32", [tensor("FP32", np.array([[1, 3, 2]], np.float32))], outputs=classes)
    assert result.as_numpy("y").tolist() == [[b"3.000000:1", b"2.000000:2"]]
    expect("INVALID_ARGUMENT", "'x' is FP32", server.infer, "fp32", [tensor("INT8", ARRAYS["INT8"])])
    expect("INVALID_ARGUMENT", "sequences", server.infer, "fp32", [tensor("FP32", ARRAYS["FP32"])], sequence_id=5)


def typed(address: str) -> None:
    """Every datatype that has a typed list, through the client's own stubs."""
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        for datatype, array in ARRAYS.items():
            if datatype in ("FP16", "BF16"):
                continue
            request = service_pb2.ModelInferRequest(model_name=datatype.lower())
            sent = request.inputs.add(name="x", datatype=datatype, shape=array.shape)
            short = TYPED.get(datatype, "uint" if datatype.startswith("U") else "int")
            values = [v.encode() if isinstance(v, str) else v for v in array.ravel().tolist()]
            getattr(sent.contents, f"{short}_contents").extend(values)
            check(datatype, client.InferResult(stub.ModelInfer(request)))


def stream(server: client.InferenceServerClient) -> None:
    """A stream answers by id, survives a bad request, and marks every answer final."""
    answers: queue.Queue[tuple[client.InferResult, InferenceServerException | None]] = queue.Queue()
    server.start_stream(lambda result, error: answers.put((result, error)))
    for datatype, array in ARRAYS.items():
        server.async_stream_infer(datatype.lower(), [tensor(datatype, array)], request_id=datatype)
    server.async_stream_infer("nope", [tensor("FP32", ARRAYS["FP32"])], request_id="bad")
    server.async_stream_infer("fp32", [tensor("FP32", ARRAYS["FP32"])], request_id="FP32")
    failures = []
    for _ in range(len(ARRAYS) + 2):
        result, error = answers.get(timeout=20)
        if error:
            failures.append(error.message())
            continue
        check(result.get_response().id, result)
        assert result.get_response().parameters["triton_final_response"].bool_param
    assert failures == ["there is no model 'nope'"]
    server.stop_stream()


async def asynchronous(address: str) -> None:
    """The aio client, unary and stream."""
    async with aio_client.InferenceServerClient(address) as server:
        names = list(ARRAYS)
        results = await asyncio.gather(*(server.infer(n.lower(), [tensor(n, ARRAYS[n])]) for n in names))
        for name, result in zip(names, results, strict=True):
            check(name, result)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for name in names:
                yield {"model_name": name.lower(), "inputs": [tensor(name, ARRAYS[name])], "request_id": name}

        count = 0
        async for result, error in server.stream_infer(requests()):
            assert error is None
            check(result.get_response().id, result)
            count += 1
        assert count == len(names)


if __name__ == "__main__":
    with client.InferenceServerClient(sys.argv[1]) as connection:
        describe(connection)
        raw(connection)
        stream(connection)
    typed(sys.argv[1])
    asyncio.run(asynchronous(sys.argv[1]))
