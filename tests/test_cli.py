"""The command line: exit codes, one-line errors, and clients that are shown what a real gRPC server says."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from protos import gearshift_pb2 as pb
from protos import gearshift_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from server import healthcheck
from server.cli import main

LISTING = pb.ListVariantsResponse(
    model="digits",
    version="3",
    variants=[
        pb.VariantInfo(
            variant="fp32", recipe="fp32", state="eligible", precision="fp32", runtime="onnxruntime", device="cpu",
            accuracy=pb.Interval(value=0.98125, low=0.96, high=0.99), size_bytes=3 << 20, samples_per_second=1000,
            latency=[pb.BatchLatency(batch_size=1, latency_us=2000), pb.BatchLatency(batch_size=8, latency_us=8000)],
            gate_verdict="passed",
        ),
        pb.VariantInfo(variant="int8-dynamic", state="unverified", reason="no [red]data[/red]"),
    ],
)  # fmt: skip


class Variants(gearshift_pb2_grpc.VariantServiceServicer):
    """Answers with a fixed listing, remembers what it was asked, and knows one model."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.tokens: list[str | bytes | None] = []

    def ListVariants(self, request: Any, context: grpc.ServicerContext) -> pb.ListVariantsResponse:  # noqa: N802
        self.tokens.append(dict(context.invocation_metadata()).get("authorization"))
        if request.model != "digits":
            context.abort(grpc.StatusCode.NOT_FOUND, "no model\nnamed so")
        return LISTING

    def ExplainRoute(self, request: Any, context: grpc.ServicerContext) -> pb.ExplainRouteResponse:  # noqa: N802
        self.asked.append(request)
        if request.slo.min_accuracy > 1:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "slo_min_accuracy is above 1")
        candidates = [
            pb.Candidate(variant="fp32", allowed=True, why="most accurate that fits", predicted_latency_us=2500),
            pb.Candidate(variant="int8-dynamic", allowed=False, why="unverified"),
        ]
        return pb.ExplainRouteResponse(model="digits", version="3", variant="fp32", reason="fit", candidates=candidates)


class Index(open_inference_pb2_grpc.GRPCInferenceServiceServicer):
    """A repository with one model that serves and one that does not."""

    def RepositoryIndex(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        return open_inference_pb2.RepositoryIndexResponse(
            models=[
                {"name": "digits", "version": "3", "state": "READY"},
                {"name": "broken", "version": "1", "state": "UNAVAILABLE", "reason": "not an ONNX file"},
            ]
        )


@pytest.fixture
def running() -> Iterator[tuple[Variants, str]]:
    """A real server with those two services, and its address."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    service = Variants()
    gearshift_pb2_grpc.add_VariantServiceServicer_to_server(service, server)
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(Index(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield service, f"127.0.0.1:{port}"
    server.stop(None).wait()


def run(*arguments: str) -> int:
    """The exit code of one command run in this process."""
    try:
        return main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["bnech"], "invalid choice: 'bnech'"),
        (["serve", "--grpc-prot", "1"], "--grpc-prot"),
        (["serve"], "--models is required"),
        (["serve", "--models", "/nowhere"], "--models"),
        (["serve", "--models", ".", "--host", "0.0.0.0"], "--insecure-bind"),  # noqa: S104
        (["serve", "--model", "."], "--model"),
        (["build"], "PATH"),
        (["build", "m", "--variants", ""], "'' has an empty name in it"),
        (["build", "m", "--variants", "fp32,"], "'fp32,' has an empty name in it"),
        (["explain", "digits", "--latency-ms", "soon"], "--latency-ms"),
        (["explain", "digits", "--priority", "-1"], "--priority"),
        (["explain", "digits", "--priority", "4294967296"], "not a whole number"),
        (["explain", "digits", "--floor", "firm"], "--floor"),
        (["variants", "--tls-ca", "/nowhere/ca.pem"], "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_2(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever is wrong with the words given, one line says what, and nothing goes to standard output."""
    assert run(*arguments) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_module_and_help_work_as_a_process() -> None:
    """`python -m server` is the command line; its help names every command that exists."""
    shown = subprocess.run([sys.executable, "-m", "server", "--help"], capture_output=True, text=True, check=False)
    assert shown.returncode == 0
    for command in ("build", "serve", "variants", "explain"):
        assert command in shown.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "server", "serve", "--threads", "no"], capture_output=True, text=True, check=False
    )
    assert (wrong.returncode, wrong.stderr.count("\n"), "Traceback" in wrong.stderr) == (2, 1, False)


def test_the_help_of_serve_shows_flags_with_their_defaults(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What holds without a flag is said beside it."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run("serve", "--help") == 0
    shown = capsys.readouterr().out
    assert "--grpc-port" in shown
    assert "(default 8001)" in shown


def test_build_passes_its_flags_on_and_returns_the_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder that is no repository is exit 2 with the builder's own line."""
    assert run("build", str(tmp_path / "nothing"), "--variants", "fp32, amp", "--quick") == 2
    assert capsys.readouterr().err.strip()


def test_variants_shows_a_table_of_every_model(
    running: tuple[Variants, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Accuracy with interval, profiled latencies, throughput, size, state and why; dashes for what is not known."""
    assert run("variants", "--url", running[1]) == 0
    lines = capsys.readouterr().out.splitlines()
    (fp32,) = [line for line in lines if "fp32" in line]
    for cell in (
        "0.9812 [0.9600, 0.9900]",
        "2.00 ms",
        "8.00 ms",
        "–",
        "1,000/s",
        "3.00 MiB",
        "onnxruntime",
        "eligible",
    ):
        assert cell in fp32
    (int8,) = [line for line in lines if "int8-dynamic" in line]
    assert "no [red]data[/red]" in int8
    assert lines[-1] == "broken is not served: not an ONNX file"


def test_variants_as_json_is_for_machines(running: tuple[Variants, str], capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers are numbers, and what is not known is null."""
    assert run("variants", "--url", running[1], "--json") == 0
    digits, broken = json.loads(capsys.readouterr().out)
    fp32, int8 = digits["variants"]
    assert fp32["accuracy"] == {"value": 0.98125, "low": 0.96, "high": 0.99}
    assert fp32["latency_ms"] == {"1": 2.0, "8": 8.0}
    assert fp32["size_bytes"] == 3 << 20
    assert (int8["accuracy"], int8["samples_per_second"], int8["latency_ms"]) == (None, None, {})
    assert broken == {"model": "broken", "version": "1", "reason": "not an ONNX file"}


def test_an_unknown_model_is_one_line_and_exit_1(
    running: tuple[Variants, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The server's own words, on one line."""
    assert run("variants", "no-such", "--url", running[1]) == 1
    assert capsys.readouterr().err == "gearshift variants: NOT_FOUND: no model named so\n"


def test_explain_sends_what_was_asked_and_shows_why(
    running: tuple[Variants, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the given fields are set; every candidate is shown with its reason."""
    service, url = running
    assert run("explain", "digits", "--latency-ms", "20", "--max-accuracy-drop", "0", "--url", url) == 0
    (asked,) = service.asked
    assert (asked.model, asked.slo.latency_ms, asked.slo.max_accuracy_drop) == ("digits", 20.0, 0.0)
    assert asked.slo.HasField("max_accuracy_drop")
    assert not asked.slo.HasField("min_accuracy")
    shown = capsys.readouterr().out
    assert "digits version 3: fp32 would answer (fit)" in shown
    assert "2.50 ms" in shown
    assert "unverified" in shown
    assert run("explain", "digits", "--json", "--url", url) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["variant"] == "fp32"
    assert [candidate["predicted_latency_ms"] for candidate in facts["candidates"]] == [2.5, None]


def test_explain_can_ask_whatever_a_request_can(running: tuple[Variants, str]) -> None:
    """Every field of an SLO has its flag, and one that is not given is not set."""
    service, url = running
    flags = ("--floor", "soft", "--on-infeasible", "degrade, late", "--variant", "amp", "--priority", "3")
    assert run("explain", "digits", "--min-accuracy", "0.9", *flags, "--url", url) == 0
    assert run("explain", "digits", "--url", url) == 0
    everything, nothing = service.asked
    assert everything.slo == pb.Slo(
        min_accuracy=0.9, floor="soft", on_infeasible=["degrade", "late"], variant="amp", priority=3
    )
    assert nothing.slo == pb.Slo()


def test_an_argument_the_server_refuses_is_exit_2(
    running: tuple[Variants, str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A floor above 1 is wrong usage, whoever notices."""
    assert run("explain", "digits", "--min-accuracy", "2", "--url", running[1]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_token_is_sent(running: tuple[Variants, str], tmp_path: Path) -> None:
    """`--token-file` makes every call carry the file's token."""
    path = tmp_path / "token"
    path.write_text("s3cret\n", encoding="utf-8")
    assert run("variants", "digits", "--url", running[1], "--token-file", str(path)) == 0
    assert running[0].tokens == ["Bearer s3cret"]


def test_an_unreachable_server_is_one_line_and_exit_1(capsys: pytest.CaptureFixture[str]) -> None:
    """The line says where nobody answered and what to do."""
    assert run("variants", "--url", "127.0.0.1:1") == 1
    shown = capsys.readouterr().err
    assert shown.startswith("gearshift variants: no answer from 127.0.0.1:1: is `gearshift serve` running there?")
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (health_pb2.HealthCheckResponse.SERVING, None),
        (health_pb2.HealthCheckResponse.NOT_SERVING, "NOT_SERVING"),
    ],
)
def test_the_container_health_check_asks_the_health_service(status: int, problem: str | None) -> None:
    """Serving is healthy, anything else is not, and says what it is."""
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        assert healthcheck.check(port) == problem
    finally:
        server.stop(None).wait()
    assert healthcheck.check(port) == "no answer: UNAVAILABLE"
