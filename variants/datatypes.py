"""The one table of tensor datatypes: the protocol's name, numpy's, ONNX's, ONNX Runtime's, OpenVINO's and torch's.

Rules: BF16 is `ml_dtypes.bfloat16` (numpy has none); BYTES is an object array of `str`. Libraries are named by
strings and numbers only, so reading the table imports none of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np


@dataclass(frozen=True, slots=True)
class Datatype:
    """One row. `onnx` is the TensorProto element type; `openvino` and `torch` are None where they have no such type."""

    name: str
    numpy: np.dtype[Any]
    onnx: int
    onnxruntime: str
    openvino: str | None
    torch: str | None


_ROWS = tuple(
    Datatype(name, np.dtype(numpy), onnx, f"tensor({element})", openvino, torch)
    for name, numpy, onnx, element, openvino, torch in (
        ("BOOL", np.bool_, 9, "bool", "boolean", "bool"),
        ("UINT8", np.uint8, 2, "uint8", "u8", "uint8"),
        ("UINT16", np.uint16, 4, "uint16", "u16", "uint16"),
        ("UINT32", np.uint32, 12, "uint32", "u32", "uint32"),
        ("UINT64", np.uint64, 13, "uint64", "u64", "uint64"),
        ("INT8", np.int8, 3, "int8", "i8", "int8"),
        ("INT16", np.int16, 5, "int16", "i16", "int16"),
        ("INT32", np.int32, 6, "int32", "i32", "int32"),
        ("INT64", np.int64, 7, "int64", "i64", "int64"),
        ("FP16", np.float16, 10, "float16", "f16", "float16"),
        ("FP32", np.float32, 1, "float", "f32", "float32"),
        ("FP64", np.float64, 11, "double", "f64", "float64"),
        ("BYTES", np.object_, 8, "string", None, None),
        ("BF16", ml_dtypes.bfloat16, 16, "bfloat16", "bf16", "bfloat16"),
    )
)

DATATYPES = MappingProxyType({row.name: row for row in _ROWS})
"""V2 datatype name -> row."""

_BY_NUMPY = {row.numpy: row for row in _ROWS}
_BY_ONNX = {row.onnx: row for row in _ROWS}
_BY_TORCH = {row.torch: row for row in _ROWS if row.torch}


def from_numpy(dtype: np.dtype[Any]) -> Datatype:
    """The row of a numpy dtype in any byte order; str and bytes arrays are BYTES. Raises KeyError if none fits."""
    if dtype.kind in "SUT":
        return DATATYPES["BYTES"]
    return _BY_NUMPY[dtype.newbyteorder("=")]


def from_onnx(element_type: int) -> Datatype:
    """The row of an ONNX TensorProto element type. Raises KeyError for complex, 8 bit floats and other strangers."""
    return _BY_ONNX[element_type]


def from_torch(name: str) -> Datatype:
    """The row of a torch dtype's name, with or without ``torch.`` before it. Raises KeyError if none fits."""
    return _BY_TORCH[name.removeprefix("torch.")]
