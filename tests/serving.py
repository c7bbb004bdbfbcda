"""The whole server for tests, in this process on free ports, and a small client of it over our own stubs.

A stock tritonclient cannot share a process with our stubs: tests run one in a process of its own.
"""

from __future__ import annotations

import atexit
import os
import tempfile
import threading
import time
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from protos import gearshift_pb2_grpc
from protos import open_inference_pb2 as pb
from protos import open_inference_pb2_grpc as pb_grpc
from server import settings
from server.app import Server
from server.models import ServedModel
from variants.datatypes import DATATYPES
from variants.runtimes.runtime import Array, Session

WAIT_S = 20
"""How long a test waits for what must happen before it calls it a hang."""

_CACHE = tempfile.TemporaryDirectory(prefix="gearshift-profiles-")
atexit.register(_CACHE.cleanup)
PROFILE_CACHE = {"XDG_CACHE_HOME": _CACHE.name}
"""Environment in which tests share their latency profiles and leave the user's alone."""


@dataclass(frozen=True, slots=True)
class Serving:
    """A running server and a channel to it."""

    server: Server
    grpc_port: int
    http_port: int
    channel: grpc.Channel

    @property
    def address(self) -> str:
        """HOST:PORT of the gRPC services."""
        return f"127.0.0.1:{self.grpc_port}"

    @property
    def v2(self) -> pb_grpc.GRPCInferenceServiceStub:
        """The Open Inference Protocol."""
        return pb_grpc.GRPCInferenceServiceStub(self.channel)

    @property
    def variants(self) -> gearshift_pb2_grpc.VariantServiceStub:
        """Our own service."""
        return gearshift_pb2_grpc.VariantServiceStub(self.channel)

    def model(self, name: str) -> ServedModel:
        """The loaded model of this name."""
        return self.server.models.find(name)

    def infer(self, request: pb.ModelInferRequest, **options: Any) -> Answer:
        """Send one request and wait. Raises grpc.RpcError."""
        return Answer(self.v2.ModelInfer(request, timeout=options.pop("timeout", WAIT_S), **options))

    def page(self, path: str, **headers: str) -> str:
        """The body of one page of the HTTP port."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", headers=headers)
        with urllib.request.urlopen(request, timeout=WAIT_S) as response:  # noqa: S310 - our own address
            return str(response.read().decode())

    def samples(self, name: str) -> list[Sample]:
        """One metric's samples."""
        families = text_string_to_metric_families(self.page("/metrics"))
        return [sample for family in families for sample in family.samples if sample.name == name]

    def values(self, name: str, label: str) -> dict[str, float]:
        """One metric's values that are not 0, summed over all labels but this one."""
        totals: defaultdict[str, float] = defaultdict(float)
        for sample in self.samples(name):
            totals[sample.labels[label]] += sample.value
        return {key: value for key, value in totals.items() if value}

    def outcomes(self) -> dict[str, float]:
        """How many requests ended in each outcome, over all models and variants."""
        return self.values("gearshift_requests_total", "outcome")


class Answer:
    """One ModelInferResponse, read."""

    def __init__(self, response: pb.ModelInferResponse) -> None:
        self.response = response

    def array(self, name: str = "y") -> Array:
        """One output."""
        place = next(i for i, output in enumerate(self.response.outputs) if output.name == name)
        output, raw = self.response.outputs[place], self.response.raw_output_contents[place]
        return np.frombuffer(raw, DATATYPES[output.datatype].numpy).reshape(tuple(output.shape))

    @property
    def parameters(self) -> dict[str, Any]:
        """The response parameters as plain values."""
        return plain(self.response.parameters)


def plain(parameters: Mapping[str, pb.InferParameter]) -> dict[str, Any]:
    """Parameters as plain values."""
    return {name: getattr(value, str(value.WhichOneof("parameter_choice"))) for name, value in parameters.items()}


@contextmanager
def serving(repository: Path, prepare: Callable[[Server], object] = id, **flags: object) -> Iterator[Serving]:
    """A server over a repository, with the settings of these flags, until left; `prepare` sees it before it starts."""
    given = {"models": str(repository), "grpc_port": 0, "http_port": 0, "default_latency_ms": 60_000, **flags}
    with patch.dict(os.environ, PROFILE_CACHE):
        server = Server(settings.load(given, environment={}))
        server.load_models()
    prepare(server)
    grpc_port, http_port = server.start()
    try:
        with grpc.insecure_channel(f"127.0.0.1:{grpc_port}", UNLIMITED) as channel:
            yield Serving(server, grpc_port, http_port, channel)
    finally:
        server.stop()


UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


def request_for(model: str, /, version: str = "", **inputs: Array) -> pb.ModelInferRequest:
    """A request with raw contents; an array's dtype gives the datatype."""
    request = pb.ModelInferRequest(model_name=model, model_version=version)
    for name, array in inputs.items():
        datatype = next(d.name for d in DATATYPES.values() if d.name != "BYTES" and d.numpy == array.dtype)
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return request


def asking(request: pb.ModelInferRequest, **parameters: str | float | bool) -> pb.ModelInferRequest:
    """The request with parameters, typed as the values are."""
    for name, value in parameters.items():
        kind = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(request.parameters[name], kind, value)
    return request


class Gate:
    """Stands before a model's session: while it is shut a batch waits in it, so that others queue up behind."""

    def __init__(self, model: ServedModel, variant: str = "fp32") -> None:
        self._session: Session = model.sessions[variant]
        self.inputs, self.outputs, self.batch_axis = (
            self._session.inputs,
            self._session.outputs,
            self._session.batch_axis,
        )
        self.entered, self.opened = threading.Event(), threading.Event()
        self.batches: list[Mapping[str, Array]] = []
        model.sessions[variant] = self  # type: ignore[index] # a dict in truth

    def shut(self) -> None:
        """Hold the next batch."""
        self.entered.clear()
        self.opened.clear()

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """Note the batch, wait for the gate, run."""
        self.batches.append(inputs)
        self.entered.set()
        assert self.opened.wait(WAIT_S)
        return self._session.run(inputs)


def failure(call: Callable[..., object], *arguments: object, **options: object) -> grpc.RpcError:
    """The error that a call ends with."""
    with pytest.raises(grpc.RpcError) as raised:
        call(*arguments, **options)
    return raised.value


def wait_until(condition: Callable[[], object]) -> None:
    """Let others get to a state that they must reach."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "never happened"
        threading.Event().wait(0.002)
