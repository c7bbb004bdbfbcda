"""`--record-trace`: one JSON line per ended request, enough to see and replay the arrivals, never a payload.

Rules of this file: a listener, so it only formats and writes to a buffer; lines come in the order in which requests
end, and `arrival_ns` counts from the recorder's start; a disk that fails ends the recording, not the serving.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from threading import Lock

from server.events import Event, RequestEnded
from server.scheduling.slo import Slo

log = logging.getLogger(__name__)


class TraceRecorder:
    """Appends to a file until `close`."""

    def __init__(self, path: Path, clock_ns: Callable[[], int]) -> None:
        """Open the file for appending; `clock_ns` is the events' clock. Raises OSError if it cannot be written."""
        self._file = path.open("a", encoding="utf-8")
        self._start_ns = clock_ns()
        self._lock = Lock()
        self._ended = False

    def __call__(self, event: Event) -> None:
        """Write one line for a request that ended."""
        if not isinstance(event, RequestEnded):
            return
        line = {
            "arrival_ns": event.arrival_ns - self._start_ns,
            "model": event.model[:128],  # a client may have named anything
            "version": event.version[:32],
            "samples": event.samples,
            "slo": _said(event.slo),
            "budget_ns": event.budget_ns,
            "variant": event.variant,
            "outcome": event.outcome,
            "slo_met": event.slo_met,
            "total_ns": event.total_ns,
        }
        with self._lock:
            if self._ended:
                return
            try:
                self._file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._ended = True
                log.error("recording the trace stopped: %s", error)

    def close(self) -> None:
        """Write what is buffered and stop; idempotent."""
        with self._lock:
            self._ended = True
            try:
                self._file.close()
            except OSError as error:
                log.error("the end of the trace is lost: %s", error)


def _said(slo: Slo | None) -> dict[str, object]:
    """What a request asked, without what it left open."""
    return {} if slo is None else {key: value for key, value in asdict(slo).items() if value is not None}
