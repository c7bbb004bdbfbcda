"""ModelInfer between bytes and values: what is accepted, what is refused and how, what comes back."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from wire_requests import BATCHED, PLAIN, raw_request, read, refuse, with_parameters

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.scheduling.slo import Slo
from server.wire.inference import (
    RequestedOutput,
    Signature,
    encode_response,
    encode_stream_error,
    encode_stream_response,
    parse_infer,
    read_request,
)
from variants.variant import TensorSpec


def test_valid_request_becomes_values() -> None:
    """Inputs come as arrays in the model's order, with samples, shape key, all outputs and no SLO."""
    request = raw_request()
    request.inputs.reverse()
    request.raw_input_contents.reverse()
    got = read(request)
    assert (got.model, got.version, got.id, got.samples) == ("m", "", "7", 2)
    assert list(got.inputs) == ["a", "b"]
    np.testing.assert_array_equal(got.inputs["a"], np.arange(6, dtype=np.float32).reshape(2, 3))
    np.testing.assert_array_equal(got.inputs["b"], np.arange(10).reshape(2, 5))
    assert got.shape_key == ((3,), (5,))
    assert [output.name for output in got.outputs] == ["y", "z", "s"]
    assert (got.slo, got.timeout_ns) == (Slo(), None)
    assert got.payload_bytes == 6 * 4 + 10 * 8


def test_shape_key_ignores_the_batch_and_nothing_else() -> None:
    """Requests may share a batch exactly when all their other dimensions agree."""
    two, one, wide = (
        raw_request(),
        raw_request(np.zeros((1, 3), "f4"), np.zeros((1, 5), "i8")),
        raw_request(b=np.zeros((2, 6), "i8")),
    )
    assert read(two).shape_key == read(one).shape_key != read(wide).shape_key


def test_model_without_batch_dimension() -> None:
    """Without a batch dimension a request is one sample and its whole shape is its key."""
    request = pb.ModelInferRequest()
    request.inputs.add(name="a", datatype="FP32", shape=[2, 0])
    request.raw_input_contents.append(b"")
    got = read(request, PLAIN)
    assert (got.samples, got.shape_key) == (1, ((2, 0),))


def test_empty_batch_is_refused() -> None:
    """A request without a sample is refused even where its data agree with its shape."""
    refuse(raw_request(np.zeros((0, 3), "f4"), np.zeros((0, 5), "i8")), "holds no sample")


def test_more_samples_than_a_batch_holds_are_accepted() -> None:
    """A request above the maximum batch size is valid: the engine splits it."""
    assert read(raw_request(np.zeros((50, 3), "f4"), np.zeros((50, 1), "i8"))).samples == 50


def test_batched_shapes_start_with_the_batch() -> None:
    """A batched signature whose tensors have no batch dimension is a programming error."""
    with pytest.raises(ValueError, match="no batch dimension"):
        Signature((TensorSpec("a", "FP32", (2, 3)),), BATCHED.outputs, 8)


@pytest.mark.parametrize("message", [b"\xff", b"\x0a\xff\xff\xff\xff\x07ab", bytes(100), b"\x2a\x05abc"])
def test_undecodable_bytes(message: bytes) -> None:
    """Bytes that are no message are refused as such."""
    with pytest.raises(InvalidRequest, match="not decode as inference"):
        parse_infer(message)


@pytest.mark.parametrize("shape", [[-1, 3], [0, 3], [2**31, 2**31], [3], [2, 3, 1], [], [2, 4], [2] * 65, [2**62, 3]])
def test_wrong_shapes(shape: list[int]) -> None:
    """A shape that does not fit the model, or holds no sample, is refused with the input's name."""
    request = raw_request()
    del request.inputs[0].shape[:]
    request.inputs[0].shape.extend(shape)
    refuse(request, "'a'")


@pytest.mark.parametrize("datatype", ["", "fp32", "FLOAT", "FP16", "INT64", "X" * 100_000])
def test_wrong_datatypes(datatype: str) -> None:
    """Only the model's own datatype, spelled exactly, is accepted."""
    request = raw_request()
    request.inputs[0].datatype = datatype
    refuse(request, "input 'a' is FP32")


def test_inputs_must_be_exactly_the_models() -> None:
    """Unknown, repeated, missing and too many inputs are refused, each with its own reason."""
    unknown, repeated, missing, none = (raw_request() for _ in range(4))
    unknown.inputs[1].name = "c\n"
    refuse(unknown, r"input 'c\n' is not one of the model's: a, b")
    repeated.inputs[1].CopyFrom(repeated.inputs[0])
    refuse(repeated, "input 'a' is given twice")
    del missing.inputs[1], missing.raw_input_contents[1]
    refuse(missing, "lacks the input b")
    del none.inputs[:], none.raw_input_contents[:]
    refuse(none, "lacks the input a, b")


@pytest.mark.parametrize("change", [lambda raws: raws.append(b""), lambda raws: raws.pop()])
def test_raw_contents_match_inputs_one_to_one(change: Any) -> None:
    """Too few and too many raw entries are refused alike."""
    request = raw_request()
    change(request.raw_input_contents)
    refuse(request, "one each is needed")


def test_raw_and_typed_never_mix() -> None:
    """Contents beside raw_input_contents are refused, even empty ones."""
    request = raw_request()
    request.inputs[0].contents.SetInParent()
    refuse(request, "input 'a' has contents")


def test_typed_request_equals_raw() -> None:
    """A request with typed contents gives the same values as the raw one."""
    raw = raw_request()
    typed = raw_request()
    del typed.raw_input_contents[:]
    typed.inputs[0].contents.fp32_contents.extend(range(6))
    typed.inputs[1].contents.int64_contents.extend(range(10))
    for name, array in read(typed).inputs.items():
        np.testing.assert_array_equal(array, read(raw).inputs[name])


def test_inputs_agree_on_samples() -> None:
    """Inputs with different numbers of samples are refused."""
    refuse(raw_request(np.zeros((1, 3), "f4")), "different numbers of samples: {'a': 1, 'b': 2}")


def test_shared_memory_is_refused_wherever_it_is_asked() -> None:
    """shared_memory_region in an input, an output or the request is a clear refusal."""
    for place in ("inputs", "outputs", "request"):
        request = raw_request()
        request.outputs.add(name="y")
        target = request if place == "request" else getattr(request, place)[0]
        target.parameters["shared_memory_region"].string_param = "r"
        refuse(request, "shared memory is not offered")


def test_requested_outputs_are_kept_in_order() -> None:
    """Only the outputs asked for, in that order, classification included."""
    request = raw_request()
    request.outputs.add(name="z")
    request.outputs.add(name="y").parameters["classification"].int64_param = 3
    assert read(request).outputs == (RequestedOutput("z", "INT64"), RequestedOutput("y", "FP32", 3))


def test_wrong_requested_outputs() -> None:
    """Unknown, repeated and endlessly many outputs are refused."""
    unknown, repeated = raw_request(), raw_request()
    unknown.outputs.add(name="n")
    refuse(unknown, "output 'n' is not one of the model's: y, z, s")
    for _ in range(100_000):
        repeated.outputs.add(name="y")
    refuse(repeated, "output 'y' is requested twice")


@pytest.mark.parametrize(
    "value", [{"int64_param": 0}, {"int64_param": -1}, {"int64_param": 2**31}, {"string_param": "3"}, {}]
)
def test_wrong_classification(value: dict[str, Any]) -> None:
    """A class count is a positive int64 of sane size."""
    request = raw_request()
    request.outputs.add(name="y").parameters["classification"].CopyFrom(pb.InferParameter(**value))
    refuse(request, "classification")


def test_strings_cannot_be_classified() -> None:
    """A BYTES output has no highest values."""
    request = raw_request()
    request.outputs.add(name="s").parameters["classification"].int64_param = 1
    refuse(request, "BYTES cannot be classified")


def test_long_id() -> None:
    """An id of unreasonable length is refused without being repeated."""
    request = raw_request()
    request.id = "x" * 10_000_000
    refuse(request, "10000000 characters")


def answer(request: pb.ModelInferRequest, **parameters: Any) -> pb.ModelInferResponse:
    """A response for two samples, decoded."""
    outputs = {
        "y": np.array([[float("nan"), 0.7, 0.1, 0.7], [4, 3, 2, 1]], np.float32),
        "z": np.array([5, 6]),
        "s": np.array([["é"], ["b"]], np.object_),
    }
    return pb.ModelInferResponse.FromString(encode_response(read(request), "3", outputs, parameters))


def test_response_is_raw_and_complete() -> None:
    """Model, version used, id, and every output in raw_output_contents with its datatype and shape."""
    got = answer(raw_request())
    assert (got.model_name, got.model_version, got.id) == ("m", "3", "7")
    assert [(o.name, o.datatype, list(o.shape)) for o in got.outputs] == [
        ("y", "FP32", [2, 4]),
        ("z", "INT64", [2]),
        ("s", "BYTES", [2, 1]),
    ]
    assert not any(o.HasField("contents") for o in got.outputs)
    assert np.frombuffer(got.raw_output_contents[0], np.float32)[4] == 4
    assert got.raw_output_contents[1] == struct.pack("<qq", 5, 6)
    assert got.raw_output_contents[2] == b"\2\0\0\0" + "é".encode() + b"\1\0\0\0b"


def test_response_holds_what_was_asked_in_that_order() -> None:
    """Requested outputs decide content and order."""
    request = raw_request()
    request.outputs.add(name="s")
    request.outputs.add(name="z")
    assert [o.name for o in answer(request).outputs] == ["s", "z"]


@pytest.mark.parametrize("size", [0, 1, 127, 128, 255, 256, 16_383, 16_384, 3_000_000])
def test_response_equals_protobufs_own_encoding(size: int) -> None:
    """Joining parts gives what protobuf itself would have built, whatever the length of the data."""
    raw = np.zeros((1, size), np.uint8)
    request = read(raw_request())
    object.__setattr__(request, "outputs", (RequestedOutput("y", "UINT8"),))
    expected = pb.ModelInferResponse(model_name="m", model_version="1", id="7", raw_output_contents=[raw.tobytes()])
    expected.outputs.add(name="y", datatype="UINT8", shape=[1, size])
    expected.parameters["variant"].string_param = "fp32"
    expected.parameters["queue_us"].int64_param = 12
    got = encode_response(request, "1", {"y": raw}, {"queue_us": 12, "variant": "fp32"})
    assert pb.ModelInferResponse.FromString(got) == expected
    streamed = pb.ModelStreamInferResponse.FromString(encode_stream_response(got)).infer_response
    assert streamed.raw_output_contents[0] == raw.tobytes()


def test_response_parameters_keep_their_types() -> None:
    """bool, int, float and str become bool, int64, double and string parameters."""
    got = answer(raw_request(), slo_met=True, batch_size=8, variant_accuracy=0.5, variant="fp32").parameters
    kinds = {
        name: (p.WhichOneof("parameter_choice"), getattr(p, p.WhichOneof("parameter_choice")))
        for name, p in got.items()
    }
    assert kinds == {
        "slo_met": ("bool_param", True),
        "batch_size": ("int64_param", 8),
        "variant_accuracy": ("double_param", 0.5),
        "variant": ("string_param", "fp32"),
    }


@pytest.mark.parametrize(
    ("output", "classes", "expected"),
    [
        ("y", 2, [["0.700000:1", "0.700000:3"], ["4.000000:0", "3.000000:1"]]),
        ("y", 99, [["0.700000:1", "0.700000:3", "0.100000:2", "nan:0"], [f"{4 - n}.000000:{n}" for n in range(4)]]),
        ("z", 1, [["5:0"], ["6:0"]]),
    ],
)
def test_classification(output: str, classes: int, expected: list[list[str]]) -> None:
    """The highest values of each sample, highest first, equals by index, NaN last, never more than there are."""
    request = raw_request()
    request.outputs.add(name=output).parameters["classification"].int64_param = classes
    got = answer(request)
    assert (got.outputs[0].datatype, list(got.outputs[0].shape)) == ("BYTES", [2, len(expected[0])])
    flat = [text for row in expected for text in row]
    assert got.raw_output_contents[0] == b"".join(struct.pack("<I", len(text)) + text.encode() for text in flat)


def test_stream_response_is_final_and_whole() -> None:
    """In a stream the answer is wrapped unchanged and marked as the request's last."""
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=[bytes(300)])
    got = pb.ModelStreamInferResponse.FromString(encode_stream_response(response.SerializeToString()))
    assert got.error_message == ""
    assert got.infer_response.parameters.pop("triton_final_response").bool_param
    assert got.infer_response == response


def test_stream_error_names_its_request() -> None:
    """A failure in a stream has a text that is never empty and the request's id."""
    got = pb.ModelStreamInferResponse.FromString(encode_stream_error("", "7"))
    assert got.error_message
    assert got.infer_response == pb.ModelInferResponse(id="7")


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_valid(message: bytes) -> None:
    """Whatever bytes come, the only error is InvalidRequest."""
    with contextlib.suppress(InvalidRequest):
        read_request(parse_infer(message), BATCHED)


@given(st.data())
def test_mutated_requests_are_refused_or_valid(data: st.DataObject) -> None:
    """A valid request with a few bytes changed, cut or added raises nothing but InvalidRequest."""
    message = bytearray(
        with_parameters(slo_latency_ms={"int64_param": 20}, variant={"string_param": "x"}).SerializeToString()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(message) - 1))
        message[place : place + data.draw(st.integers(0, 2))] = data.draw(st.binary(max_size=2))
    try:
        got = read_request(parse_infer(bytes(message)), BATCHED)
    except InvalidRequest:
        return
    assert got.samples >= 1
    assert all(len(array) == got.samples for array in got.inputs.values())
