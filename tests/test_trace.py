"""The recorded trace: a line per request, with when it arrived and how it ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from server.events import BatchRan, Decided, RequestEnded
from server.scheduling.slo import Outcome, Slo
from server.trace import TraceRecorder

ASKED = Slo(latency_ns=5_000, hard=False)
ENDED = RequestEnded(
    "digits", "3", "fp32", Outcome.LATE, "late", 2, ASKED, 5_000, False, 1_000_500, 7_000, 1_000, 5_000, 0.98
)


def test_a_request_is_one_line_and_other_events_are_none(tmp_path: Path) -> None:
    """The arrival counts from the recorder's start, the SLO holds what was asked; a restart appends."""
    path = tmp_path / "trace.jsonl"
    clock = iter([1_000_000, 1_000_100])
    for _ in range(2):
        recorder = TraceRecorder(path, lambda: next(clock))
        recorder(BatchRan("digits", "3", "fp32", 0, 1, 2, "late", 5_000, 5_000, False))
        recorder(Decided("digits", 10))
        recorder(ENDED)
        recorder.close()
    first, second = [json.loads(line) for line in path.read_text().splitlines()]
    assert first == {
        "arrival_ns": 500, "model": "digits", "version": "3", "samples": 2, "variant": "fp32",
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
