"""Every rpc beside the inferences, and every status of the contract: the whole server over gRPC."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from serving import WAIT_S, Gate, Serving, asking, failure, request_for, serving, wait_until

from protos import gearshift_pb2 as gs
from protos import open_inference_pb2 as pb
from server.services import METHODS

Code = grpc.StatusCode
ROW = np.ones((1, 256), np.float32)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
HEALTH_NAMES = ("", "inference.GRPCInferenceService", "gearshift.v1.VariantService", "live", "ladder")


def trailing(error: Any) -> dict[str, str]:
    """The `gearshift-*` metadata of an error."""
    return {key: value for key, value in error.trailing_metadata() if key.startswith("gearshift-")}


def check(running: Serving, service: str) -> int:
    """What Health.Check says."""
    request = health_pb2.HealthCheckRequest(service=service)
    return int(health_pb2_grpc.HealthStub(running.channel).Check(request, timeout=WAIT_S).status)


def test_health_check(ladder: Serving) -> None:
    """Each documented service is SERVING; a name nobody knows is NOT_FOUND."""
    assert [check(ladder, name) for name in HEALTH_NAMES] == [SERVING] * 5
    assert failure(lambda: check(ladder, "nope")).code() is Code.NOT_FOUND


def test_health_follows_what_is_loaded(ladder: Serving) -> None:
    """Watchers are told when a model goes and comes; a server without a model is live and not ready."""
    health = health_pb2_grpc.HealthStub(ladder.channel)
    watches = {name: health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in (*HEALTH_NAMES, "nope")}
    first = {name: next(watch).status for name, watch in watches.items()}
    assert first == dict.fromkeys(HEALTH_NAMES, SERVING) | {"nope": SERVICE_UNKNOWN}
    ladder.v2.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="ladder"), timeout=WAIT_S)
    assert [next(watches[name]).status for name in ("", "ladder")] == [NOT_SERVING] * 2
    assert check(ladder, "live") == SERVING
    assert not ladder.v2.ServerReady(pb.ServerReadyRequest()).ready
    assert failure(lambda: ladder.infer(request_for("ladder", x=ROW))).code() is Code.UNAVAILABLE
    with pytest.raises(urllib.error.HTTPError, match="503"):
        ladder.page("/readyz")
    assert ladder.page("/healthz") == "live\n"
    ladder.v2.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="ladder"), timeout=WAIT_S)
    assert [next(watches[name]).status for name in ("", "ladder")] == [SERVING] * 2
    for watch in watches.values():
        watch.cancel()
    wait_until(lambda: not ladder.server.services._watchers)


@pytest.mark.parametrize("package", ["v1", "v1alpha"])
def test_reflection(ladder: Serving, package: str) -> None:
    """A reflection client of either version lists the services and gets the file of an rpc."""
    method = f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo"
    ask = ladder.channel.stream_stream(
        method,
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    symbol = "inference.GRPCInferenceService"
    questions = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol),
    ]
    listing, file = ask(iter(questions), timeout=WAIT_S)
    services = {service.name for service in listing.list_services_response.service}
    assert {symbol, "gearshift.v1.VariantService", "grpc.health.v1.Health"} <= services
    assert b"ModelStreamInfer" in file.file_descriptor_response.file_descriptor_proto[0]


def test_variants_are_listed_and_switched(ladder: Serving) -> None:
    """ListVariants shows both; a disabled variant takes no traffic until it is enabled again."""
    listed = ladder.variants.ListVariants(gs.ListVariantsRequest(model="ladder")).variants
    assert [(v.variant, v.state, v.gate_verdict) for v in listed] == [
        ("fp32", "eligible", "passed"),
        ("int8-static", "eligible", "passed"),
    ]
    assert [entry.batch_size for entry in listed[0].latency] == [1, 2, 4, 8, 16, 32]
    states = gs.SetVariantStateRequest
    change = states(model="ladder", variant="fp32", state=states.DISABLED)
    assert ladder.variants.SetVariantState(change).info.state == "disabled"
    assert ladder.infer(request_for("ladder", x=ROW)).parameters["variant"] == "int8-static"
    shown = {s.labels["variant"]: s.labels["state"] for s in ladder.samples("gearshift_variant_state") if s.value}
    assert shown == {"fp32": "disabled", "int8-static": "eligible"}
    pinned = asking(request_for("ladder", x=ROW), variant="fp32")
    assert failure(lambda: ladder.infer(pinned)).code() is Code.FAILED_PRECONDITION
    change.state = states.ENABLED
    assert ladder.variants.SetVariantState(change).info.state == "eligible"
    assert ladder.infer(request_for("ladder", x=ROW)).parameters["variant"] == "fp32"
    unknown = states(model="ladder", variant="nope", state=states.DISABLED)
    assert failure(lambda: ladder.variants.SetVariantState(unknown)).code() is Code.NOT_FOUND


def test_what_waits_for_a_disabled_variant_ends(ladder: Serving) -> None:
    """A request that may run on nothing any more ends FAILED_PRECONDITION at once, not at its deadline."""
    gate = Gate(ladder.model("ladder"))
    held = ladder.v2.ModelInfer.future(request_for("ladder", x=ROW))
    assert gate.entered.wait(WAIT_S)
    waiting = ladder.v2.ModelInfer.future(asking(request_for("ladder", x=ROW), variant="int8-static"))
    wait_until(lambda: ladder.server.engine.inflight() == {"ladder": 2})
    states = gs.SetVariantStateRequest
    change = states(model="ladder", variant="int8-static", state=states.DISABLED)
    ladder.variants.SetVariantState(change, timeout=WAIT_S)
    assert waiting.code() is Code.FAILED_PRECONDITION
    gate.opened.set()
    assert held.code() is Code.OK


def test_explanations_agree_with_answers(ladder: Serving) -> None:
    """ExplainRoute names the variant that a request with that SLO then gets."""
    fp32_ms = ladder.model("ladder").variants[0].profile.latency_ns(1) / 1e6  # type: ignore[union-attr]
    loose = ladder.variants.ExplainRoute(gs.ExplainRouteRequest(model="ladder", slo=gs.Slo(latency_ms=5000)))
    assert (
        loose.variant == ladder.infer(asking(request_for("ladder", x=ROW), slo_latency_ms=5000.0)).parameters["variant"]
    )
    assert loose.variant == "fp32"
    tight = ladder.variants.ExplainRoute(gs.ExplainRouteRequest(model="ladder", slo=gs.Slo(latency_ms=fp32_ms)))
    assert tight.variant in {"int8-static", ""}
    impossible = ladder.variants.ExplainRoute(
        gs.ExplainRouteRequest(model="ladder", slo=gs.Slo(latency_ms=0.001, max_accuracy_drop=0))
    )
    assert (impossible.variant, "achievable" in impossible.reason) == ("", True)
    assert {c.variant for c in impossible.candidates} == {"fp32", "int8-static"}


def test_every_method_answers_rubbish_with_a_status(ladder: Serving) -> None:
    """Bytes that are no message are INVALID_ARGUMENT to every rpc that reads its message."""
    reads_nothing = {"ServerLive", "ServerReady", "ServerMetadata"}
    for method, kind in METHODS.items():
        if kind == "unary" and method.rpartition("/")[2] not in reads_nothing:
            error = failure(ladder.channel.unary_unary(method), b"\xff", timeout=WAIT_S)
            assert error.code() is Code.INVALID_ARGUMENT, method


def test_infeasible_names_what_is_achievable(ladder: Serving) -> None:
    """FAILED_PRECONDITION lists (variant, accuracy, latency) pairs, and such a latency is then granted."""
    error = failure(lambda: ladder.infer(asking(request_for("ladder", x=ROW), slo_latency_ms=0.001)))
    assert error.code() is Code.FAILED_PRECONDITION
    pairs = re.findall(r"(\S+) \(accuracy ([\d.]+), ([\d.]+) ms\)", error.details())
    assert [(name, accuracy) for name, accuracy, _ in pairs] == [("fp32", "0.9900"), ("int8-static", "0.9500")]
    assert trailing(error)["gearshift-reason"] == "infeasible"
    enough = {name: float(ms) * 20 + 50 for name, _, ms in pairs}  # this host is shared
    for name, latency_ms in enough.items():
        answer = ladder.infer(asking(request_for("ladder", x=ROW), slo_latency_ms=latency_ms, variant=name))
        assert answer.parameters["variant"] == name
    floor = failure(lambda: ladder.infer(asking(request_for("ladder", x=ROW), slo_min_accuracy=0.995)))
    assert floor.code() is Code.FAILED_PRECONDITION


def test_floors_choose_the_variant(ladder: Serving) -> None:
    """A hard floor is kept by the proven bounds; what answers says which accuracy is proven."""
    for asked in ({"slo_max_accuracy_drop": 0.0}, {"slo_min_accuracy": 0.98}):
        parameters = ladder.infer(asking(request_for("ladder", x=ROW), **asked)).parameters
        assert (parameters["variant"], parameters["variant_accuracy"]) == ("fp32", 0.99)
        assert parameters["floor_met"] is True


def test_a_full_queue_says_when_to_try_again(tmp_path: Path) -> None:
    """RESOURCE_EXHAUSTED carries google.rpc.RetryInfo and our trailing metadata."""
    models.add_ladder(tmp_path)
    with serving(tmp_path, executors=1, max_queue_requests=2) as running:
        gate = Gate(running.model("ladder"))
        calls = [running.v2.ModelInfer.future(request_for("ladder", x=ROW))]
        assert gate.entered.wait(WAIT_S)
        calls += [running.v2.ModelInfer.future(request_for("ladder", x=ROW)) for _ in range(2)]
        wait_until(lambda: running.server.engine.inflight() == {"ladder": 3})
        error = failure(lambda: running.infer(request_for("ladder", x=ROW)))
        gate.opened.set()
        assert [call.code() for call in calls] == [Code.OK] * 3
    assert error.code() is Code.RESOURCE_EXHAUSTED
    assert trailing(error).items() >= {"gearshift-reason": "rejected", "gearshift-slo_met": "false"}.items()
    status = status_pb2.Status.FromString(dict(error.trailing_metadata())["grpc-status-details-bin"])
    retry = error_details_pb2.RetryInfo()
    assert status.details[0].Unpack(retry)
    assert retry.retry_delay.ToNanoseconds() > 0


def test_a_deadline_ends_a_request_that_waits(ladder: Serving) -> None:
    """While the executor is busy, an admitted request with a lost cause ends DEADLINE_EXCEEDED and never runs."""
    gate = Gate(ladder.model("ladder"))
    held = ladder.v2.ModelInfer.future(asking(request_for("ladder", x=ROW), variant="fp32"))
    assert gate.entered.wait(WAIT_S)
    error = failure(lambda: ladder.infer(asking(request_for("ladder", x=ROW), slo_latency_ms=300.0)))
    assert error.code() is Code.DEADLINE_EXCEEDED
    assert trailing(error)["gearshift-reason"] == "expired"
    assert int(trailing(error)["gearshift-queue_us"]) > 0
    rpc_deadline = failure(lambda: ladder.infer(request_for("ladder", x=ROW), timeout=0.3))
    assert rpc_deadline.code() is Code.DEADLINE_EXCEEDED
    gate.opened.set()
    assert held.code() is Code.OK
    wait_until(lambda: ladder.outcomes() == {"ok": 1, "expired": 2})
    assert len(gate.batches) == 1, "expired work never ran"


def test_a_cancelled_request_is_counted_and_harms_nobody(ladder: Serving) -> None:
    """The client sees CANCELLED, its batch-mates their answers."""
    gate = Gate(ladder.model("ladder"))
    calls = [ladder.v2.ModelInfer.future(request_for("ladder", x=ROW)) for _ in range(4)]
    assert gate.entered.wait(WAIT_S)
    wait_until(lambda: ladder.server.engine.inflight() == {"ladder": 4})
    for call in calls[1:3]:
        call.cancel()
    wait_until(lambda: ladder.outcomes() == {"cancelled": 2})
    gate.opened.set()
    assert [call.code() for call in calls] == [Code.OK, Code.CANCELLED, Code.CANCELLED, Code.OK]


def test_a_failing_variant_is_replaced_and_a_failing_model_has_an_incident(
    ladder: Serving, caplog: pytest.LogCaptureFixture
) -> None:
    """One broken variant costs a retry; when all are broken INTERNAL shows nothing but an id that the log explains."""
    model = ladder.model("ladder")

    class Broken:
        def run(self, _: object) -> None:
            raise RuntimeError("secret of the runtime")

    model.sessions["fp32"] = Broken()  # type: ignore[index]
    parameters = ladder.infer(request_for("ladder", x=ROW)).parameters
    assert (parameters["variant"], parameters["reason"]) == ("int8-static", "retry")
    model.sessions["int8-static"] = Broken()  # type: ignore[index]
    error = failure(lambda: ladder.infer(request_for("ladder", x=ROW)))
    assert error.code() is Code.INTERNAL
    found = re.fullmatch(r"the model failed to answer; incident ([0-9a-f]{12})", error.details())
    assert found
    assert trailing(error)["gearshift-reason"] == "failed"
    record = next(record for record in caplog.records if found[1] in record.getMessage())
    assert record.exc_info
    assert "secret" in str(record.exc_info[1])
    wait_until(lambda: ladder.outcomes() == {"ok": 1, "failed": 1})


def test_an_unknown_path_is_unimplemented(ladder: Serving) -> None:
    """Another package's service, as TorchServe has it, is UNIMPLEMENTED and not a crash."""
    path = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService/ServerLive"
    assert failure(lambda: ladder.channel.unary_unary(path)(b"", timeout=WAIT_S)).code() is Code.UNIMPLEMENTED
