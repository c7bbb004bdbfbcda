"""What the load sends: every request serialised before the run, with the rows it holds and what they should give.

Rules of this file: pure functions of the trace, the model, the data and the seed. A message is a head (model and
parameters) and a body (inputs), which protobuf lets one join; each distinct one is serialised once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protos import open_inference_pb2 as pb
from server.scheduling.slo import Slo
from server.settings import SettingsError
from server.trace import Arrival
from server.wire.tensors import encode_raw
from variants.data import Samples, match_inputs, read_arrays
from variants.datatypes import DATATYPES
from variants.repository import RepositoryError
from variants.variant import TensorSpec

SYNTHETIC_ROWS = 32
MAX_MESSAGE_BYTES = 2**31 - 1
"""What protobuf can hold."""
MAX_PLANNED_BYTES = 2**32
"""What all requests of a run may take: they are made beforehand, so that making them takes no time from the run."""

Array = np.ndarray[Any, Any]
Shape = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Target:
    """The model under load: its inputs, without the batch dimension in their shapes, and whether it has one."""

    name: str
    inputs: tuple[TensorSpec, ...]
    batched: bool


@dataclass(frozen=True, slots=True)
class Planned:
    """One request to send. `latency_ns` is the least it asks, None for none; `labels` what its rows should give."""

    due_ns: int
    head: bytes
    body: bytes
    latency_ns: int | None = None
    labels: Array | None = None


def target(config: pb.ModelConfig) -> Target:
    """The model as its ModelConfig describes it. Raises SettingsError for a datatype that cannot be sent."""
    specs = []
    for each in config.input:
        name = pb.DataType.Name(each.data_type).removeprefix("TYPE_").replace("STRING", "BYTES")
        if name not in DATATYPES:
            raise SettingsError(f"--model {config.name}: input {each.name} has the unknown datatype {name}")
        specs.append(TensorSpec(each.name, name, tuple(each.dims)))
    return Target(config.name, tuple(specs), config.max_batch_size > 0)


def read_data(path: Path, model: Target) -> Samples:
    """The inputs of an `.npz`, and as target the one array that is no input, if any. Raises SettingsError."""
    try:
        arrays = read_arrays(path)
        others = sorted(set(arrays) - {spec.name for spec in model.inputs})
        if len(others) > 1:
            raise SettingsError(
                f"--data {path}: only one array may be no input, the target; {', '.join(others)} are none"
            )
        return match_inputs(path, arrays, model.inputs, target=next(iter(others), None), other_targets=set())
    except RepositoryError as error:
        # numpy's own words for a file that is none advise to unpickle it
        told = f"{path}: not a readable .npz of plain arrays" if "allow_pickle" in str(error) else error
        raise SettingsError(f"--data {told}") from None


def plan(arrivals: Sequence[Arrival], model: Target, data: Samples | None, seed: int) -> list[Planned]:
    """A request per arrival: rows of the data in an order drawn by the seed, or made-up ones.

    Raises SettingsError for a request of several samples to a model that takes no batch or of more than fits one
    message, and for more than `MAX_PLANNED_BYTES` together.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(SYNTHETIC_ROWS if data is None else len(data))
    made: dict[Shape | None, Samples] = {}
    heads: dict[tuple[Slo, int | None, str], bytes] = {}
    bodies: dict[tuple[int, int, Shape | None], tuple[bytes, Array | None]] = {}
    planned, place, planned_bytes = [], 0, 0
    for arrival in arrivals:
        if arrival.samples != 1 and not model.batched:
            raise SettingsError(f"{model.name} takes no batch: no request can have {arrival.samples} samples")
        asked = (arrival.slo, arrival.timeout_ns, arrival.version)
        if asked not in heads:
            heads[asked] = _head(model.name, arrival)
        shape = arrival.shape if data is None else None
        held = (place, arrival.samples, shape)
        if held not in bodies:
            planned_bytes += _checked_size(model, arrival.samples, data, shape)
            if planned_bytes > MAX_PLANNED_BYTES:
                most = f"{MAX_PLANNED_BYTES / 2**30:.3g} GiB"
                raise SettingsError(f"the requests take more than {most} together: ask for fewer, or for smaller ones")
            if data is None and shape not in made:
                made[shape] = _made_up(model, shape, generator)
            rows = order[np.arange(place, place + arrival.samples) % len(order)]
            bodies[held] = _body(model, (data or made[shape]).take(rows))
        planned.append(Planned(arrival.at_ns, heads[asked], bodies[held][0], arrival.latency_ns, bodies[held][1]))
        place = (place + arrival.samples) % len(order)
    return planned


def slo_parameters(slo: Slo, timeout_ns: int | None = None) -> dict[str, float | int | str]:
    """The request parameters that ask for exactly this; a parameter's type is its value's."""
    asked: dict[str, float | int | str | None] = {
        # half a nanosecond more, because the server cuts what the floating-point product leaves behind the point
        "slo_latency_ms": None if slo.latency_ns is None else (slo.latency_ns + 0.5) / 1e6,
        "timeout": None if timeout_ns is None else max(1, timeout_ns // 1000),
        "slo_min_accuracy": slo.min_accuracy,
        "slo_max_accuracy_drop": slo.max_accuracy_drop,
        "slo_floor": None if slo.hard is None else ("hard" if slo.hard else "soft"),
        "slo_on_infeasible": None if slo.on_infeasible is None else ",".join(slo.on_infeasible),
        "variant": slo.variant,
        "priority": slo.priority or None,
    }
    return {name: value for name, value in asked.items() if value is not None}


def encode_inputs(inputs: Mapping[str, Array], datatypes: Mapping[str, str]) -> bytes:
    """The inputs of a ModelInferRequest as raw contents, serialised: joined to a head they make the whole."""
    message = pb.ModelInferRequest()
    for name, array in inputs.items():
        message.inputs.add(name=name, datatype=datatypes[name], shape=array.shape)
        message.raw_input_contents.append(bytes(encode_raw(datatypes[name], array)))
    return message.SerializeToString()


def encode_head(model: str, version: str = "", parameters: Mapping[str, float | int | str] | None = None) -> bytes:
    """The rest of a ModelInferRequest, serialised."""
    message = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, value in (parameters or {}).items():
        match value:
            case int():
                message.parameters[name].int64_param = value
            case float():
                message.parameters[name].double_param = value
            case _:
                message.parameters[name].string_param = value
    return message.SerializeToString()


def _checked_size(model: Target, samples: int, data: Samples | None, shape: Shape | None) -> int:
    """The bytes of the rows. Raises SettingsError where no message holds them, before any memory is taken for them."""
    if data is None:
        sizes = [math.prod(_row_shape(model, place, shape)) for place in range(len(model.inputs))]
        samples = max(samples, SYNTHETIC_ROWS)  # so many rows are made
    else:
        sizes = [math.prod(data.inputs[spec.name].shape[1:]) for spec in model.inputs]
    row = sum(size * DATATYPES[spec.datatype].numpy.itemsize for size, spec in zip(sizes, model.inputs, strict=True))
    if samples * row > MAX_MESSAGE_BYTES:
        raise SettingsError(f"{samples} samples of {row} bytes are asked for at once, more than a message can hold")
    return samples * row


def _head(model: str, arrival: Arrival) -> bytes:
    return encode_head(model, arrival.version, slo_parameters(arrival.slo, arrival.timeout_ns))


def _body(model: Target, rows: Samples) -> tuple[bytes, Array | None]:
    """The rows serialised, and their labels; a model without a batch takes the one row as it is."""
    at = slice(None) if model.batched else 0
    inputs = {name: np.asarray(array[at]) for name, array in rows.inputs.items()}
    labels = None if rows.target is None else np.asarray(rows.target[at])
    return encode_inputs(inputs, {spec.name: spec.datatype for spec in model.inputs}), labels


def _made_up(model: Target, shape: Shape | None, generator: np.random.Generator) -> Samples:
    """Rows that any model can take: normal floats, integers 0 and 1; a free dimension is the trace's, else 1."""
    inputs: dict[str, Array] = {}
    for place, spec in enumerate(model.inputs):
        size = (SYNTHETIC_ROWS, *_row_shape(model, place, shape))
        if spec.datatype.startswith(("FP", "BF")):
            inputs[spec.name] = generator.standard_normal(size).astype(DATATYPES[spec.datatype].numpy)
        elif spec.datatype == "BYTES":
            inputs[spec.name] = np.full(size, "0", np.object_)
        else:
            inputs[spec.name] = generator.integers(0, 2, size).astype(DATATYPES[spec.datatype].numpy)
    return Samples(inputs)


def _row_shape(model: Target, place: int, shape: Shape | None) -> tuple[int, ...]:
    known = shape[place] if shape and len(shape) == len(model.inputs) else model.inputs[place].shape
    return tuple(1 if dim < 0 else dim for dim in known)
