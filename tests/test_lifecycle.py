"""`gearshift serve` as a process: what it prints, what stops it, with which code, and what its clients see."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import models
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import PROFILE_CACHE, WAIT_S, request_for, wait_until

from protos import open_inference_pb2 as pb
from protos import open_inference_pb2_grpc as pb_grpc

TOP = Path(__file__).parents[1]
READY = re.compile(r"ready: gRPC on 127\.0\.0\.1:(\d+), HTTP on http://127\.0\.0\.1:(\d+)")
A_SECOND, A_MINUTE = 300_000, 20_000_000  # turns of the model `turns`, about


def command(repository: Path | str, *flags: str) -> list[str]:
    """The command line of a server on free ports."""
    ports = ("--grpc-port", "0", "--http-port", "0")
    return [sys.executable, "-m", "server", "serve", "--models", str(repository), *ports, *flags]


class Process:
    """A running `gearshift serve`."""

    def __init__(self, repository: Path, *flags: str) -> None:
        """Start and read the log up to the line that says ready."""
        environment = {**os.environ, **PROFILE_CACHE}
        self.popen = subprocess.Popen(
            command(repository, *flags), stderr=subprocess.PIPE, text=True, cwd=TOP, env=environment
        )
        self.log = ""
        assert self.popen.stderr is not None
        for line in self.popen.stderr:
            self.log += line
            if found := READY.search(line):
                self.channel = grpc.insecure_channel(f"127.0.0.1:{found[1]}")
                self.v2 = pb_grpc.GRPCInferenceServiceStub(self.channel)
                self.http = f"http://127.0.0.1:{found[2]}"
                return
        raise AssertionError(f"ended with {self.popen.wait()}: {self.log}")

    def inflight(self) -> float:
        """Admitted and unanswered requests, as the metrics say."""
        with urllib.request.urlopen(f"{self.http}/metrics") as response:  # noqa: S310 - our own address
            lines = response.read().decode().splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("gearshift_inflight_requests{"))

    def wait(self) -> int:
        """Read the log to its end; the exit code."""
        assert self.popen.stderr is not None
        self.log += self.popen.stderr.read()
        return self.popen.wait(WAIT_S)


@contextmanager
def process(repository: Path, *flags: str) -> Iterator[Process]:
    """A server process that is gone afterwards."""
    running = Process(repository, *flags)
    try:
        yield running
    finally:
        running.popen.kill()
        running.wait()
        assert running.popen.stderr is not None
        running.popen.stderr.close()
        running.channel.close()


def refused(repository: Path | str, *flags: str) -> str:
    """The one line with which a server that cannot start ends, with exit code 2."""
    done = subprocess.run(
        command(repository, *flags),
        capture_output=True,
        text=True,
        check=False,
        cwd=TOP,
        env={**os.environ, **PROFILE_CACHE},
    )
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    said = [line for line in done.stderr.splitlines() if not line.startswith("{")]
    assert len(said) == 1, done.stderr
    return said[0]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Two models: one whose work a request decides, and one that is always quick."""
    models.add(tmp_path, "turns", models.turns())
    models.add(tmp_path, "mlp", models.mlp())
    return tmp_path


def turns(count: int) -> pb.ModelInferRequest:
    """A request that takes this many turns."""
    return request_for("turns", turns=np.array([count]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains(repository: Path, number: signal.Signals) -> None:
    """What runs is answered, health turns NOT_SERVING, newcomers get UNAVAILABLE, and the exit code is 0."""
    with process(repository, "--executors", "2", "--threads", "2") as server:
        health = health_pb2_grpc.HealthStub(server.channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(service=""))
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        running = server.v2.ModelInfer.future(turns(A_SECOND))
        wait_until(lambda: server.inflight() == 1)
        server.popen.send_signal(number)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.RpcError) as refusal:
            server.v2.ModelInfer(turns(1), timeout=WAIT_S)
        assert refusal.value.code() is grpc.StatusCode.UNAVAILABLE
        assert running.code() is grpc.StatusCode.OK
        assert server.wait() == 0
        assert "drained" in server.log
        assert "Traceback" not in server.log


def test_work_without_end_does_not_hold_up_the_exit(repository: Path) -> None:
    """A runtime call that outlives --drain-seconds is abandoned: exit code 0 within the limit, the client told."""
    with process(repository, "--drain-seconds", "1") as server:
        call = server.v2.ModelInfer.future(turns(A_MINUTE))
        wait_until(lambda: server.inflight() == 1)
        start = time.monotonic()
        server.popen.send_signal(signal.SIGTERM)
        assert server.wait() == 0
        assert time.monotonic() - start < 4, "the limit, and some for a shared machine"
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert "unanswered work" in server.log


def test_a_signal_while_loading_ends_at_once(repository: Path) -> None:
    """Before anything is served there is nothing to drain: exit code 0 without a word of ready."""
    models.add(repository, "heavy", models.mlp(512, 16))
    environment = {**os.environ, "XDG_CACHE_HOME": str(repository)}
    loading = command(repository, "--log-format", "json")
    with subprocess.Popen(loading, stderr=subprocess.PIPE, text=True, cwd=TOP, env=environment) as started:
        try:
            assert started.stderr is not None
            assert any("measuring" in line for line in started.stderr)
            started.send_signal(signal.SIGTERM)
            _, log = started.communicate(timeout=WAIT_S)
        finally:
            started.kill()
    assert started.returncode == 0
    assert "ready" not in log
    assert "Traceback" not in log


def test_a_corrupt_model_stops_no_other(repository: Path) -> None:
    """The good ones serve, the bad one is in the log and in the index with its reason."""
    models.add(repository, "corrupt", models.mlp())
    (repository / "corrupt" / "1" / "model.onnx").write_bytes(b"no model")
    with process(repository) as server:
        assert "model corrupt cannot load" in server.log
        index = {entry.name: entry for entry in server.v2.RepositoryIndex(pb.RepositoryIndexRequest()).models}
        assert {name: entry.state for name, entry in index.items()} == {
            "corrupt": "UNAVAILABLE",
            "mlp": "READY",
            "turns": "READY",
        }
        assert "not a readable ONNX file" in index["corrupt"].reason
        assert server.v2.ServerReady(pb.ServerReadyRequest()).ready


def test_strict_makes_it_fatal(repository: Path) -> None:
    """With --strict the same is one line and exit code 2."""
    models.add(repository, "corrupt", models.mlp())
    (repository / "corrupt" / "1" / "model.onnx").write_bytes(b"no model")
    assert "--strict: model corrupt cannot load" in refused(repository, "--strict", "--log-format", "json")


def test_an_empty_repository_is_live_and_not_ready(tmp_path: Path) -> None:
    """It serves health and metadata, and is not ready."""
    with process(tmp_path) as server:
        assert server.v2.ServerLive(pb.ServerLiveRequest()).live
        assert not server.v2.ServerReady(pb.ServerReadyRequest()).ready
        health = health_pb2_grpc.HealthStub(server.channel)
        assert health.Check(health_pb2.HealthCheckRequest(service="live")).status == 1
        assert health.Check(health_pb2.HealthCheckRequest(service="")).status == 2
        server.popen.send_signal(signal.SIGTERM)
        assert server.wait() == 0


def test_a_restart_remembers_the_profiles(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second start measures nothing."""
    monkeypatch.setitem(PROFILE_CACHE, "XDG_CACHE_HOME", str(repository / ".cache"))
    with process(repository) as first:
        assert "measuring" in first.log
    with process(repository) as second:
        assert "measuring" not in second.log


def test_wrong_starts_are_one_line(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Wrong flags, addresses, certificates and tokens: exit code 2, one line that says what is wrong."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "not.pem").write_text("no certificate")
    (folder / "tokens").write_text("token unknown-scope\n")
    certificate = ("--tls-cert", str(folder / "not.pem"), "--tls-key", str(folder / "not.pem"))
    for flags, text in (
        (("--grpc-prot", "1"), "--grpc-prot"),
        (("--threads", "none"), "--threads"),
        (("--host", "0.0.0.0"), "--insecure-bind"),  # noqa: S104 - refused
        (certificate, "--tls-cert"),
        (("--auth-tokens", str(folder / "tokens")), "line 1"),
        (("--host", "192.0.2.1", "--insecure-bind"), "cannot listen"),
        (("--device", "cuda"), "no CUDA device"),
    ):
        if text != "no CUDA device" or not Path("/dev/nvidia0").exists():
            assert text in refused(repository, *flags, "--log-format", "json")
    assert "/nowhere" in refused("/nowhere")


def test_a_port_in_use_is_one_line(repository: Path) -> None:
    """A second server on the same port fails instead of sharing it."""
    with process(repository) as server:
        found = READY.search(server.log)
        assert found
        for flag, port in (("--grpc-port", found[1]), ("--http-port", found[2])):
            assert f"{flag} {port}" in refused(repository, flag, port, "--log-format", "json")
