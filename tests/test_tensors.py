"""Tensors between the wire and numpy."""

from __future__ import annotations

import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.wire.tensors import (
    MAX_STRINGS,
    MAX_TYPED_INTEGERS,
    decode_contents,
    decode_raw,
    element_count,
    encode_raw,
    quoted,
)
from variants.datatypes import DATATYPES

NUMBERS = [name for name in DATATYPES if name != "BYTES"]


def sample(datatype: str) -> np.ndarray[Any, Any]:
    """A 2x3 tensor with the extremes of its datatype."""
    dtype = DATATYPES[datatype].numpy
    if datatype == "BYTES":
        return np.array([["a", "", "\0"], ["é", "x" * 300, "\n"]], np.object_)
    if dtype.kind == "b":
        return np.array([[True, False, True], [False, False, True]])
    bounds = np.iinfo(dtype) if dtype.kind in "iu" else ml_dtypes.finfo(dtype)
    return np.array([[bounds.min, 0, 1], [2, 3, bounds.max]], dtype)


@pytest.mark.parametrize("datatype", DATATYPES)
def test_raw_round_trip(datatype: str) -> None:
    """Every datatype survives raw encoding and decoding, value by value."""
    array = sample(datatype)
    decoded = decode_raw("x", datatype, (2, 3), bytes(encode_raw(datatype, array)))
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


@pytest.mark.parametrize("datatype", NUMBERS)
def test_raw_bytes_are_numpys_little_endian(datatype: str) -> None:
    """Raw encoding is the array's own memory in row-major order, also for a transposed or a sliced array."""
    array = sample(datatype)
    for form in (array, array.T, array[:, ::2]):
        assert b"".join([encode_raw(datatype, form)]) == form.tobytes()


def test_raw_bytes_are_of_the_datatype_announced() -> None:
    """An array of another dtype is converted, so that a client never reads bytes as something they are not."""
    assert bytes(encode_raw("FP32", np.array([1.5]))) == np.array([1.5], np.float32).tobytes()


def test_raw_decoding_copies_nothing() -> None:
    """A decoded tensor is a read-only view of the message's bytes."""
    raw = np.arange(6, dtype=np.float32).tobytes()
    decoded = decode_raw("x", "FP32", (2, 3), raw)
    assert np.shares_memory(decoded, np.frombuffer(raw, np.float32))
    assert not decoded.flags.writeable


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1, 1, 1, 1, 1, 1, 1, 1)])
def test_odd_shapes_are_fine(shape: tuple[int, ...]) -> None:
    """Scalars, empty tensors and the highest rank pass both ways."""
    array = np.ones(shape, np.float32)
    assert decode_raw("x", "FP32", shape, bytes(encode_raw("FP32", array))).shape == shape
    contents = pb.InferTensorContents(fp32_contents=array.ravel().tolist())
    assert decode_contents("x", "FP32", shape, contents).shape == shape


TYPED = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}


@pytest.mark.parametrize(("datatype", "name"), TYPED.items())
def test_typed_contents_equal_raw(datatype: str, name: str) -> None:
    """Typed contents give the very array that raw bytes give."""
    array = sample(datatype)
    contents = pb.InferTensorContents(**{name: array.ravel().tolist()})
    decoded = decode_contents("x", datatype, (2, 3), contents)
    assert decoded.dtype == array.dtype
    np.testing.assert_array_equal(decoded, array)


def test_typed_strings() -> None:
    """bytes_contents become str elements, embedded NULs included."""
    contents = pb.InferTensorContents(bytes_contents=[b"a\0b", "é".encode()])
    assert decode_contents("x", "BYTES", (2,), contents).tolist() == ["a\0b", "é"]


@pytest.mark.parametrize("shape", [(-1, 4), (2**31, 2**31, 4), (16, 2**60 + 2), (1,) * 9, (1,) * 65])
def test_impossible_shapes_are_refused_before_allocation(shape: tuple[int, ...]) -> None:
    """Negative, overflowing and too deep shapes are refused, whatever data comes with them."""
    for raw in (b"", bytes(16)):
        with pytest.raises(InvalidRequest, match="'x'"):
            decode_raw("x", "FP32", shape, raw)
    with pytest.raises(InvalidRequest, match="'x'"):
        decode_contents("x", "FP32", shape, pb.InferTensorContents(fp32_contents=[1.0]))
    with pytest.raises(InvalidRequest, match="'x'"):
        decode_raw("x", "BYTES", shape, bytes(16))


def test_empty_tensors_can_be_joined_to_a_batch() -> None:
    """The largest that is taken, times any batch, is still a shape that numpy can hold."""
    with pytest.raises(InvalidRequest, match="'x'"):
        decode_raw("x", "FP64", (1, 2**41, 0), b"")
    array = decode_raw("x", "FP64", (1, 2**40, 0), b"")
    assert np.concatenate([array] * 4096).shape == (4096, 2**40, 0)


def test_element_count_does_not_overflow() -> None:
    """Counts beyond 64 bits are exact."""
    assert element_count("x", (2**62, 2**62)) == 2**124


@pytest.mark.parametrize(
    ("datatype", "raw", "text"),
    [
        ("FP32", bytes(23), "24 raw bytes, got 23"),
        ("FP32", bytes(25), "24 raw bytes, got 25"),
        ("FP32", b"", "got 0"),
        ("BF16", bytes(11), "got 11"),
        ("BOOL", b"\0\1\0\1\2\0", "got 2"),
    ],
)
def test_wrong_raw_bytes(datatype: str, raw: bytes, text: str) -> None:
    """One byte too few or too many, or a BOOL that is none, is refused with the reason."""
    with pytest.raises(InvalidRequest, match=text):
        decode_raw("x", datatype, (2, 3), raw)


def frame(*values: bytes) -> bytes:
    """Length-prefixed elements."""
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"", "at least 8 raw bytes"),
        (b"\xff\xff\xff\xff" + bytes(8), "element 0 is longer"),
        (frame(b"abcd") + b"\1\0\0", "inside the length of element 1"),
        (frame(b"a", b"b", b"c"), "5 raw bytes follow"),
        (frame(b"a", b"\xff"), "element 1 is not valid UTF-8"),
    ],
)
def test_wrong_string_framing(raw: bytes, text: str) -> None:
    """A BYTES tensor whose lengths do not add up, or whose text is no UTF-8, is refused with the place."""
    with pytest.raises(InvalidRequest, match=text):
        decode_raw("x", "BYTES", (2,), raw)


def test_too_many_strings() -> None:
    """A flood of empty elements is refused before it becomes Python objects."""
    count = MAX_STRINGS + 1
    with pytest.raises(InvalidRequest, match=f"{count} BYTES elements"):
        decode_raw("x", "BYTES", (count,), bytes(4 * count))


def test_too_many_typed_integers() -> None:
    """They would be unpacked one by one while nobody else is served; the client is told the way out."""
    count = MAX_TYPED_INTEGERS + 1
    contents = pb.InferTensorContents(int_contents=[0] * count)
    with pytest.raises(InvalidRequest, match=f"{count} integers.*raw_input_contents"):
        decode_contents("x", "INT8", (count,), contents)


def test_unknown_fields_behind_typed_contents_change_nothing() -> None:
    """What a newer client adds to the contents is not taken for numbers."""
    known = pb.InferTensorContents(fp32_contents=[1.5, -2.0]).SerializeToString()
    unknown = b"\x98\x06\x2a"  # field 99, a varint
    contents = pb.InferTensorContents.FromString(known + unknown)
    assert decode_contents("x", "FP32", (2,), contents).tolist() == [1.5, -2.0]


@pytest.mark.parametrize(
    ("datatype", "contents", "text"),
    [
        ("FP16", pb.InferTensorContents(fp32_contents=[1.0]), "raw_input_contents only"),
        ("BF16", pb.InferTensorContents(), "raw_input_contents only"),
        ("FP32", pb.InferTensorContents(fp64_contents=[1.0]), "must fill fp32_contents"),
        ("FP32", pb.InferTensorContents(fp32_contents=[1.0], int_contents=[1]), "no other list"),
        ("FP32", pb.InferTensorContents(), "takes 1 elements, got 0"),
        ("FP32", pb.InferTensorContents(fp32_contents=[1.0, 2.0]), "takes 1 elements, got 2"),
        ("INT8", pb.InferTensorContents(int_contents=[300]), "300 is not INT8"),
        ("INT8", pb.InferTensorContents(int_contents=[-129]), "-129 is not INT8"),
        ("INT16", pb.InferTensorContents(int_contents=[32768]), "32768 is not INT16"),
        ("UINT8", pb.InferTensorContents(uint_contents=[2**32 - 1]), "4294967295 is not UINT8"),
        ("UINT16", pb.InferTensorContents(uint_contents=[65536]), "65536 is not UINT16"),
        ("BYTES", pb.InferTensorContents(bytes_contents=[b"\xc3"]), "not valid UTF-8"),
    ],
)
def test_wrong_typed_contents(datatype: str, contents: pb.InferTensorContents, text: str) -> None:
    """A wrong list, a second list, a wrong count or a value outside the datatype is refused, never wrapped."""
    with pytest.raises(InvalidRequest, match=text):
        decode_contents("x", datatype, (1,), contents)


@given(
    st.sampled_from(list(DATATYPES)), st.lists(st.integers(-2, 2**33), max_size=10).map(tuple), st.binary(max_size=64)
)
@example("BYTES", (0, 2**16, 2**16, 2**29), b"")
@example("UINT64", (0, 2**30, 2**30), b"")
@example("FP64", (2**29, 0, 2**30), b"")
def test_any_claim_with_any_bytes_is_decoded_or_refused(datatype: str, shape: tuple[int, ...], raw: bytes) -> None:
    """No shape and no bytes raise anything but InvalidRequest, and what decodes has the claimed shape."""
    try:
        decoded = decode_raw("x", datatype, shape, raw)
    except InvalidRequest:
        return
    assert decoded.shape == shape


@given(st.lists(st.text()))
def test_any_text_survives(texts: list[str]) -> None:
    """Strings of every kind pass a raw round trip."""
    array = np.array([*texts, ""], np.object_)[:-1]
    raw = bytes(encode_raw("BYTES", array))
    assert decode_raw("x", "BYTES", (len(texts),), raw).tolist() == texts


def test_clients_text_is_quoted() -> None:
    """Control characters cannot forge a log line, and a long text is cut."""
    assert quoted("a\n\x1b[31m") == r"'a\n\x1b[31m'"
    assert len(quoted("x" * 1_000_000)) < 80
