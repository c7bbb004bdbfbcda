"""`gearshift bench` against a real server: what is sent is counted on both sides, and recorded load can be replayed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import models
import numpy as np
import pytest
from serving import Serving, asking, failure, request_for, serving

from server.bench import command, load
from server.bench.load import UNANSWERED, Answer, Interrupted, connected, open_loop
from server.cli import main
from server.scheduling.slo import OnInfeasible, Slo
from server.trace import Arrival, read_trace
from server.wire.inference import MODEL_INFER
from variants.variant import REFERENCE

ROWS = np.eye(4, dtype=np.float32)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A server of a proven identity, of a bare one without a batch, and of one with two inputs."""
    repository = tmp_path_factory.mktemp("repository")
    models.add_variant(repository, "same", REFERENCE, models.identity("FP32", ("batch", 4)), score=0.75)
    models.add(repository, "matrix", models.matrix())
    models.add(repository, "tokens", models.tokens())
    with serving(repository) as server:
        yield server


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """Four rows of which the identity gets three right."""
    np.savez(tmp_path / "data.npz", x=ROWS, label=np.array([0, 1, 2, 0]))
    return tmp_path / "data.npz"


def bench(running: Serving, *arguments: object) -> int:
    """The exit code of `gearshift bench` in this process."""
    try:
        return main(["bench", "--url", running.address, *map(str, arguments)])
    except SystemExit as stop:
        return int(stop.code or 0)


def at_once(path: Path, requests: int) -> Path:
    """A trace of so many requests at the same moment."""
    path.write_text("0\n" * requests)
    return path


def figures(path: Path) -> dict[str, Any]:
    """The document that `--json` wrote."""
    found: dict[str, Any] = json.loads(path.read_text())
    return found


@pytest.mark.parametrize("connections", [1, 3])
def test_counts_and_measured_accuracy_add_up(
    running: Serving, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], connections: int
) -> None:
    """Every request is one answer on both sides; labels give the accuracy that was really served."""
    before = running.outcomes().get("ok", 0)
    flags = ("--data", labelled, "--json", tmp_path / "o.json", "--connections", connections)
    assert bench(running, "--model", "same", "--trace", at_once(tmp_path / "t", 20), *flags) == 0
    facts = figures(tmp_path / "o.json")
    assert facts["requests"] == facts["admitted"] == facts["codes"]["OK"] == 20
    assert running.outcomes()["ok"] == before + 20
    assert facts["outcomes"] == [{"code": "OK", "slo_met": True, "floor_met": True, "requests": 20}]
    assert facts["variants"]["fp32"]["answers"] == sum(facts["reasons"].values()) == 20
    assert facts["slo_attainment"] == 1
    assert facts["mean_accuracy"] == facts["effective_accuracy"] == 0.75
    assert facts["measured_accuracy"] == facts["variants"]["fp32"]["measured_accuracy"] == 0.75
    shown = capsys.readouterr().out
    assert "SLO attainment" in shown
    assert "fp32" in shown


def test_a_refusal_is_a_miss_and_told(running: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What no variant can meet is refused by the server, counts as a miss, and its reason is shown."""
    flags = ("--trace", at_once(tmp_path / "t", 5), "--min-accuracy", 0.9, "--json", tmp_path / "o.json")
    assert bench(running, "--model", "same", *flags) == 0
    facts = figures(tmp_path / "o.json")
    assert facts["codes"] == {"FAILED_PRECONDITION": 5}
    assert (facts["slo_attainment"], facts["slo_attainment_admitted"], facts["admitted"]) == (0, None, 0)
    assert "accuracy floor" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["matrix", "tokens"])
def test_inputs_are_made_up_from_the_model(running: Serving, tmp_path: Path, model: str) -> None:
    """Without data any model can be loaded, at a made rate."""
    flags = ("--rate", 2000, "--cv2", 0, "--seconds", 0.01, "--json", tmp_path / "o.json")
    assert bench(running, "--model", model, *flags) == 0
    assert figures(tmp_path / "o.json")["codes"] == {"OK": 19}


def test_a_recording_replayed_is_the_same_recording(tmp_path: Path) -> None:
    """What clients asked, however they asked it, a replay asks again: two recordings hold the same requests."""
    models.add(tmp_path / "models", "m", models.mlp(4))
    x = np.ones((1, 4), np.float32)
    slo: dict[str, float | str] = {
        "slo_latency_ms": 50_000.25, "slo_min_accuracy": 0.5, "slo_floor": "soft", "priority": 2
    }  # fmt: skip
    with serving(tmp_path / "models", record_trace=str(tmp_path / "first")) as server:
        server.v2.ModelInfer(request_for("m", x=x))
        server.v2.ModelInfer(asking(request_for("m", x=np.ones((3, 4), np.float32)), timeout=20_000_000))
        server.v2.ModelInfer(asking(request_for("m", x=x), **slo, slo_on_infeasible="degrade, late"))
        server.v2.ModelInfer(asking(request_for("m", "1", x=x), variant="fp32"))
        failure(server.v2.ModelInfer, asking(request_for("m", x=x), slo_latency_ms=-1.0))
        server.v2.ModelInfer(request_for("m", x=x), timeout=3000)
    recorded = read_trace(tmp_path / "first")
    by_deadline = recorded.pop()
    assert by_deadline.slo == Slo()
    assert by_deadline.timeout_ns is not None
    assert 0 < by_deadline.timeout_ns <= 3000 * 10**9
    soft = Slo(50_000_250_000, 0.5, None, False, (OnInfeasible.DEGRADE, OnInfeasible.LATE), None, 2)
    assert [(each.slo, each.timeout_ns, each.version, each.samples, each.shape) for each in recorded] == [
        (Slo(), None, "", 1, ((4,),)),
        (Slo(), 20 * 10**9, "", 3, ((4,),)),
        (soft, None, "", 1, ((4,),)),
        (Slo(variant="fp32"), None, "1", 1, ((4,),)),
    ]
    with serving(tmp_path / "models", record_trace=str(tmp_path / "second")) as server:
        assert bench(server, "--model", "m", "--trace", tmp_path / "first", "--rate", 10_000) == 0
    assert asked(read_trace(tmp_path / "second")) == asked([*recorded, by_deadline])


def asked(trace: list[Arrival]) -> Counter[object]:
    """What was asked how often; a deadline is replayed in the microseconds of the `timeout` parameter."""
    return Counter((a.slo, a.timeout_ns and a.timeout_ns // 1000, a.model, a.version, a.samples) for a in trace)


def test_flags_override_what_the_trace_asked(tmp_path: Path) -> None:
    """A latency of the flags replaces the recorded latency and timeout; the rest of the SLO stays."""
    models.add(tmp_path / "models", "m", models.mlp(4))
    line = {"arrival_ns": 0, "model": "m", "samples": 1, "slo": {"latency_ns": 1, "priority": 2}, "timeout_ns": 1}
    (tmp_path / "old").write_text(json.dumps(line) + "\n")
    with serving(tmp_path / "models", record_trace=str(tmp_path / "new")) as server:
        flags = ("--latency-ms", 40_000, "--on-infeasible", "late")
        assert bench(server, "--model", "m", "--trace", tmp_path / "old", *flags) == 0
    (replayed,) = read_trace(tmp_path / "new")
    assert replayed.slo == Slo(40_000 * 10**6, on_infeasible=(OnInfeasible.LATE,), priority=2)
    assert replayed.timeout_ns is None


def test_ctrl_c_ends_with_what_there_is(running: Serving) -> None:
    """An interrupt ends the sending; what was sent is answered and handed over."""
    message = request_for("same", x=ROWS).SerializeToString()

    def sending(index: int) -> bytes:
        assert index == 0
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
        return message

    async def interrupted() -> list[load.Answer]:
        async with connected(running.address) as channels:
            return await open_loop(channels, [0, 3600 * 10**9], sending)

    with pytest.raises(Interrupted) as stopped:
        load.run(interrupted())
    assert [answer.code for answer in stopped.value.answers] == ["OK"]


@pytest.mark.parametrize(("due_ns", "interrupts"), [([0, 0], 1), ([0, 0, 3600 * 10**9], 2)])
def test_ctrl_c_ends_the_waiting(due_ns: list[int], interrupts: int) -> None:
    """What is still out then is unanswered, and nothing else is lost: the first interrupt ends the sending, if any."""
    asked = 0

    async def one_answer(request: bytes, context: Any) -> bytes:
        nonlocal asked
        asked += 1
        if asked == 1:
            return b"answer"
        for _ in range(interrupts):
            signal.raise_signal(signal.SIGINT)
            for _ in range(100):
                await asyncio.sleep(0)  # the loop turns
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    async def interrupted() -> list[Answer]:
        server = grpc.aio.server()
        service, method = MODEL_INFER.strip("/").split("/")
        handlers = {method: grpc.unary_unary_rpc_method_handler(one_answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            async with connected(f"127.0.0.1:{port}") as channels:
                return await open_loop(channels, due_ns, lambda _: b"")
        finally:
            await server.stop(None)

    with pytest.raises(Interrupted) as stopped:
        load.run(interrupted())
    assert sorted(answer.code for answer in stopped.value.answers) == ["OK", UNANSWERED]


def test_an_interrupted_load_is_told_as_such(running: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The figures of what was sent are written, and say that they are not all; the exit code is that of Ctrl-C."""

    async def stopping(channels: Any, due_ns: Any, message: Any, metadata: Any) -> list[Answer]:
        def sending(index: int) -> Any:
            asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)
            return message(index)

        return await open_loop(channels, due_ns, sending, metadata)

    monkeypatch.setattr(command, "open_loop", stopping)
    (tmp_path / "t").write_text("0\n3600\n")
    assert bench(running, "--model", "same", "--trace", tmp_path / "t", "--json", tmp_path / "o.json") == 130
    facts = figures(tmp_path / "o.json")
    assert (facts["interrupted"], facts["requests"], facts["codes"]) == (True, 1, {"OK": 1})


def test_a_trace_has_the_rate_of_its_arrivals(running: Serving, tmp_path: Path) -> None:
    """Time asked for beyond its end offers nothing and does not count; at once has no rate."""
    (tmp_path / "t").write_text("0\n0.01\n0.02\n")
    flags = ("--model", "same", "--json", tmp_path / "o.json", "--seconds", 1000)
    assert bench(running, *flags, "--trace", tmp_path / "t") == 0
    facts = figures(tmp_path / "o.json")
    assert facts["offered_per_s"] == facts["goodput_per_s"] == pytest.approx(100)
    assert facts["interrupted"] is False
    assert bench(running, *flags, "--trace", at_once(tmp_path / "t", 2)) == 0
    assert figures(tmp_path / "o.json")["offered_per_s"] is None


def test_a_connection_that_is_full_is_named(
    running: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Streams that were reset say nothing of the scheduler; one line says what helps."""

    async def full(channels: Any, due_ns: Any, message: Any, metadata: Any) -> list[Answer]:
        return [Answer(due, due, due, "UNAVAILABLE", detail="Received RST_STREAM with error code 7") for due in due_ns]

    monkeypatch.setattr(command, "open_loop", full)
    assert bench(running, "--model", "same", "--trace", at_once(tmp_path / "t", 3)) == 0
    told = capsys.readouterr().err
    assert "3 requests were turned away by their connection" in told
    assert "--connections" in told
    assert told.count("\n") == 1


def test_a_failure_leaves_no_file(running: Serving, tmp_path: Path) -> None:
    """Where nothing was measured there are no figures; those of an earlier load stay."""
    (tmp_path / "old").write_text("{}")
    for name in ("old", "new"):
        assert bench(running, "--model", "unknown", "--rate", 1, "--json", tmp_path / name) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("old", "{}")]


def test_a_latency_counts_from_when_it_was_due(running: Serving) -> None:
    """A request that was due an hour ago is an hour late, however quick the server."""
    message = request_for("same", x=ROWS).SerializeToString()
    hour_ns = 3600 * 10**9

    async def late() -> list[load.Answer]:
        async with connected(running.address) as channels:
            return await open_loop(channels, [-hour_ns], lambda _: message)

    (answer,) = load.run(late())
    assert answer.latency_ns > answer.sent_ns - answer.due_ns > hour_ns


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--trace FILE or --rate R is needed"),
        (["--rate", "-1"], "--rate must be above 0"),
        (["--rate", "1", "--seconds", "nan"], "--seconds must be above 0"),
        (["--rate", "1", "--cv2", "-1"], "--cv2"),
        (["--trace", "t", "--cv2", "1"], "--cv2"),
        (["--rate", "0.001", "--seconds", "1", "--cv2", "0"], "no request"),
        (["--rate", "1", "--connections", "0"], "--connections"),
        (["--rate", "1", "--seed", "-1"], "--seed must be at least 0"),
        (["--trace", "huge"], "more than a message can hold"),
        (["--rate", "1", "--data", "t"], "--data t: not a readable .npz of plain arrays\n"),
        (["--rate", "1", "--latency-ms", "0"], "'--latency-ms' must be positive"),
        (["--rate", "1", "--min-accuracy", "2"], "'--min-accuracy' must be in [0, 1]"),
        (["--rate", "1", "--on-infeasible", "hope"], "'--on-infeasible' lists"),
        (["--trace", "/nowhere"], "--trace /nowhere: cannot be read"),
        (["--rate", "1", "--json", "/nowhere/o.json"], "--json /nowhere/o.json"),
        (["--rate", "1", "--data", "/nowhere"], "--data /nowhere"),
        (["--rate", "1", "--data", "two.npz"], "only one array may be no input, the target; a, b are none"),
        (["--rate", "1", "--token-file", "/dev/null"], "holds no token"),
    ],
)  # fmt: skip
def test_wrong_usage_is_one_line_and_exit_2(
    running: Serving,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    told: str,
) -> None:
    """Nothing is sent, and one line says what is wrong."""
    monkeypatch.chdir(tmp_path)
    np.savez("two.npz", x=ROWS, a=ROWS, b=ROWS)
    at_once(Path("t"), 1)
    Path("huge").write_text(json.dumps({"arrival_ns": 0, "model": "same", "samples": 2**31, "slo": {}}))
    assert bench(running, "--model", "same", *arguments) == 2
    shown = capsys.readouterr()
    assert told in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_a_trace_of_other_models_is_refused(
    running: Serving, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their inputs would not fit; the line names them."""
    (tmp_path / "t").write_text('{"arrival_ns": 0, "model": "other", "samples": 1, "slo": {}}\n')
    assert bench(running, "--model", "same", "--trace", tmp_path / "t") == 2
    assert "holds requests for other, none for same" in capsys.readouterr().err


def test_no_server_and_no_model_are_one_line_and_exit_1(running: Serving, capsys: pytest.CaptureFixture[str]) -> None:
    """Who cannot be asked is named; nothing else is printed."""
    assert main(["bench", "--url", "127.0.0.1:1", "--model", "same", "--rate", "1"]) == 1
    assert "no answer from 127.0.0.1:1" in capsys.readouterr().err
    assert bench(running, "--model", "unknown", "--rate", 1) == 1
    shown = capsys.readouterr()
    assert "NOT_FOUND" in shown.err
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_bench_needs_no_torch() -> None:
    """A load generator's machine may lack what builds variants."""
    check = "import sys, server.bench.command; sys.exit(bool({'torch', 'onnx', 'onnxruntime'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False, cwd=Path(__file__).parent.parent).returncode == 0
