"""Whatever a client sends gets its status, the server lives on, and who shares the batch is answered bit by bit alike.

Every bad request arrives among seven good ones that wait for the same batch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grpc
import models
import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from serving import Answer, Gate, Serving, asking, request_for, serving, wait_until

from protos import open_inference_pb2 as pb

INFER = "/inference.GRPCInferenceService/ModelInfer"
MATES = 7
Request = pb.ModelInferRequest
Code = grpc.StatusCode


class World(NamedTuple):
    """A server with one executor, and a gate before every model."""

    running: Serving
    gates: Mapping[str, Gate]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One server for all cases: what one case breaks, the next one finds."""
    repository = tmp_path_factory.mktemp("repository")
    models.add(repository, "m", models.mlp())
    models.add(repository, "model..1", models.mlp())
    models.add(repository, "tokens", models.tokens())
    for datatype in ("BOOL", "INT8", "UINT8", "FP16", "BF16", "BYTES"):
        models.add(repository, datatype.lower(), models.identity(datatype))
    with serving(repository, executors=1) as running:
        gates = {model.name: Gate(model) for model in running.server.models.served()}
        for gate in gates.values():
            gate.opened.set()
        yield World(running, gates)


def good(model: str = "m", n: int = 0) -> Request:
    """A valid request; another `n` is another request of the same shape."""
    rows = np.random.default_rng(n).standard_normal((1, 16)).astype(np.float32)
    match model:
        case "bytes":
            return _raw(model, "BYTES", (1, 2), _strings(b"a", str(n).encode()))
        case "bool" | "int8" | "uint8":
            return _raw(model, model.upper(), (1, 2), bytes((n % 2, 1)))
        case "fp16" | "bf16":
            return _raw(model, model.upper(), (1, 2), bytes((n, 0, 0, 0)))
        case "tokens":
            return request_for(model, ids=np.array([[n, 1, 2]]), mask=np.ones((1, 3), np.float32))
        case _:
            return request_for(model, x=rows)


def _raw(model: str, datatype: str, shape: tuple[int, ...], *raw: bytes) -> Request:
    request = Request(model_name=model, raw_input_contents=raw)
    request.inputs.add(name="x", datatype=datatype, shape=shape)
    return request


def _strings(*texts: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(text)) + text for text in texts)


def _typed(model: str, datatype: str, shape: tuple[int, ...], **lists: list[Any]) -> Request:
    request = Request(model_name=model)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=shape)
    for name, values in lists.items():
        getattr(tensor.contents, name).extend(values)
    return request


def _changed(*changes: Callable[[Request], object], model: str = "m") -> Request:
    request = good(model)
    for change in changes:
        change(request)
    return request


def _with(field: str, value: object) -> Request:
    return _changed(lambda r: setattr(r, field, value))


def _shape(*shape: int) -> Request:
    return _changed(lambda r: r.inputs[0].ClearField("shape"), lambda r: r.inputs[0].shape.extend(shape))


def _raws(*raws: bytes) -> Request:
    return _changed(lambda r: r.ClearField("raw_input_contents"), lambda r: r.raw_input_contents.extend(raws))


def _datatype(datatype: str) -> Request:
    return _changed(lambda r: setattr(r.inputs[0], "datatype", datatype))


def _row(value: float) -> Request:
    return request_for("m", x=np.full((1, 16), value, np.float32))


def _outputs(*names: str) -> Request:
    return _changed(lambda r: [r.outputs.add(name=name) for name in names])


def _classified(classes: int) -> Request:
    return _changed(lambda r: setattr(r.outputs.add(name="y").parameters["classification"], "int64_param", classes))


def _parameter(name: str, kind: str, value: object) -> Request:
    return _changed(lambda r: setattr(r.parameters[name], kind, value))


def _nothing_chosen(request: Request) -> None:
    request.parameters["empty"].SetInParent()


def _nothing_chosen_for_an_input(request: Request) -> None:
    request.inputs[0].parameters["empty"].SetInParent()


DATA = good().raw_input_contents[0]
ABSENT = (
    "",
    " ",
    "\t",
    "..",
    "../etc",
    "a/../b",
    "/etc/passwd",
    "m/",
    " ..",
    ".. ",
    "m\0b",
    "%2e%2e",
    "ｍ",
    "м",
    "...",
)
VERSIONS = ("-1", "0", "1abc", "99999999999999999999", "１", "../1", "1 ", "+1", "01")

INVALID: dict[str, Request] = {
    # 1 shapes
    "negative-dimension": _shape(-1, 16),
    "no-sample": _shape(0, 16),
    "rank-and-overflow": _shape(2**31, 2**31, 4),
    "overflow": _shape(2**60 + 2, 16),
    "rank-65": _shape(*[1] * 65),
    "product-is-not-data": _shape(2, 16),
    "no-batch-dimension": _shape(16),
    "other-width": _shape(1, 8),
    "no-shape": _shape(),
    # 2 raw and typed contents
    "raw-shorter": _raws(DATA[:-1]),
    "raw-longer": _raws(DATA + b"\0"),
    "raw-empty": _raws(b""),
    "no-data": _raws(),
    "too-many-raws": _raws(DATA, DATA),
    "too-few-raws": _changed(lambda r: r.raw_input_contents.pop(), model="tokens"),
    "raw-and-contents": _changed(lambda r: r.inputs[0].contents.fp32_contents.append(1)),
    "two-lists": _typed("m", "FP32", (1, 16), fp32_contents=[0.0] * 16, int_contents=[0] * 16),
    "wrong-list": _typed("m", "FP32", (1, 16), fp64_contents=[0.0] * 16),
    "too-few-elements": _typed("m", "FP32", (1, 16), fp32_contents=[0.0] * 15),
    "int8-300": _typed("int8", "INT8", (1, 2), int_contents=[1, 300]),
    "uint8-too-large": _typed("uint8", "UINT8", (1, 2), uint_contents=[1, 2**32 - 1]),
    "uint8-in-int-list": _typed("uint8", "UINT8", (1, 2), int_contents=[1, -1]),
    "bool-2": _raw("bool", "BOOL", (1, 2), b"\x01\x02"),
    # 3 datatypes
    "datatype-empty": _datatype(""),
    "datatype-lower": _datatype("fp32"),
    "datatype-float": _datatype("FLOAT"),
    "datatype-unknown": _datatype("FP8"),
    "datatype-other": _datatype("INT32"),
    "fp16-typed": _typed("fp16", "FP16", (1, 2), fp32_contents=[1.0, 2.0]),
    "bf16-odd": _raw("bf16", "BF16", (1, 2), b"\0\0\0"),
    # 4 BYTES
    "string-longer-than-rest": _raw("bytes", "BYTES", (1, 2), _strings(b"a") + struct.pack("<I", 5) + b"abc"),
    "string-4-gigabytes": _raw("bytes", "BYTES", (1, 2), _strings(b"a") + b"\xff\xff\xff\xff"),
    "string-half-a-length": _raw("bytes", "BYTES", (1, 2), _strings(b"abcd") + b"\0\0"),
    "strings-a-million-empty": _raw("bytes", "BYTES", (1, 2**20), b"\0" * 2**22),
    "strings-too-many": _raw("bytes", "BYTES", (1, 2), _strings(b"a", b"b", b"c")),
    "strings-too-few": _raw("bytes", "BYTES", (1, 2), _strings(b"a")),
    "string-not-utf-8": _raw("bytes", "BYTES", (1, 2), _strings(b"a", b"\xff\xfe")),
    # 6 names of inputs and outputs
    "input-twice": _changed(lambda r: r.inputs.append(r.inputs[0]), lambda r: r.raw_input_contents.append(DATA)),
    "input-unknown": _changed(lambda r: setattr(r.inputs[0], "name", "z")),
    "input-missing": _changed(lambda r: r.inputs.pop(), lambda r: r.raw_input_contents.pop(), model="tokens"),
    "no-input": _changed(lambda r: r.inputs.pop(), lambda r: r.raw_input_contents.pop()),
    "output-twice": _outputs("y", "y"),
    "output-unknown": _outputs("z"),
    "outputs-100000": _outputs(*["y"] * 100_000),
    # 9 parameters
    "timeout-negative": _parameter("timeout", "int64_param", -1),
    "timeout-string": _parameter("timeout", "string_param", "1000"),
    "timeout-double": _parameter("timeout", "double_param", 1000.0),
    "priority-negative": _parameter("priority", "int64_param", -1),
    "priority-huge": _parameter("priority", "uint64_param", 2**64 - 1),
    "latency-0": _parameter("slo_latency_ms", "int64_param", 0),
    "latency-negative": _parameter("slo_latency_ms", "int64_param", -1),
    "latency-nan": _parameter("slo_latency_ms", "double_param", math.nan),
    "latency-infinite": _parameter("slo_latency_ms", "double_param", math.inf),
    "latency-string": _parameter("slo_latency_ms", "string_param", "20"),
    "accuracy-above-1": _parameter("slo_min_accuracy", "double_param", 1.0001),
    "accuracy-nan": _parameter("slo_min_accuracy", "double_param", math.nan),
    "drop-negative": _parameter("slo_max_accuracy_drop", "double_param", -0.1),
    "floor-unknown": _parameter("slo_floor", "string_param", "firm"),
    "on-infeasible-unknown": _parameter("slo_on_infeasible", "string_param", "degrade,wait"),
    "on-infeasible-twice": _parameter("slo_on_infeasible", "string_param", "late,late"),
    "variant-as-number": _parameter("variant", "int64_param", 1),
    "variant-empty": _parameter("variant", "string_param", ""),
    "no-choice": _changed(_nothing_chosen),
    "input-parameter-without-value": _changed(_nothing_chosen_for_an_input),
    "reserved": _parameter("triton_x", "bool_param", True),
    "shared-memory": _parameter("shared_memory_region", "string_param", "r"),
    "sequence": _parameter("sequence_id", "int64_param", 3),
    "parameters-1000": _changed(lambda r: [asking(r, **{f"p{n}": 1}) for n in range(1000)]),
    "classes-0": _classified(0),
    "classes-negative": _classified(-1),
    "classes-2^31": _classified(2**31),
    # 10 ids
    "id-10-megabytes": _with("id", "a" * 10_000_000),
}

UNKNOWN: dict[str, Request] = {
    **{f"model-{name!r}": _with("model_name", name) for name in ABSENT},
    "model-10-megabytes": _with("model_name", "m" * 10_000_000),
    **{f"version-{v}": _with("model_version", v) for v in VERSIONS},
    "variant-unknown": _parameter("variant", "string_param", "no-such"),
    "variant-list": _parameter("variant", "string_param", "fp32,amp"),
}

ODD_BUT_VALID: dict[str, Request] = {
    "nan": _row(math.nan),
    "infinity": _row(math.inf),
    "denormal": _row(1e-42),
    "huge": _row(1e38),
    "zeros": _row(0.0),
    "fp16-infinity": _raw("fp16", "FP16", (1, 2), b"\x00\x7c\x00\xfc"),
    "string-with-nul": _raw("bytes", "BYTES", (1, 2), _strings(b"a\0b", b"")),
    "timeout-0": _parameter("timeout", "int64_param", 0),
    "timeout-longest": _parameter("timeout", "int64_param", 2**63 - 1),
    "latency-longest": _parameter("slo_latency_ms", "double_param", 1e300),
    "accuracy-minus-0": _parameter("slo_min_accuracy", "double_param", -0.0),
    "unknown-parameter": _parameter("mine", "double_param", math.nan),
    "classes-all": _classified(2**31 - 1),
    "id-that-forges-a-log-line": _with("id", "\n2026 ERROR forged \x1b[31m"),
    "name-with-dots": good("model..1"),
}


def among_good_ones(world: World, message: bytes, model: str) -> grpc.Call:
    """Send a request amid seven good ones to one batch; assert that those are answered as if alone; its ended call."""
    running, gate = world.running, world.gates[model]
    mates = [good(model, n) for n in range(MATES)]
    alone = [running.infer(mate).response.raw_output_contents[:] for mate in mates]
    gate.shut()
    held = running.v2.ModelInfer.future(good(model, 99))
    assert gate.entered.wait(20)
    waiting = [running.v2.ModelInfer.future(mate) for mate in mates[:3]]
    call = running.channel.unary_unary(INFER).future(message, timeout=20)
    waiting += [running.v2.ModelInfer.future(mate) for mate in mates[3:]]
    wait_until(lambda: sum(running.server.engine.inflight().values()) == 1 + MATES + (not call.done()))
    gate.opened.set()
    held.result()
    together = [future.result() for future in waiting]
    assert [answer.raw_output_contents[:] for answer in together] == alone
    assert {Answer(answer).parameters["batch_size"] for answer in together} <= {MATES, MATES + 1}
    code = call.code()  # waits
    assert not {code} & {Code.UNKNOWN, Code.INTERNAL}
    assert len(call.details() or "") < 2000
    return call


def _model(request: Request) -> str:
    return (
        request.model_name
        if request.model_name in {"int8", "uint8", "bool", "fp16", "bf16", "bytes", "tokens"}
        else "m"
    )


@pytest.mark.parametrize("case", INVALID)
def test_malformed(world: World, case: str) -> None:
    """A malformed request is INVALID_ARGUMENT and its batch-mates get bit by bit what they get alone."""
    request = INVALID[case]
    assert among_good_ones(world, request.SerializeToString(), _model(request)).code() is Code.INVALID_ARGUMENT


@pytest.mark.parametrize("case", UNKNOWN)
def test_unknown(world: World, case: str) -> None:
    """What does not exist is NOT_FOUND, however the name looks, and batch-mates are unharmed."""
    assert among_good_ones(world, UNKNOWN[case].SerializeToString(), "m").code() is Code.NOT_FOUND


@pytest.mark.parametrize("case", ODD_BUT_VALID)
def test_odd_but_valid(world: World, case: str) -> None:
    """Strange but legal requests are answered, in the same batch, as alone, and poison nobody."""
    request = ODD_BUT_VALID[case]
    alone = world.running.infer(request).response
    call = among_good_ones(world, request.SerializeToString(), _model(request))
    assert call.code() is Code.OK, call.details()
    answer = pb.ModelInferResponse.FromString(call.result())
    assert answer.raw_output_contents == alone.raw_output_contents
    assert answer.id == request.id


@pytest.mark.parametrize(
    "message", [b"\xff", good().SerializeToString()[:-1], b"\x0b" * 200, b"\x12\xff\xff\xff\xff\x0f"]
)
def test_no_message_at_all(world: World, message: bytes) -> None:
    """Truncated messages, nested groups and lengths beyond the end are INVALID_ARGUMENT."""
    assert among_good_ones(world, message, "m").code() is Code.INVALID_ARGUMENT


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200), st.integers(0, 200))
def test_random_bytes(world: World, noise: bytes, place: int) -> None:
    """Random bytes in a good message never get more than a client's status or a valid answer."""
    message = good().SerializeToString()
    message = message[:place] + noise + message[place + len(noise) :]
    call = world.running.channel.unary_unary(INFER).future(message, timeout=20)
    assert call.code() in {
        Code.OK,
        Code.INVALID_ARGUMENT,
        Code.NOT_FOUND,
        Code.FAILED_PRECONDITION,
        Code.RESOURCE_EXHAUSTED,
    }


def test_one_sample_above_the_maximum_is_split(world: World) -> None:
    """33 samples at a maximum of 32 are answered, as alone."""
    rows = np.random.default_rng(1).standard_normal((33, 16)).astype(np.float32)
    answer = world.running.infer(request_for("m", x=rows)).array()
    alone = [world.running.infer(request_for("m", x=rows[n : n + 1])).array() for n in range(33)]
    np.testing.assert_array_equal(answer, np.concatenate(alone))


def test_texts_name_what_is_wrong(world: World) -> None:
    """The status text names the parameter or tensor, escapes what came from the client and is short."""
    for case, text in {
        "latency-nan": "'slo_latency_ms'",
        "timeout-string": "'timeout'",
        "raw-longer": "'x' of FP32 [1, 16] takes 64 raw bytes, got 65",
        "output-unknown": "'z' is not one of the model's: y",
    }.items():
        with pytest.raises(grpc.RpcError) as error:
            world.running.infer(INVALID[case])
        assert text in error.value.details()
    with pytest.raises(grpc.RpcError) as error:
        world.running.infer(Request(model_name="\n\x1b[31m" + "n" * 10_000))
    assert error.value.details().startswith(r"there is no model '\n\x1b[31m")
    assert len(error.value.details()) < 200


def test_every_bad_request_was_counted_once(world: World) -> None:
    """The counters of a server that took all this still add up."""
    before = world.running.outcomes().get("invalid", 0)
    for request in INVALID.values():
        with pytest.raises(grpc.RpcError):
            world.running.infer(request)
    wait_until(lambda: world.running.outcomes()["invalid"] - before >= len(INVALID))
    assert world.running.outcomes()["invalid"] - before == len(INVALID)
