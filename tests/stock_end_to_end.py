"""What an unmodified tritonclient gets from the whole server; run as `stock_end_to_end.py CHECK HOST:PORT`.

It has a process of its own, without our stubs. The models are those of `test_end_to_end.py`.
"""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import AsyncIterator, Callable
from typing import Any

import numpy as np
import tritonclient.grpc as client
import tritonclient.grpc.aio as aio_client
from stock_client import ARRAYS, asynchronous, check, expect, stream, tensor, typed
from tritonclient.utils import InferenceServerException

ROW = np.linspace(-1, 1, 16, dtype=np.float32)[None]
PARAMETERS = {"variant", "variant_accuracy", "reason", "batch_size", "queue_us", "compute_us", "slo_met", "floor_met"}


def named(name: str, datatype: str, array: np.ndarray[Any, Any]) -> client.InferInput:
    """An input of this name."""
    made = client.InferInput(name, array.shape, datatype)
    made.set_data_from_numpy(array)
    return made


def row() -> list[client.InferInput]:
    """The inputs of the model `mlp`."""
    return [named("x", "FP32", ROW)]


def parameters_of(result: client.InferResult) -> dict[str, Any]:
    """The response parameters as plain values."""
    found = result.get_response().parameters
    return {name: getattr(value, value.WhichOneof("parameter_choice")) for name, value in found.items()}


def describe(server: client.InferenceServerClient) -> None:
    """Health, metadata, configuration, statistics and the repository, as stock tools read them."""
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("mlp")
    assert server.is_model_ready("mlp", "3")
    assert not server.is_model_ready("mlp", "4")
    assert not server.is_model_ready("nope")
    about = server.get_server_metadata()
    assert about.name == "gearshift"
    assert "statistics" in about.extensions
    facts = server.get_model_metadata("tokens")
    assert [(i.name, i.datatype, list(i.shape)) for i in facts.inputs] == [
        ("ids", "INT64", [-1, -1]),
        ("mask", "FP32", [-1, -1]),
    ]
    assert [o.name for o in facts.outputs] == ["masked", "sum"]
    config = server.get_model_config("mlp").config
    assert (config.max_batch_size, list(config.input[0].dims)) == (32, [16])
    assert server.get_model_config("matrix").config.max_batch_size == 0
    index = {m.name: m for m in server.get_model_repository_index().models}
    assert (index["mlp"].version, index["mlp"].state) == ("3", "READY")
    assert index["broken"].state == "UNAVAILABLE"
    assert "model.onnx" in index["broken"].reason
    expect("NOT_FOUND", "'nope'", server.get_model_metadata, "nope")
    expect("NOT_FOUND", "'4'", server.get_model_config, "mlp", "4")
    expect("UNAVAILABLE", "broken", server.get_model_config, "broken")
    expect("UNIMPLEMENTED", "--admin", server.load_model, "mlp")
    expect("UNIMPLEMENTED", "--admin", server.unload_model, "mlp")
    for refused in (server.get_system_shared_memory_status, server.get_trace_settings, server.get_log_settings):
        expect("UNIMPLEMENTED", "", refused)


def count(server: client.InferenceServerClient) -> None:
    """Statistics go up by what was sent."""
    before = server.get_inference_statistics("counted").model_stats[0]
    for _ in range(3):
        server.infer("counted", [named("x", "FP32", np.ones((2, 16), np.float32))])
    after = server.get_inference_statistics("counted").model_stats[0]
    assert after.inference_count - before.inference_count == 6
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.compute_infer.ns > before.inference_stats.compute_infer.ns
    stats = after.inference_stats
    counts = {stats.compute_input.count, stats.compute_infer.count, stats.compute_output.count}
    assert counts == {stats.success.count}, "perf_analyzer aborts when they differ"
    assert [(b.batch_size, b.compute_infer.count) for b in after.batch_stats] == [(2, 3)]
    assert {m.name for m in server.get_inference_statistics().model_stats} >= {"counted", "mlp", "matrix"}


def datatypes(server: client.InferenceServerClient) -> None:
    """Every datatype, raw."""
    for datatype, array in ARRAYS.items():
        check(datatype, server.infer(datatype.lower(), [tensor(datatype, array)]))


def arguments(server: client.InferenceServerClient) -> None:
    """Every argument of `infer` that means something here arrives and comes back."""
    custom = {"slo_latency_ms": 30_000, "slo_max_accuracy_drop": 0.0, "slo_floor": "hard", "mine": True}
    options: dict[str, Any] = {"request_id": "a-7", "model_version": "3", "priority": 1, "timeout": 30_000_000}
    result = server.infer("mlp", row(), client_timeout=30, parameters=custom, **options)
    response = result.get_response()
    assert (response.id, response.model_name, response.model_version) == ("a-7", "mlp", "3")
    got = parameters_of(result)
    assert set(got) == PARAMETERS
    assert (got["variant"], got["batch_size"], got["slo_met"], got["floor_met"]) == ("fp32", 1, True, True)
    assert parameters_of(server.infer("mlp", row(), parameters={"variant": "fp32"}))["reason"] == "pinned"
    expect("NOT_FOUND", "no variant", server.infer, "mlp", row(), parameters={"variant": "int4"})
    expect("NOT_FOUND", "'2'", server.infer, "mlp", row(), model_version="2")
    expect("NOT_FOUND", "'nope'", server.infer, "nope", row())
    expect("UNAVAILABLE", "not ready", server.infer, "broken", row())
    tight = {"slo_latency_ms": 0.001}
    expect("FAILED_PRECONDITION", "achievable here: fp32", server.infer, "mlp", row(), parameters=tight)
    expect("FAILED_PRECONDITION", "achievable here: fp32", server.infer, "mlp", row(), timeout=1)
    expect("FAILED_PRECONDITION", "floor", server.infer, "mlp", row(), parameters={"slo_min_accuracy": 0.9})


def outputs(server: client.InferenceServerClient) -> None:
    """Several inputs in any order, requested outputs in the order asked, dynamic dimensions, classification."""
    for length in (1, 5, 9):
        ids, mask = np.arange(2 * length).reshape(2, length), np.full((2, length), 0.5, np.float32)
        inputs = [named("mask", "FP32", mask), named("ids", "INT64", ids)]
        result = server.infer("tokens", inputs)
        np.testing.assert_array_equal(result.as_numpy("masked"), ids * mask)
        np.testing.assert_array_equal(result.as_numpy("sum"), (ids * mask).sum(1, keepdims=True))
        wanted = [client.InferRequestedOutput("sum"), client.InferRequestedOutput("masked", class_count=1)]
        result = server.infer("tokens", inputs, outputs=wanted)
        assert [o.name for o in result.get_response().outputs] == ["sum", "masked"]
        assert result.as_numpy("masked")[0].tolist() == [f"{(length - 1) / 2:f}:{length - 1}".encode()]
        only = server.infer("tokens", inputs, outputs=[client.InferRequestedOutput("sum")])
        assert only.as_numpy("masked") is None
    doubled = server.infer("matrix", [named("x", "FP32", np.ones((2, 3), np.float32))])
    np.testing.assert_array_equal(doubled.as_numpy("y"), np.full((2, 3), 2.0))
    bare = server.infer("fp32", [tensor("FP32", np.zeros((3, 0), np.float32))])
    assert list(bare.get_response().outputs[0].shape) == [3, 0]


def split(server: client.InferenceServerClient) -> None:
    """More samples than the largest batch come back whole and in order."""
    many = np.random.default_rng(0).standard_normal((100, 16)).astype(np.float32)
    whole = server.infer("mlp", [named("x", "FP32", many)])
    parts = [server.infer("mlp", [named("x", "FP32", many[i : i + 1])]).as_numpy("y") for i in range(100)]
    np.testing.assert_array_equal(whole.as_numpy("y"), np.concatenate(parts))
    assert parameters_of(whole)["batch_size"] <= 32


def callbacks(server: client.InferenceServerClient) -> None:
    """`async_infer` calls back for each request, with the answer or the error."""
    done: queue.Queue[tuple[client.InferResult | None, InferenceServerException | None]] = queue.Queue()
    for n in range(20):
        inputs = [named("x", "FP32", ROW * n)] if n % 5 else [named("x", "FP32", ROW[:, :3])]
        server.async_infer("mlp", inputs, lambda result, error: done.put((result, error)), request_id=str(n))
    results = [done.get(timeout=20) for _ in range(20)]
    errors = [error for _, error in results if error]
    assert {error.status() for error in errors} == {"StatusCode.INVALID_ARGUMENT"}
    assert len(errors) == 4
    answered = {int(result.get_response().id): result.as_numpy("y") for result, _ in results if result}
    for n, rows in answered.items():
        np.testing.assert_array_equal(rows, server.infer("mlp", [named("x", "FP32", ROW * n)]).as_numpy("y"))


def strict_stream(server: client.InferenceServerClient) -> None:
    """With `triton_grpc_error` a failed request ends the stream with its status."""
    answers: queue.Queue[tuple[client.InferResult | None, InferenceServerException | None]] = queue.Queue()
    server.start_stream(lambda result, error: answers.put((result, error)), headers={"triton_grpc_error": "true"})
    server.async_stream_infer("mlp", row(), request_id="good")
    result, error = answers.get(timeout=20)
    assert error is None
    assert result is not None
    assert result.get_response().id == "good"
    server.async_stream_infer("nope", row(), request_id="bad")
    _, error = answers.get(timeout=20)
    assert error is not None
    assert error.status() == "StatusCode.NOT_FOUND"
    server.stop_stream()


async def aio_errors(address: str) -> None:
    """The aio client gets statuses, keeps working after them, and its cancellation is heard."""
    async with aio_client.InferenceServerClient(address) as server:
        assert await server.is_server_ready()
        for model, status in (("nope", "NOT_FOUND"), ("broken", "UNAVAILABLE")):
            try:
                await server.infer(model, row())
            except InferenceServerException as error:
                assert error.status() == f"StatusCode.{status}", error
            else:
                raise AssertionError(model)

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for name in ("mlp", "nope", "mlp"):
                yield {"model_name": name, "inputs": row(), "request_id": name}

        answers = [pair async for pair in server.stream_infer(requests())]
        assert sorted(error is None for _, error in answers) == [False, True, True]
        task = asyncio.ensure_future(server.infer("mlp", row()))
        await asyncio.sleep(0)
        task.cancel()
        assert (await server.infer("mlp", row())).as_numpy("y").shape == (1, 16)


CHECKS: dict[str, Callable[[client.InferenceServerClient], None]] = {
    each.__name__: each
    for each in (describe, count, datatypes, arguments, outputs, split, callbacks, stream, strict_stream)
}
ADDRESS_CHECKS: dict[str, Callable[[str], None]] = {
    "typed": typed,
    "aio": lambda address: asyncio.run(asynchronous(address)),
    "aio_errors": lambda address: asyncio.run(aio_errors(address)),
}


if __name__ == "__main__":
    name, address = sys.argv[1:]
    if name in ADDRESS_CHECKS:
        ADDRESS_CHECKS[name](address)
    else:
        with client.InferenceServerClient(address) as connection:
            CHECKS[name](connection)
