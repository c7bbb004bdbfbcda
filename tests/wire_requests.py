"""Requests to change and send through the wire functions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.wire.inference import InferRequest, Signature, parse_infer, read_request
from variants.variant import TensorSpec

BATCHED = Signature(
    inputs=(TensorSpec("a", "FP32", (-1, 3)), TensorSpec("b", "INT64", (-1, -1))),
    outputs=(TensorSpec("y", "FP32", (-1, 4)), TensorSpec("z", "INT64", (-1,)), TensorSpec("s", "BYTES", (-1, 1))),
    max_batch_size=8,
)
PLAIN = Signature((TensorSpec("a", "FP32", (2, -1)),), (TensorSpec("y", "FP32", (4,)),), 0)


def raw_request(a: Any = None, b: Any = None) -> pb.ModelInferRequest:
    """A valid request for BATCHED unless told otherwise."""
    a = np.arange(6, dtype=np.float32).reshape(2, 3) if a is None else a
    b = np.arange(10).reshape(2, 5) if b is None else b
    request = pb.ModelInferRequest(model_name="m", id="7")
    for name, datatype, array in (("a", "FP32", a), ("b", "INT64", b)):
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def read(request: pb.ModelInferRequest, signature: Signature = BATCHED) -> InferRequest:
    """Through the bytes, as the server does."""
    return read_request(parse_infer(request.SerializeToString()), signature)


def refuse(request: pb.ModelInferRequest, text: str, signature: Signature = BATCHED) -> None:
    """The request is refused with a reason that contains the text."""
    with pytest.raises(InvalidRequest) as error:
        read(request, signature)
    assert text in str(error.value)
    assert len(str(error.value)) < 1000


def with_parameters(**parameters: dict[str, Any]) -> pb.ModelInferRequest:
    """A valid request with these parameters."""
    request = raw_request()
    for name, value in parameters.items():
        request.parameters[name].CopyFrom(pb.InferParameter(**value))
    return request
