"""The trace: a line per request, with when it arrived, what it asked and how it ended; and what is read of it again."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from server.events import BatchRan, Decided, RequestEnded
from server.scheduling.slo import OnInfeasible, Outcome, Slo
from server.trace import Arrival, TraceError, TraceRecorder, cut, mean_rate, read_trace, rescaled

ASKED = Slo(latency_ns=5_000, hard=False)
ENDED = RequestEnded(
    "digits", "3", "fp32", Outcome.LATE, "late", 2, ASKED, 5_000, False, 1_000_500, 7_000, 1_000, 5_000, 0.98
)


def test_a_request_is_one_line_and_other_events_are_none(tmp_path: Path) -> None:
    """The arrival counts from the recorder's start, the SLO holds what was asked; a restart appends and says when."""
    path = tmp_path / "trace.jsonl"
    clock = iter([1_000_000, 1_000_100])
    for _ in range(2):
        recorder = TraceRecorder(path, lambda: next(clock), lambda: 77)
        recorder(BatchRan("digits", "3", "fp32", 0, 1, 2, "late", 5_000, 5_000, False))
        recorder(Decided("digits", 10))
        recorder(ENDED)
        recorder.close()
    started, first, again, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert started == again == {"started_unix_ns": 77}
    assert first == {
        "arrival_ns": 500, "model": "digits", "version": "3", "samples": 2, "variant": "fp32",
        "asked_version": "", "shape": None, "timeout_ns": None,
        "slo": {"latency_ns": 5_000, "hard": False, "priority": 0}, "budget_ns": 5_000,
        "outcome": "late", "slo_met": False, "total_ns": 7_000,
    }  # fmt: skip
    assert second["arrival_ns"] == 400


def test_a_failing_file_ends_the_recording_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The listener never raises; the log says once what happened. The file is a pipe that nobody reads any more."""
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    recorder = TraceRecorder(tmp_path / "pipe", lambda: 0)
    os.close(reader)
    for _ in range(1000):
        recorder(ENDED)
    recorder.close()
    recorder(ENDED)
    assert caplog.text.count("recording the trace stopped") == 1


ASKING_ALL = Slo(7, 0.25, 0.5, True, (OnInfeasible.LATE, OnInfeasible.DEGRADE), "int8-static", 3)


def record(path: Path, *events: RequestEnded, start_ns: int = 0, wall_ns: int = 0) -> Path:
    """A recording of these events."""
    recorder = TraceRecorder(path, lambda: start_ns, lambda: wall_ns)
    for event in events:
        recorder(event)
    recorder.close()
    return path


def test_what_is_recorded_is_read_again(tmp_path: Path) -> None:
    """Every arrival comes back with all it asked, by time and from the first on, whatever the order of the ends."""
    late = replace(ENDED, arrival_ns=900, slo=ASKING_ALL, timeout_ns=12, asked_version="2", shape=((1, 32), ()))
    early = replace(ENDED, arrival_ns=500, slo=Slo(), samples=1, outcome=Outcome.CANCELLED)
    assert read_trace(record(tmp_path / "t", late, early)) == [
        Arrival(0, Slo(), "digits", "", 1),
        Arrival(400, ASKING_ALL, "digits", "2", 2, 12, ((1, 32), ())),
    ]


def test_what_was_never_read_is_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """An invalid request asked nothing that could be asked again; nothing but those is no trace."""
    invalid = replace(ENDED, slo=None, outcome=Outcome.INVALID)
    assert len(read_trace(record(tmp_path / "t", ENDED, invalid, invalid))) == 1
    assert "2 recorded requests" in caplog.text
    with pytest.raises(TraceError, match="no request that can be replayed"):
        read_trace(record(tmp_path / "u", invalid))


def test_a_second_recording_follows_the_first(tmp_path: Path) -> None:
    """A restarted server counts from its own start; the trace keeps the time between the two."""
    for wall_ns, arrival_ns in ((1_000, 10), (5_000, 1)):
        record(tmp_path / "t", replace(ENDED, arrival_ns=arrival_ns), wall_ns=wall_ns)
    assert [arrival.at_ns for arrival in read_trace(tmp_path / "t")] == [0, 5_001 - 1_010]


@pytest.mark.parametrize(
    ("text", "expected_ms"),
    [
        ("0\n0.5\n0.002\n", [0, 2, 500]),
        ("# where it is from\n\noffset_s\n10\n10.25\n", [0, 250]),
        ("user,arrival_ms\nann,3\nbob,1\n", [0, 2]),
        ('"Time","n"\r\n"1.5","2"\r\n1.75,9\r\n', [0, 250]),
        ("start_time_ms\n1\n3\n", [0, 2]),
        ("\ufeff1\n3\n", [0, 2000]),
        ("\ufeffoffset\n1\n3\n", [0, 2000]),
        ("runtime_ms,service_time_ms,Arrival time (ms)\n9,7,1\n9,9,3\n", [0, 2]),
        ("timeouts,Timestamp\n9,1\n8,2\n", [0, 1000]),
    ],
    ids=[
        *("plain", "comments", "named column and unit", "quoted", "only column", "byte order mark"),
        *("byte order mark before a name", "whole words", "no part of a word"),
    ],
)
def test_offsets_are_read_as_arrivals_that_ask_nothing(tmp_path: Path, text: str, expected_ms: list[int]) -> None:
    """Seconds unless the header says otherwise, sorted, counted from the first."""
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_trace(tmp_path / "t.csv") == [Arrival(ms * 10**6) for ms in expected_ms]


def asked_line(**other: object) -> str:
    """A recorded line with some of it otherwise."""
    return json.dumps({"arrival_ns": 1, "model": "m", "samples": 1, "slo": {}} | other)


@pytest.mark.parametrize(("timeout_ns", "read_ns"), [(-5, 1), (0, 1), (7, 7), (2**70, 2**62), (None, None)])
def test_a_deadline_that_had_passed_is_replayed_as_the_shortest(
    tmp_path: Path, timeout_ns: int | None, read_ns: int | None
) -> None:
    """A recording may hold a negative one, which no request can ask again."""
    (tmp_path / "t").write_text(asked_line(timeout_ns=timeout_ns))
    assert read_trace(tmp_path / "t")[0].timeout_ns == read_ns


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no request"),
        ("offset\n1\nsoon\n", "line 3: 'soon' has no offset in column 1"),
        ("id,time\na,1\nb\n", "line 3: 'b' has no offset in column 2"),
        ("id,start_time_ms\n1,0\n2,40\n", "line 1: no column is named time"),
        ("1\nnan\n", "line 2"),
        ('{"arrival_ns": 1', "line 1: Invalid JSON"),
        ('{"started_unix_ns": 1}\n{"arrival_ns": 1, "model": "m", "slo": {}}', "line 2: samples: Field required"),
        ('{"arrival_ns": 1.5, "model": "m", "samples": 1, "slo": {}}', "line 1: arrival_ns: .* valid integer"),
        ('{"arrival_ns": 1, "model": "m", "samples": 1, "slo": {"latency": 1}}', "slo.latency: Extra"),
        ('{"arrival_ns": 1, "model": "m", "samples": 1, "slo": {"on_infeasible": ["x"]}}', "slo.on_infeasible.0: "),
        ("\xff", "cannot be read"),
        ("0\n1e300\n", "line 2: 1e\\+300 is out of range"),
        ("time_ns\n0\n5e18\n", "line 3: .* out of range"),
        (asked_line(samples=0), "line 1: samples: "),
        (asked_line(samples=10**12), "line 1: samples: "),
        (asked_line(arrival_ns=2**63), "line 1: arrival_ns: "),
        (asked_line(shape=[[-1]]), "line 1: shape.0.0: "),
        (asked_line(shape=[[1] * 9]), "line 1: shape.0: "),
        (asked_line(slo={"priority": 10**20}), "line 1: slo.priority: "),
        (asked_line(slo={"latency_ns": -5}), "line 1: slo.latency_ns: "),
        (asked_line(slo={"latency_ns": 0}), "line 1: slo.latency_ns: "),
        (asked_line(slo={"min_accuracy": 7.0}), "line 1: slo.min_accuracy: "),
        (asked_line(slo={"max_accuracy_drop": -0.1}), "line 1: slo.max_accuracy_drop: "),
        (asked_line(slo={"variant": ""}), "line 1: slo.variant: "),
        (asked_line(slo={"on_infeasible": ["late", "late"]}), "line 1: slo.on_infeasible: "),
    ],
)  # fmt: skip
def test_a_bad_file_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    """One sentence names the file, the line and what is wrong there."""
    (tmp_path / "t").write_bytes(text.encode("latin-1"))
    with pytest.raises(TraceError, match=told) as raised:
        read_trace(tmp_path / "t")
    assert str(raised.value).startswith(str(tmp_path / "t"))
    assert "\n" not in str(raised.value)


def test_rescaling_keeps_the_pattern_and_cutting_the_start() -> None:
    """Gaps keep their proportions at the new mean rate; a cut holds what arrived before its end."""
    trace = [Arrival(at_ns, ASKING_ALL) for at_ns in (0, 10**9, 4 * 10**9)]
    assert mean_rate(trace) == 0.5
    faster = rescaled(trace, 50)
    assert [arrival.at_ns for arrival in faster] == [0, 10**7, 4 * 10**7]
    assert mean_rate(faster) == 50
    assert {arrival.slo for arrival in faster} == {ASKING_ALL}
    assert cut(trace, 4) == trace[:2]
    with pytest.raises(TraceError, match="two arrivals"):
        rescaled(trace[:1], 50)
    for rate in (1e-12, 5e-324):
        with pytest.raises(TraceError, match="a hundred years"):
            rescaled(trace, rate)


@pytest.mark.parametrize(
    ("latency_ns", "timeout_ns", "least"), [(None, None, None), (5, None, 5), (None, 4, 4), (5, 4, 4)]
)
def test_the_smallest_latency_counts(latency_ns: int | None, timeout_ns: int | None, least: int | None) -> None:
    """Whether it was asked as a parameter or as a deadline."""
    assert Arrival(0, Slo(latency_ns), timeout_ns=timeout_ns).latency_ns == least
