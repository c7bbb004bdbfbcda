"""The other services between bytes and values, and the whole wire against stock clients."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from wire_server import wire_server

from protos import gearshift_pb2 as gs
from protos import open_inference_pb2 as pb
from server.errors import InvalidRequest, NotFound
from server.scheduling.explain import Explanation, Standing
from server.scheduling.slo import OnInfeasible, Slo
from server.wire import health, inference, metadata, reflection, variants
from variants.variant import Interval, LatencyProfile, State, Variant


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server of wire functions."""
    with wire_server() as port:
        yield port


def test_stock_client_sees_a_v2_server(port: int) -> None:
    """A stock client (sync, async, aio, stream; every datatype, raw and typed) works unmodified, in its own process."""
    pytest.importorskip("tritonclient")
    script = Path(__file__).with_name("stock_client.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, f"127.0.0.1:{port}"],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_methods_cover_the_protocol() -> None:
    """Every rpc of our protocol files is in the table for the transport, with its kind."""
    assert inference.METHODS["/inference.GRPCInferenceService/ModelInfer"] == "unary"
    assert inference.METHODS["/inference.GRPCInferenceService/ModelStreamInfer"] == "bidi"
    assert len(inference.METHODS) == 12
    declared = gs.DESCRIPTOR.services_by_name["VariantService"].methods
    assert set(variants.METHODS) == {f"/gearshift.v1.VariantService/{method.name}" for method in declared}


def test_health_check(port: int) -> None:
    """A real health client gets SERVING, NOT_SERVING, and NOT_FOUND for a service nobody knows."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        assert stub.Check(health_pb2.HealthCheckRequest(service="live")).status == 1
        assert stub.Check(health_pb2.HealthCheckRequest(service="fp32")).status == 2
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="nope"))
        assert error.value.code() == grpc.StatusCode.NOT_FOUND


def test_health_watch_knows_the_unknown() -> None:
    """To a watcher an unknown service is an answer, not an error."""
    statuses = [
        health_pb2.HealthCheckResponse.FromString(health.encode_watch(value)).status for value in (True, False, None)
    ]
    assert statuses == [1, 2, 3]
    with pytest.raises(NotFound):
        health.encode_check("x", None)
    with pytest.raises(InvalidRequest):
        health.read_service(b"\xff")


def test_reflection_describes_every_service(port: int) -> None:
    """A reflection client can list the services and resolve each with all its messages."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        names = set(database.get_services())
        assert {"inference.GRPCInferenceService", "gearshift.v1.VariantService", "grpc.health.v1.Health"} < names
        pool = DescriptorPool(database)
        for name in names:
            assert pool.FindServiceByName(name).methods
        assert (
            pool.FindMessageTypeByName("inference.ModelInferRequest").fields_by_name["raw_input_contents"].number == 7
        )
        database._channel = None


def test_reflection_v1_is_v1alpha() -> None:
    """Both versions of the reflection rpc are served; an unknown symbol is an answer, garbage an error."""
    assert [name.split("/")[1] for name in reflection.METHODS] == [
        "grpc.reflection.v1alpha.ServerReflection",
        "grpc.reflection.v1.ServerReflection",
    ]
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol="no.such.Thing")
    got = reflection_pb2.ServerReflectionResponse.FromString(reflection.answer(request.SerializeToString()))
    assert got.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    with pytest.raises(InvalidRequest):
        reflection.answer(b"\xff")


MEASURED = Variant(
    name="int8-dynamic",
    state=State.ELIGIBLE,
    reason="passed",
    precision="int8",
    runtime="onnxruntime",
    device="cpu",
    score=Interval(0.97, 0.95, 0.98),
    drop=Interval(0.01, 0.0, 0.02),
    profile=LatencyProfile((1, 8), (1_500_000, 4_000_000)),
    size_bytes=123,
)
UNMEASURED = Variant("amp", State.UNSUPPORTED, "no bf16 here", "bf16", "openvino", "cpu")


def test_list_variants() -> None:
    """Everything known of a variant crosses the wire; what is unknown is absent."""
    described = [
        variants.Described(MEASURED, "int8-dynamic", "passed"),
        variants.Described(UNMEASURED, "amp", "unverified"),
    ]
    got = gs.ListVariantsResponse.FromString(variants.encode_variants("m", "3", described))
    first, second = got.variants
    assert (got.model, got.version, first.variant, first.state, first.gate_verdict) == (
        "m",
        "3",
        "int8-dynamic",
        "eligible",
        "passed",
    )
    assert (first.accuracy.value, first.accuracy.low, first.accuracy_drop.high) == (0.97, 0.95, 0.02)
    assert [(entry.batch_size, entry.latency_us) for entry in first.latency] == [(1, 1500.0), (8, 4000.0)]
    assert first.samples_per_second == 2000
    assert (second.state, second.reason, second.recipe) == ("unsupported", "no bf16 here", "amp")
    assert not second.HasField("accuracy")
    assert not second.latency
    assert variants.read_list_variants(gs.ListVariantsRequest(model="m", version="3").SerializeToString()) == ("m", "3")


def test_explain_route() -> None:
    """The question carries a whole SLO, the answer every candidate, with or without a prediction."""
    slo = gs.Slo(
        latency_ms=2.5, min_accuracy=0, floor="soft", on_infeasible=["late", "reject"], variant="amp", priority=3
    )
    got = variants.read_explain_route(gs.ExplainRouteRequest(model="m", version="3", slo=slo).SerializeToString())
    assert got == ("m", "3", Slo(2_500_000, 0.0, None, False, (OnInfeasible.LATE, OnInfeasible.REJECT), "amp", 3))
    assert variants.read_explain_route(b"").slo == Slo()
    standings = (Standing("fp32", True, "fits", 1_500_000), Standing("amp", False, "unsupported", None))
    explanation = Explanation("fp32", "idle", standings)
    answer = gs.ExplainRouteResponse.FromString(variants.encode_explanation("m", "3", explanation))
    assert (answer.variant, answer.reason) == ("fp32", "idle")
    assert answer.candidates[0].predicted_latency_us == 1500
    assert not answer.candidates[1].HasField("predicted_latency_us")
    refused = variants.encode_explanation("m", "3", Explanation(None, "infeasible", ()))
    assert gs.ExplainRouteResponse.FromString(refused).variant == ""


@pytest.mark.parametrize(
    "slo",
    [
        {"latency_ms": 0.0},
        {"latency_ms": float("nan")},
        {"min_accuracy": 1.1},
        {"max_accuracy_drop": -1.0},
        {"floor": "firm"},
        {"on_infeasible": ["panic"]},
        {"priority": 2**32 - 1},
    ],
)
def test_explain_refuses_what_a_request_would_be_refused_for(slo: dict[str, Any]) -> None:
    """The fields of an SLO follow the rules of the request parameters and are named when wrong."""
    with pytest.raises(InvalidRequest, match=next(iter(slo))):
        variants.read_explain_route(gs.ExplainRouteRequest(slo=gs.Slo(**slo)).SerializeToString())


def test_set_variant_state() -> None:
    """ENABLED and DISABLED are understood, silence and unknown numbers are not."""
    request = gs.SetVariantStateRequest(model="m", version="3", variant="amp", state=gs.SetVariantStateRequest.DISABLED)
    assert variants.read_set_variant_state(request.SerializeToString()) == ("m", "3", "amp", False)
    request.state = gs.SetVariantStateRequest.ENABLED
    assert variants.read_set_variant_state(request.SerializeToString()).enabled
    for state in (0, 7):
        with pytest.raises(InvalidRequest, match="ENABLED or DISABLED"):
            variants.read_set_variant_state(b"\x20" + bytes([state]))
    got = gs.SetVariantStateResponse.FromString(
        variants.encode_variant_state(variants.Described(UNMEASURED, "amp", ""))
    )
    assert got.info.variant == "amp"


def test_model_requests_share_one_form() -> None:
    """The four requests that name a model are read by one function."""
    kinds = (pb.ModelReadyRequest, pb.ModelMetadataRequest, pb.ModelConfigRequest, pb.ModelStatisticsRequest)
    assert {metadata.read_model(kind(name="m", version="3").SerializeToString()) for kind in kinds} == {("m", "3")}


def test_repository_requests() -> None:
    """There is one repository, and a client brings neither configuration nor files to it."""
    assert metadata.read_index(pb.RepositoryIndexRequest(ready=True).SerializeToString())
    assert metadata.read_load(pb.RepositoryModelLoadRequest(model_name="m").SerializeToString()) == "m"
    unload = pb.RepositoryModelUnloadRequest(model_name="m")
    unload.parameters["unload_dependents"].bool_param = False
    assert metadata.read_unload(unload.SerializeToString()) == "m"
    load = pb.RepositoryModelLoadRequest(model_name="m")
    load.parameters["config"].string_param = "{}"
    with pytest.raises(InvalidRequest, match="not accepted"):
        metadata.read_load(load.SerializeToString())
    with pytest.raises(InvalidRequest, match="one repository"):
        metadata.read_index(pb.RepositoryIndexRequest(repository_name="x").SerializeToString())


def test_administration_is_announced_only_when_on() -> None:
    """model_repository is among the extensions exactly when models can be loaded and unloaded."""
    for on in (True, False):
        got = pb.ServerMetadataResponse.FromString(metadata.encode_server_metadata("1", administration=on))
        assert ("model_repository" in got.extensions) is on
