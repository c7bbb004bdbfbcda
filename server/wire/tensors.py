"""Tensors between the wire and numpy: raw bytes or typed contents in, raw bytes out.

Rules: everything a client claims is checked before anything is allocated for it, with Python integers, which do not
overflow. A raw tensor becomes a read-only view of the message's bytes, never a copy. Raw data is little-endian, as
every host that a runtime ships for is. Errors are `InvalidRequest` and name the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from struct import Struct
from typing import Any

import numpy as np

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from variants.datatypes import DATATYPES

MAX_RANK = 8
_MOST_ELEMENTS = 2**40  # of a tensor that is empty; batches of such must not overflow an address
MAX_STRINGS = 250_000
"""Most BYTES elements of one tensor: each costs a Python object, whatever its length."""
MAX_TYPED_INTEGERS = 1_000_000
"""Most integers of one tensor in typed contents: the protocol's packing of them is only undone one by one, while
nobody else is served. Raw contents have no such limit, nor have typed floats."""

_LENGTH = Struct("<I")
_CONTENTS = {
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
    "BYTES": "bytes_contents",
}
"""The one typed list each datatype may travel in; FP16 and BF16 have none."""


def quoted(text: str, limit: int = 64) -> str:
    """A client's text made safe for messages and logs: quoted, control characters escaped, cut to `limit`."""
    return repr(text) if len(text) <= limit else repr(text[:limit]) + "…"


def shape_text(shape: Sequence[int]) -> str:
    """A shape as ``[1, 2, 3]``, cut where no tensor of ours reaches."""
    return str(list(shape)) if len(shape) <= MAX_RANK else f"{list(shape[:MAX_RANK])}… of rank {len(shape)}"


def element_count(name: str, shape: Sequence[int]) -> int:
    """How many elements a shape holds, exactly.

    Raises InvalidRequest for a negative dimension, too high a rank, or an empty tensor whose other dimensions are more
    than numpy can address.
    """
    if len(shape) > MAX_RANK:
        raise InvalidRequest(f"tensor {quoted(name)} has rank {len(shape)}; at most {MAX_RANK} is supported")
    if shape and min(shape) < 0:
        raise InvalidRequest(f"tensor {quoted(name)} has a negative dimension in shape {shape_text(shape)}")
    elements = prod(shape)
    if not elements and prod(dim for dim in shape if dim) > _MOST_ELEMENTS:
        raise InvalidRequest(
            f"tensor {quoted(name)} is empty, and the other dimensions of {shape_text(shape)} too large"
        )
    return elements


def decode_raw(name: str, datatype: str, shape: tuple[int, ...], raw: bytes) -> np.ndarray[Any, Any]:
    """Raw bytes as an array of `shape`: a read-only view, or for BYTES an object array of str.

    Raises InvalidRequest when the bytes are not exactly that tensor.
    """
    elements = element_count(name, shape)
    if datatype == "BYTES":
        return _decode_strings(name, shape, elements, raw)
    dtype = DATATYPES[datatype].numpy
    if len(raw) != elements * dtype.itemsize:
        raise InvalidRequest(
            f"tensor {quoted(name)} of {datatype} {shape_text(shape)} takes {elements * dtype.itemsize} raw bytes, "
            f"got {len(raw)}"
        )
    if datatype == "BOOL" and raw.strip(b"\0\1"):
        _check_bools(name, raw)
    return np.ndarray(shape, dtype, raw)


def decode_contents(
    name: str, datatype: str, shape: tuple[int, ...], contents: pb.InferTensorContents
) -> np.ndarray[Any, Any]:
    """Typed contents as an array of `shape`; BYTES as an object array of str.

    Raises InvalidRequest for a wrong or second list, a wrong count, a value outside the datatype, or bad UTF-8.
    """
    expected = _CONTENTS.get(datatype)
    if expected is None:
        raise InvalidRequest(f"tensor {quoted(name)}: {datatype} travels in raw_input_contents only")
    elements = element_count(name, shape)
    filled = [descriptor.name for descriptor, _ in contents.ListFields()]
    if filled and filled != [expected]:
        raise InvalidRequest(
            f"tensor {quoted(name)} of {datatype} must fill {expected} and no other list, got {filled}"
        )
    values = getattr(contents, expected)
    if len(values) != elements:
        raise InvalidRequest(
            f"tensor {quoted(name)} of shape {shape_text(shape)} takes {elements} elements, got {len(values)}"
        )
    if datatype == "BYTES":
        return _strings(name, shape, elements, values)
    dtype = DATATYPES[datatype].numpy
    if dtype.kind in "fb":
        return _packed(contents, dtype, elements).reshape(shape)
    if elements > MAX_TYPED_INTEGERS:
        raise InvalidRequest(
            f"tensor {quoted(name)} has {elements} integers in typed contents; at most {MAX_TYPED_INTEGERS} are "
            "accepted: send raw_input_contents"
        )
    wide = np.fromiter(values, np.uint64 if dtype.kind == "u" else np.int64, elements)
    if dtype.itemsize < 4 and elements:
        _check_range(name, datatype, wide, np.iinfo(dtype))
    return wide.astype(dtype, copy=False).reshape(shape)


def encode_raw(datatype: str, array: np.ndarray[Any, Any]) -> bytes | memoryview:
    """An array as raw bytes of `datatype`, without a copy where its memory already is what the wire wants."""
    if datatype == "BYTES":
        return b"".join(_frame(value) for value in array.flat)
    array = np.ascontiguousarray(array, DATATYPES[datatype].numpy)
    return array.tobytes() if datatype == "BF16" else array.data  # numpy exports no buffer of a type it does not know


def _frame(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else bytes(value)
    return _LENGTH.pack(len(data)) + data


def _check_bools(name: str, raw: bytes) -> None:
    wrong = next(value for value in raw if value > 1)
    raise InvalidRequest(f"tensor {quoted(name)}: a BOOL is a byte of 0 or 1, got {wrong}")


def _packed(contents: pb.InferTensorContents, dtype: np.dtype[Any], elements: int) -> np.ndarray[Any, Any]:
    """The one list of fixed-width values that the contents hold, from the end of their serialised form."""
    if not elements:
        return np.empty(0, dtype)
    contents.DiscardUnknownFields()  # they would follow it
    serialised: bytes = contents.SerializeToString()
    return np.frombuffer(serialised, dtype, elements, len(serialised) - elements * dtype.itemsize)


def _check_range(name: str, datatype: str, values: np.ndarray[Any, Any], bounds: np.iinfo[Any]) -> None:
    for value in (int(values.min()), int(values.max())):
        if not bounds.min <= value <= bounds.max:
            raise InvalidRequest(f"tensor {quoted(name)}: {value} is not {datatype}")


def _decode_strings(name: str, shape: tuple[int, ...], elements: int, raw: bytes) -> np.ndarray[Any, Any]:
    """Split length-prefixed elements. The count is bounded by the bytes that came, so nothing grows beyond them."""
    if elements * _LENGTH.size > len(raw):
        raise InvalidRequest(
            f"tensor {quoted(name)} of BYTES {shape_text(shape)} takes at least {elements * _LENGTH.size} raw bytes, "
            f"got {len(raw)}"
        )
    _check_count(name, elements)
    values = []
    position, end = 0, len(raw)
    for index in range(elements):
        start = position + _LENGTH.size
        if start > end:
            raise InvalidRequest(f"tensor {quoted(name)}: the raw bytes end inside the length of element {index}")
        position = start + _LENGTH.unpack_from(raw, position)[0]
        if position > end:
            raise InvalidRequest(f"tensor {quoted(name)}: element {index} is longer than the raw bytes that remain")
        values.append(raw[start:position])
    if position != end:
        raise InvalidRequest(f"tensor {quoted(name)}: {end - position} raw bytes follow the last element")
    return _strings(name, shape, elements, values)


def _check_count(name: str, elements: int) -> None:
    if elements > MAX_STRINGS:
        raise InvalidRequest(f"tensor {quoted(name)} has {elements} BYTES elements; at most {MAX_STRINGS} are accepted")


def _strings(name: str, shape: tuple[int, ...], elements: int, values: Sequence[bytes]) -> np.ndarray[Any, Any]:
    _check_count(name, elements)
    array = np.empty(elements, np.object_)
    for index, value in enumerate(values):
        try:
            array[index] = value.decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"tensor {quoted(name)}: element {index} is not valid UTF-8") from None
    return array.reshape(shape)
