"""What the load sends and what is made of the answers, without a server."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from benchmarks.slo.live import compared, show
from protos import open_inference_pb2 as pb
from server.bench.load import UNANSWERED, Answer
from server.bench.report import Ended, read, span_s, summary
from server.bench.requests import Planned, Target, plan, slo_parameters
from server.scheduling.slo import OnInfeasible, Slo
from server.settings import SettingsError
from server.trace import Arrival
from server.wire.inference import encode_parameters
from server.wire.parameters import read_parameters
from server.wire.tensors import encode_raw
from variants.data import Samples
from variants.variant import TensorSpec

MS = 10**6
MODEL = Target("m", (TensorSpec("x", "FP32", (-1,)), TensorSpec("ids", "INT64", (2,))), batched=True)
DATA = Samples({"x": np.arange(10, dtype=np.float32).reshape(5, 2), "ids": np.arange(10).reshape(5, 2)}, np.arange(5))


def sent(planned: Planned) -> pb.ModelInferRequest:
    """The message as the server gets it."""
    return pb.ModelInferRequest.FromString(planned.head + planned.body)


@pytest.mark.parametrize("latency_ns", [1, 999, 5_000, 66_872_193, 33_333_333, 123_456_789, 10**12 + 1])
def test_a_replayed_request_asks_exactly_what_was_asked(latency_ns: int) -> None:
    """The server reads the very same SLO from the parameters, to the nanosecond."""
    slo = Slo(latency_ns, 0.1, 0.2, False, (OnInfeasible.LATE, OnInfeasible.REJECT), "fp32", 4)
    (planned,) = plan([Arrival(0, slo, version="2", timeout_ns=7_000)], MODEL, DATA, 0)
    got = read_parameters(sent(planned).parameters)
    assert (got.slo, got.timeout_ns, sent(planned).model_version) == (slo, 7_000, "2")
    assert planned.latency_ns == min(latency_ns, 7_000)


def test_nothing_asked_is_nothing_sent() -> None:
    """A request that left all to the defaults does so again; a timeout below a microsecond is not none."""
    assert slo_parameters(Slo()) == {}
    assert slo_parameters(Slo(), -5) == slo_parameters(Slo(), 1) == {"timeout": 1}


def test_rows_and_labels_stay_together() -> None:
    """Every request holds its number of rows with their own labels; all rows are used before one is used again."""
    planned = plan([Arrival(0, samples=samples) for samples in (2, 1, 2, 5)], MODEL, DATA, seed=3)
    seen = []
    for each, samples in zip(planned, (2, 1, 2, 5), strict=True):
        message = sent(each)
        assert [tuple(tensor.shape) for tensor in message.inputs] == [(samples, 2), (samples, 2)]
        assert [tensor.datatype for tensor in message.inputs] == ["FP32", "INT64"]
        assert each.labels is not None
        np.testing.assert_array_equal(np.frombuffer(message.raw_input_contents[0], np.float32)[::2], each.labels * 2)
        seen.append(each.labels.tolist())
    first, second = [*seen[0], *seen[1], *seen[2]], seen[3]
    assert sorted(first) == sorted(second) == list(range(5))
    assert first != plan([Arrival(0, samples=5)], MODEL, DATA, seed=4)[0].labels.tolist()  # type: ignore[union-attr]


def test_inputs_are_made_up_where_there_is_no_data() -> None:
    """A free dimension is what the trace recorded, else 1; equal seeds make equal inputs."""
    trace = [Arrival(0, shape=((7,), (2,))), Arrival(0)]
    shapes = [[tuple(tensor.shape) for tensor in sent(each).inputs] for each in plan(trace, MODEL, None, 0)]
    assert shapes == [[(1, 7), (1, 2)], [(1, 1), (1, 2)]]
    assert plan(trace, MODEL, None, 0) == plan(trace, MODEL, None, 0)
    assert plan(trace, MODEL, None, 0) != plan(trace, MODEL, None, 1)


def answer(ms: float, code: str = "OK", lag_ms: float = 0, **parameters: Any) -> Answer:
    """An answer so many milliseconds after it was due."""
    reply = encode_parameters(parameters) if code == "OK" else b""
    return Answer(10 * MS, int((10 + lag_ms) * MS), int((10 + ms) * MS), code, reply, "" if code == "OK" else "why")


def test_every_request_sent_is_in_the_denominator() -> None:
    """Refusals and late answers are misses; over the admitted the refused are left out; accuracy counts in time."""
    asked = Planned(10 * MS, b"", b"", 50 * MS)
    answers = [
        *[answer(ms, variant="fp32", variant_accuracy=0.9, batch_size=4, slo_met=True) for ms in (10, 50)],
        answer(50.001, lag_ms=45, variant="fp32", variant_accuracy=0.9, batch_size=4, slo_met=True),
        answer(5, variant="int8", variant_accuracy=0.5, batch_size=1, slo_met=True),
        *[answer(1, code) for code in ("RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "DEADLINE_EXCEEDED", UNANSWERED)],
    ]  # fmt: skip
    facts = summary([read(asked, each) for each in answers], seconds=2)
    assert facts["slo_attainment"] == 3 / 8
    assert facts["slo_attainment_admitted"] == 3 / 6
    assert facts["goodput_per_s"] == 1.5
    assert facts["mean_accuracy"] == pytest.approx((0.9 + 0.9 + 0.5) / 3)
    assert facts["effective_accuracy"] == pytest.approx((0.9 + 0.9 + 0.5) / 8)
    assert facts["batch_size_mean"] == 13 / 4
    assert facts["measured_accuracy"] is None
    assert facts["send_lag_ms"]["max"] == 45
    assert facts["codes"]["OK"] == 4
    assert {"code": "OK", "slo_met": True, "floor_met": None, "requests": 4} in facts["outcomes"]
    assert [(name, each["answers"], each["slo_met"]) for name, each in facts["variants"].items()] == [
        ("fp32", 3, 2), ("int8", 1, 1),
    ]  # fmt: skip
    assert facts["errors"].keys() == set(facts["codes"]) - {"OK"}


def test_percentiles_are_values_that_occurred() -> None:
    """By nearest rank: of 1 to 1000 ms, p50 is the 500th, p99.9 the 999th."""
    facts = summary([Ended(answer(ms), met=True, parameters={}) for ms in range(1, 1001)], 1)
    assert facts["latency_ms"] == {"p50": 500, "p95": 950, "p99": 990, "p99.9": 999, "max": 1000}


@pytest.mark.parametrize(("slo_met", "met"), [(True, True), (False, False)])
def test_without_a_latency_the_server_judges(slo_met: bool, met: bool) -> None:
    """Whoever asked for no latency has no limit of its own to measure against."""
    assert read(Planned(0, b"", b""), answer(10**6, slo_met=slo_met)).met is met


@pytest.mark.parametrize(
    ("datatype", "output", "labels", "right"),
    [
        ("FP32", [[0.1, 0.9], [0.9, 0.1]], [1, 1], [True, False]),
        ("FP32", [0.1, 0.9], 1, [True]),
        ("INT64", [3, 4], [3, 3], [True, False]),
        ("INT64", [[3], [4]], [[3], [3]], [[True], [False]]),
        ("FP32", [[0.9], [0.1]], [0, 0], None),
        ("FP32", [[0.5], [0.5]], [0.25, 0.5], None),
        ("FP32", [0.5, 0.5], [1, 0], None),
        ("BYTES", [["a"], ["b"]], [1, 0], None),
    ],
    ids=["scores", "no batch", "classes", "classes in a column", "one score", "regression", "no class numbers", "text"],
)
def test_an_answer_is_right_where_it_can_be_compared(datatype: str, output: Any, labels: Any, right: Any) -> None:
    """Scores by their highest, class numbers as they are; anything else has no measured accuracy."""
    array = np.array(output, object if datatype == "BYTES" else None)
    array = array.astype({"FP32": np.float32, "INT64": np.int64}.get(datatype, object))
    response = pb.ModelInferResponse(raw_output_contents=[bytes(encode_raw(datatype, array))])
    response.outputs.add(name="y", datatype=datatype, shape=array.shape)
    got = read(Planned(0, b"", b"", labels=np.array(labels)), Answer(0, 0, 0, reply=response.SerializeToString())).right
    assert (None if got is None else got.tolist()) == right


def test_a_load_is_as_long_as_its_arrivals() -> None:
    """Each of them with the mean gap after it; whenever they were answered. At once, or alone, it has no length."""
    answers = [Answer(due * MS, due * MS, 10**12, UNANSWERED) for due in (5, 10, 25)]
    assert span_s(answers) == pytest.approx(0.030)
    assert span_s(answers[:1]) is span_s([answers[0]] * 2) is None


def test_a_row_that_no_message_holds_is_refused() -> None:
    """Before memory is taken for it, whether it is made up or the data's."""
    for arrival, data in ((Arrival(0, shape=((2**31,), (2,))), None), (Arrival(0, samples=2**31), DATA)):
        with pytest.raises(SettingsError, match="more than a message can hold"):
            plan([arrival], MODEL, data, 0)


def test_requests_that_no_memory_holds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 24 bytes where 1 KiB may be planned: 42 of them in all, but each only once."""
    monkeypatch.setattr("server.bench.requests.MAX_PLANNED_BYTES", 1 << 10)
    plan([Arrival(0, samples=40)] * 100, MODEL, DATA, 0)
    with pytest.raises(SettingsError, match=r"more than .* GiB together"):
        plan([Arrival(0, samples=40), Arrival(1, samples=3)], MODEL, DATA, 0)


def test_nothing_answered_is_a_dash_beside_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    """The live comparison has no latency and no accuracy to show then, and shows none."""
    live = summary([read(Planned(0, b"", b""), answer(1, "UNAVAILABLE"))], 1)
    row = compared(1, 1, live, {"attainment": 1.0, "mean_proven_accuracy": 0.5, "p99_ms": 2.0})
    show([row], header=False)
    assert capsys.readouterr().out == "| 1 | 1 | 0.0000 | 1.0000 | 100.00 | – | 0.5000 | – | 2.0 | 0.0 |\n"
