"""The whole server against stock clients, and its counters against what was sent."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import models
import numpy as np
import pytest
from serving import Gate, Serving, asking, request_for, serving, wait_until

from server.app import Server
from server.transport.transport import Taken

ROW = np.linspace(-1, 1, 16, dtype=np.float32)[None]


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of every kind of model, and a broken one."""
    repository = tmp_path_factory.mktemp("repository")
    for datatype in models.ONNX_TYPES:
        models.add(repository, datatype.lower(), models.identity(datatype))
    for name in ("mlp", "counted"):
        models.add(repository, name, models.mlp(), version=3)
    models.add(repository, "tokens", models.tokens())
    models.add(repository, "matrix", models.matrix())
    models.add(repository, "broken", models.mlp())
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"\x08\x01 no model")
    with serving(repository) as running:
        yield running


@pytest.mark.parametrize(
    "check",
    [
        "describe",
        "count",
        "datatypes",
        "typed",
        "arguments",
        "outputs",
        "split",
        "callbacks",
        "stream",
        "strict_stream",
        "aio",
        "aio_errors",
    ],
)
def test_stock_client(everything: Serving, check: str) -> None:
    """An unmodified tritonclient, in its own process, gets what this check of `stock_end_to_end.py` says."""
    pytest.importorskip("tritonclient")
    script = Path(__file__).with_name("stock_end_to_end.py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", script, check, everything.address],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr


def test_outcomes_sum_to_requests(tmp_path: Path) -> None:
    """Under load with cancels, bad input, refusals and expiries, the outcome counters add up to the requests sent."""
    models.add(tmp_path, "m", models.mlp(256, 4))
    arrived = Arrivals()
    with (
        serving(tmp_path, arrived.watch, max_queue_requests=20, executors=1) as running,
        ThreadPoolExecutor(12) as clients,
    ):
        gate = Gate(running.model("m"))
        held = running.v2.ModelInfer.future(request_for("m", x=WIDE))
        assert gate.entered.wait(20)
        waiting = [running.v2.ModelInfer.future(request_for("m", x=WIDE)) for _ in range(20)]
        wait_until(lambda: running.values("gearshift_queue_depth", "model") == {"m": 20})
        assert _code(lambda: running.infer(request_for("m", x=WIDE))) is grpc.StatusCode.RESOURCE_EXHAUSTED
        for call in waiting[:5]:
            call.cancel()
        wait_until(lambda: running.outcomes() == {"rejected": 1, "cancelled": 5})
        gate.opened.set()
        for call in (held, *waiting[5:]):
            call.result()
        codes = list(clients.map(lambda n: _code(lambda: _one_of_many(running, n)), range(600)))
        wait_until(lambda: sum(running.outcomes().values()) == len(arrived))
        outcomes = running.outcomes()
        for gauge in ("inflight_requests", "queue_depth", "queue_bytes"):
            assert running.values(f"gearshift_{gauge}", "model") == {}
    assert len(arrived) > 500
    answered = sum(outcomes.get(name, 0) for name in ("ok", "late", "degraded")) - 16
    seen, unseen = codes.count(grpc.StatusCode.OK), codes.count(grpc.StatusCode.CANCELLED)
    assert seen <= answered <= seen + unseen, "a client may cancel what is already answered"
    assert outcomes["invalid"] == codes.count(grpc.StatusCode.INVALID_ARGUMENT) == 200
    assert outcomes["infeasible"] == codes.count(grpc.StatusCode.FAILED_PRECONDITION) == 100


WIDE = np.ones((1, 256), np.float32)


def _one_of_many(running: Serving, n: int) -> object:
    """One of six kinds of request."""
    request = request_for("m", x=WIDE)
    match n % 6:
        case 0:
            return running.infer(request_for("m", x=WIDE[:, :7]))
        case 1:
            return running.infer(asking(request, slo_latency_ms=float("nan")))
        case 2:
            return running.infer(asking(request, slo_latency_ms=0.001))
        case 3:
            return running.infer(asking(request, slo_latency_ms=3.0))
        case 4:
            call = running.v2.ModelInfer.future(request_for("m", x=np.repeat(WIDE, 64, 0)))
            time.sleep(0.002)
            call.cancel()
            return call.result()
        case _:
            return running.infer(request)


def _code(call: Callable[[], object]) -> grpc.StatusCode:
    """The status that a call ends with."""
    try:
        call()
    except grpc.FutureCancelledError:
        return grpc.StatusCode.CANCELLED
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


class Arrivals(list[str]):
    """The methods of all calls that the transport of a server hands over."""

    def watch(self, server: Server) -> None:
        """Count from now on."""
        take = server.transport.take

        def counting(timeout_ns: int | None) -> Taken:
            taken = take(timeout_ns)
            self.extend(call.method for call in taken.calls)
            return taken

        server.transport.take = counting  # type: ignore[method-assign]
