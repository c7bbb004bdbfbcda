"""ModelInfer between bytes and values: the request decoded and checked against its model, the answer encoded.

Rules: pure functions, no IO. A request that passes `read_request` can be batched with any other of the same
`shape_key` without looking at it again. What can be known per model is computed once, in its `Signature`. Protobuf
messages concatenate, so an answer is joined from parts that repeat (cached) and one copy of the output's memory.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest
from server.scheduling.slo import Slo
from server.wire.messages import parse
from server.wire.parameters import check_names, read_parameters
from server.wire.tensors import decode_contents, decode_raw, encode_raw, quoted, shape_text
from variants.variant import TensorSpec

MAX_ID = 1024
MAX_CLASSES = 2**31 - 1
SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name
MODEL_INFER = f"/{SERVICE}/ModelInfer"
MODEL_STREAM_INFER = f"/{SERVICE}/ModelStreamInfer"
METHODS: Mapping[str, str] = {
    f"/{SERVICE}/{method.name}": "bidi" if method.client_streaming else "unary"
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
}
"""Full path -> kind, for the transport."""

Array = np.ndarray[Any, Any]
ParameterValue = bool | int | float | str


@dataclass(frozen=True, slots=True)
class Signature:
    """What a model takes and gives. With `max_batch_size` above 0 every shape starts with the batch dimension, -1.

    Raises ValueError for a batched tensor without it.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    max_batch_size: int
    inputs_by_name: Mapping[str, TensorSpec] = field(init=False, repr=False, compare=False)
    outputs_by_name: Mapping[str, TensorSpec] = field(init=False, repr=False, compare=False)
    all_outputs: tuple[RequestedOutput, ...] = field(init=False, repr=False, compare=False)
    varies: bool = field(init=False, repr=False, compare=False)
    """Whether a request chooses the size of an input's axis other than the batch."""

    def __post_init__(self) -> None:
        """Compute what every request would otherwise compute again."""
        for spec in self.inputs + self.outputs:
            if self.max_batch_size and spec.shape[:1] != (-1,):
                raise ValueError(f"{spec.name} of shape {spec.shape} has no batch dimension")
        object.__setattr__(self, "inputs_by_name", {spec.name: spec for spec in self.inputs})
        object.__setattr__(self, "outputs_by_name", {spec.name: spec for spec in self.outputs})
        object.__setattr__(self, "all_outputs", tuple(RequestedOutput(s.name, s.datatype) for s in self.outputs))
        batched = self.max_batch_size > 0
        object.__setattr__(self, "varies", any(-1 in spec.shape[batched:] for spec in self.inputs))


@dataclass(frozen=True, slots=True)
class RequestedOutput:
    """One output to answer with; with `classes` above 0 as its that many highest values, ``value:index`` each."""

    name: str
    datatype: str
    classes: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class InferRequest:
    """One valid request. `inputs` holds an array per input, in the model's order; `samples` is their dimension 0.

    Requests with equal `shape_key` may share a batch. Without a batch dimension `samples` is 1. `payload_bytes` is
    what the inputs occupy while they wait. `length` is how many elements one sample has in all inputs together, 0 for a
    model whose shapes do not vary.
    """

    model: str
    version: str
    id: str
    inputs: Mapping[str, Array]
    samples: int
    shape_key: Hashable
    outputs: tuple[RequestedOutput, ...]
    slo: Slo
    timeout_ns: int | None
    payload_bytes: int
    length: int


def parse_infer(message: bytes) -> pb.ModelInferRequest:
    """Decode a ModelInferRequest; raises InvalidRequest when the bytes are none."""
    return parse(pb.ModelInferRequest, message)


def read_request(request: pb.ModelInferRequest, signature: Signature) -> InferRequest:
    """Check a request against its model and hold it as values; raises InvalidRequest saying what is wrong."""
    if len(request.id) > MAX_ID:
        raise InvalidRequest(f"the request's id has {len(request.id)} characters; at most {MAX_ID} are accepted")
    parameters = read_parameters(request.parameters)
    inputs = _read_inputs(request, signature)
    batched = signature.max_batch_size > 0
    samples = _samples(inputs) if batched and inputs else 1
    return InferRequest(
        model=request.model_name,
        version=request.model_version,
        id=request.id,
        inputs=inputs,
        samples=samples,
        shape_key=tuple(array.shape[batched:] for array in inputs.values()),
        outputs=_read_outputs(request, signature),
        slo=parameters.slo,
        timeout_ns=parameters.timeout_ns,
        payload_bytes=sum(map(_payload_bytes, inputs.values())),
        length=sum(array.size for array in inputs.values()) // samples if signature.varies else 0,
    )


def encode_response(
    request: InferRequest,
    version: str,
    outputs: Mapping[str, Array],
    parameters: Mapping[str, ParameterValue],
    *,
    batched: bool = True,
) -> bytes:
    """A serialised ModelInferResponse: the outputs the request asked for, in its order, as raw bytes.

    `outputs` holds at least those, with the request's samples in dimension 0 when `batched`. `parameters` become
    bool, int64, double and string parameters by their type.
    """
    heads = [_prefix(request.model, version)]
    raws: list[bytes | memoryview] = []
    if request.id:
        heads.append(pb.ModelInferResponse(id=request.id).SerializeToString())
    for wanted in request.outputs:
        array, datatype = outputs[wanted.name], wanted.datatype
        if wanted.classes:
            array, datatype = _classify(array, wanted.classes, batched), "BYTES"
        raw = encode_raw(datatype, array)
        heads.append(_output_head(wanted.name, datatype, array.shape))
        raws += (_RAW_TAG, _varint(raw.nbytes if isinstance(raw, memoryview) else len(raw)), raw)
    return b"".join((*heads, encode_parameters(parameters), *raws))


def encode_parameters(parameters: Mapping[str, ParameterValue]) -> bytes:
    """The `parameters` of a ModelInferResponse, serialised: appended to a response they are merged into it."""
    response = pb.ModelInferResponse()
    for name, value in parameters.items():
        match value:
            case bool():
                response.parameters[name].bool_param = value
            case int():
                response.parameters[name].int64_param = value
            case float():
                response.parameters[name].double_param = value
            case _:
                response.parameters[name].string_param = value
    return response.SerializeToString()


def encode_stream_response(response: bytes) -> bytes:
    """A serialised ModelInferResponse as the one and final ModelStreamInferResponse of its request."""
    return b"".join((_STREAM_TAG, _varint(len(response) + len(_FINAL)), response, _FINAL))


def encode_stream_error(message: str, request_id: str) -> bytes:
    """A failure that leaves the stream open; the id says which request failed."""
    return pb.ModelStreamInferResponse(
        error_message=message or "failed", infer_response=pb.ModelInferResponse(id=request_id)
    ).SerializeToString()


_RAW_TAG = b"\x32"  # raw_output_contents: field 6, length-delimited
_STREAM_TAG = b"\x12"  # infer_response: field 2, length-delimited
_FINAL = encode_parameters({"triton_final_response": True})


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)


@lru_cache(maxsize=1024)
def _prefix(model: str, version: str) -> bytes:
    return pb.ModelInferResponse(model_name=model, model_version=version).SerializeToString()


@lru_cache(maxsize=4096)
def _output_head(name: str, datatype: str, shape: tuple[int, ...]) -> bytes:
    output = pb.ModelInferResponse.InferOutputTensor(name=name, datatype=datatype, shape=shape)
    return pb.ModelInferResponse(outputs=[output]).SerializeToString()


def _read_inputs(request: pb.ModelInferRequest, signature: Signature) -> dict[str, Array]:
    raws = request.raw_input_contents
    if raws and len(raws) != len(request.inputs):
        raise InvalidRequest(f"{len(request.inputs)} inputs with {len(raws)} raw_input_contents; one each is needed")
    inputs: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        name = tensor.name
        spec = signature.inputs_by_name.get(name)
        if spec is None:
            expected = ", ".join(signature.inputs_by_name)
            raise InvalidRequest(f"input {quoted(name)} is not one of the model's: {expected}")
        if name in inputs:
            raise InvalidRequest(f"input {quoted(name)} is given twice")
        inputs[name] = _read_input(tensor, spec, raws[index] if raws else None, signature.max_batch_size > 0)
    if len(inputs) != len(signature.inputs):
        missing = ", ".join(name for name in signature.inputs_by_name if name not in inputs)
        raise InvalidRequest(f"the request lacks the input {missing}")
    if len(inputs) == 1:
        return inputs
    return {name: inputs[name] for name in signature.inputs_by_name}


def _read_input(
    tensor: pb.ModelInferRequest.InferInputTensor, spec: TensorSpec, raw: bytes | None, batched: bool
) -> Array:
    if tensor.parameters:
        check_names(tensor.parameters)
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(f"input {quoted(spec.name)} is {spec.datatype}, got {quoted(tensor.datatype)}")
    shape = tuple(tensor.shape)
    if not _fits(shape, spec.shape):
        raise InvalidRequest(
            f"input {quoted(spec.name)} of shape {shape_text(shape)} does not fit the model's {shape_text(spec.shape)}"
        )
    if batched and shape[0] < 1:
        raise InvalidRequest(f"input {quoted(spec.name)} of shape {shape_text(shape)} holds no sample")
    if raw is None:
        return decode_contents(spec.name, spec.datatype, shape, tensor.contents)
    if tensor.HasField("contents"):
        raise InvalidRequest(f"input {quoted(spec.name)} has contents, but the request has raw_input_contents")
    return decode_raw(spec.name, spec.datatype, shape, raw)


def _fits(shape: tuple[int, ...], spec: tuple[int, ...]) -> bool:
    if len(shape) != len(spec):
        return False
    return all(want in (-1, got) for got, want in zip(shape, spec, strict=True))


def _samples(inputs: Mapping[str, Array]) -> int:
    counts = {name: len(array) for name, array in inputs.items()}
    first = next(iter(counts.values()))
    if any(count != first for count in counts.values()):
        raise InvalidRequest(f"the inputs hold different numbers of samples: {counts}")
    return first


def _payload_bytes(array: Array) -> int:
    """A str costs a header beside its text; 64 bytes are about right for the short ones that are common."""
    if array.dtype.hasobject:
        return sum(len(text) + 64 for text in array.flat)
    return array.nbytes


def _read_outputs(request: pb.ModelInferRequest, signature: Signature) -> tuple[RequestedOutput, ...]:
    if not request.outputs:
        return signature.all_outputs
    wanted: dict[str, RequestedOutput] = {}
    for output in request.outputs:
        spec = signature.outputs_by_name.get(output.name)
        if spec is None:
            expected = ", ".join(signature.outputs_by_name)
            raise InvalidRequest(f"output {quoted(output.name)} is not one of the model's: {expected}")
        if output.name in wanted:
            raise InvalidRequest(f"output {quoted(output.name)} is requested twice")
        wanted[output.name] = RequestedOutput(spec.name, spec.datatype, _classes(output, spec))
    return tuple(wanted.values())


def _classes(output: pb.ModelInferRequest.InferRequestedOutputTensor, spec: TensorSpec) -> int:
    if not output.parameters:
        return 0
    check_names(output.parameters)
    if "classification" not in output.parameters:
        return 0
    parameter = output.parameters["classification"]
    classes = int(parameter.int64_param)
    if parameter.WhichOneof("parameter_choice") != "int64_param" or not 0 < classes <= MAX_CLASSES:
        raise InvalidRequest(f"output {quoted(spec.name)}: classification must be an int64 in 1..{MAX_CLASSES}")
    if spec.datatype == "BYTES":
        raise InvalidRequest(f"output {quoted(spec.name)}: BYTES cannot be classified")
    return classes


def _classify(array: Array, classes: int, batched: bool) -> Array:
    """The highest values of each sample as ``value:index``, highest first, the lower index first among equals."""
    rows = array.reshape(len(array) if batched else 1, -1)
    kept = min(classes, rows.shape[1])
    texts = np.empty((len(rows), kept), np.object_)
    for index, row in enumerate(rows):
        values = row.tolist()
        order = sorted(range(len(values)), key=lambda at: (values[at] != values[at], -values[at]))[:kept]
        texts[index] = [
            f"{values[at]:f}:{at}" if isinstance(values[at], float) else f"{values[at]:d}:{at}" for at in order
        ]
    return texts if batched else texts[0]
