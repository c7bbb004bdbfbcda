"""A trace: which requests arrived when, and what each asked. Written by `--record-trace`, read by what replays it.

Rules of this file: never a payload. The recorder is a listener, so it only formats and writes to a buffer; its lines
come in the order in which requests end, and a disk that fails ends the recording, not the serving. A line keeps what a
request asked apart from what it got by default, so that a replay asks the same again.
"""

from __future__ import annotations

import json
import logging
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from server.events import Event, RequestEnded
from server.scheduling.slo import OnInfeasible, Outcome, Slo
from server.wire.parameters import MAX_DURATION_NS, MAX_NAME, MAX_PRIORITY
from server.wire.tensors import MAX_RANK

log = logging.getLogger(__name__)

_NO_SLO = Slo()
_UNITS_NS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_OFFSET_WORDS = frozenset({"time", "timestamp", "offset", "arrival"})
MAX_SAMPLES = MAX_DIMENSION = 2**31


class TraceError(ValueError):
    """A file that is no trace, or a trace that cannot be used so; the text is for a person."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request of a trace: when it arrived, counted from the trace's first, and what it asked.

    `timeout_ns` is the time it had left by its gRPC deadline or `timeout` parameter, None where it had neither; the
    latency in `slo` is that of its own parameter. `model` is empty and `shape` (of each input, without the batch) None
    where the trace does not say; `version` is empty where none was asked for.
    """

    at_ns: int
    slo: Slo = _NO_SLO
    model: str = ""
    version: str = ""
    samples: int = 1
    timeout_ns: int | None = None
    shape: tuple[tuple[int, ...], ...] | None = None

    @property
    def latency_ns(self) -> int | None:
        """The smallest latency asked, however it was asked; None where the defaults apply."""
        return min((asked for asked in (self.slo.latency_ns, self.timeout_ns) if asked is not None), default=None)


class TraceRecorder:
    """Appends to a file until `close`: one line that says when the recording began, then one per ended request."""

    def __init__(self, path: Path, clock_ns: Callable[[], int], wall_ns: Callable[[], int] = time.time_ns) -> None:
        """Open the file for appending; `clock_ns` is the events' clock. Raises OSError if it cannot be written."""
        self._file = path.open("a", encoding="utf-8")
        self._start_ns = clock_ns()
        self._lock = Lock()
        self._ended = False
        self._write({"started_unix_ns": wall_ns()})

    def __call__(self, event: Event) -> None:
        """Write one line for a request that ended."""
        if not isinstance(event, RequestEnded):
            return
        self._write(
            {
                "arrival_ns": event.arrival_ns - self._start_ns,
                "model": event.model[:128],  # a client may have named anything
                "version": event.version[:32],
                "asked_version": event.asked_version[:32],
                "samples": event.samples,
                "shape": event.shape,
                "slo": _said(event.slo),
                "timeout_ns": event.timeout_ns,
                "budget_ns": event.budget_ns,
                "variant": event.variant,
                "outcome": event.outcome,
                "slo_met": event.slo_met,
                "total_ns": event.total_ns,
            }
        )

    def close(self) -> None:
        """Write what is buffered and stop; idempotent."""
        with self._lock:
            self._ended = True
            try:
                self._file.close()
            except OSError as error:
                log.error("the end of the trace is lost: %s", error)

    def _write(self, line: dict[str, object]) -> None:
        with self._lock:
            if self._ended:
                return
            try:
                self._file.write(json.dumps(line) + "\n")
            except OSError as error:
                self._ended = True
                log.error("recording the trace stopped: %s", error)


def _said(slo: Slo | None) -> dict[str, object] | None:
    """What a request asked, without what it left open; None for a request that was never read."""
    return None if slo is None else {key: value for key, value in asdict(slo).items() if value is not None}


def _each_once(choices: tuple[OnInfeasible, ...]) -> tuple[OnInfeasible, ...]:
    if len(set(choices)) < len(choices):
        raise ValueError("lists a choice twice")
    return choices


_Instant = Annotated[int, Field(ge=-MAX_DURATION_NS, le=MAX_DURATION_NS)]
_Fraction = Annotated[float, Field(ge=0, le=1)]
_Dimension = Annotated[int, Field(ge=0, le=MAX_DIMENSION)]
_Shape = Annotated[tuple[_Dimension, ...], Field(max_length=MAX_RANK)]


class _Started(BaseModel):
    """The first line of a recording."""

    model_config = ConfigDict(extra="forbid", strict=True)
    started_unix_ns: _Instant


class _Asked(BaseModel):
    """An `Slo` as a request can ask it: the ranges are those of the request parameters."""

    model_config = ConfigDict(extra="forbid", strict=True)
    latency_ns: Annotated[int, Field(ge=1, le=MAX_DURATION_NS)] | None = None
    min_accuracy: _Fraction | None = None
    max_accuracy_drop: _Fraction | None = None
    hard: bool | None = None
    on_infeasible: Annotated[tuple[OnInfeasible, ...], Field(min_length=1), AfterValidator(_each_once)] | None = None
    variant: Annotated[str, Field(min_length=1, max_length=MAX_NAME)] | None = None
    priority: Annotated[int, Field(ge=0, le=MAX_PRIORITY)] = 0


class _Recorded(BaseModel):
    """A recorded line; a misspelt key would silently ask for nothing. How it ended is for those who read the file."""

    model_config = ConfigDict(extra="forbid", strict=True)
    arrival_ns: _Instant
    model: str
    version: str = ""
    asked_version: str = ""
    samples: Annotated[int, Field(ge=0, le=MAX_SAMPLES)]
    shape: tuple[_Shape, ...] | None = None
    slo: _Asked | None
    timeout_ns: int | None = None
    budget_ns: int | None = None
    variant: str = "none"
    outcome: Outcome = Outcome.OK
    slo_met: bool | None = None
    total_ns: int = 0


def read_trace(path: Path) -> list[Arrival]:
    """The arrivals of a trace, by time. Raises TraceError for a file that is none, naming the line.

    The file is a recording (JSON lines), or offsets in seconds: one per line, or a CSV file whose header names the
    column by no other words than time, timestamp, offset and arrival, and the unit by an ending such as `_ms`; an only
    column may have any name. Blank lines and lines that start with # are skipped. What was recorded of a request that
    was never read, such as an invalid one, cannot be replayed and is left out, with a warning that says how many.
    Several recordings in one file follow one another as they did in time.
    """
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TraceError(f"{path}: cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip() and line[0] != "#"]
    recorded = bool(lines) and lines[0][1].startswith("{")
    arrivals = _recordings(path, lines) if recorded else _offsets(path, lines)
    if not arrivals:
        raise TraceError(f"{path}: holds no request that can be replayed")
    first_ns = min(arrival.at_ns for arrival in arrivals)
    return sorted(
        (replace(arrival, at_ns=arrival.at_ns - first_ns) for arrival in arrivals), key=lambda each: each.at_ns
    )


def _recordings(path: Path, lines: Sequence[tuple[int, str]]) -> list[Arrival]:
    arrivals: list[Arrival] = []
    origin_ns = 0
    for number, text in lines:
        try:
            if '"started_unix_ns"' in text:
                origin_ns = _Started.model_validate_json(text).started_unix_ns
                continue
            line = _Recorded.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise TraceError(f"{path}: line {number}: {where + ': ' if where else ''}{first['msg']}") from None
        if line.slo is not None and not line.samples:
            raise TraceError(f"{path}: line {number}: samples: a request that was read has at least 1")
        if line.slo is not None:
            arrivals.append(_arrival(line, line.slo, origin_ns))
    unread = sum('"arrival_ns"' in text for _, text in lines) - len(arrivals)
    if unread:
        log.warning("%s: %d recorded requests were never read by the server and are left out", path, unread)
    return arrivals


def _arrival(line: _Recorded, asked: _Asked, origin_ns: int) -> Arrival:
    """The request as it is to be made again; a deadline that had passed on arrival is a nanosecond away."""
    return Arrival(
        at_ns=origin_ns + line.arrival_ns,
        slo=Slo(**dict(asked)),
        model=line.model,
        version=line.asked_version,
        samples=line.samples,
        timeout_ns=None if line.timeout_ns is None else min(max(1, line.timeout_ns), MAX_DURATION_NS),
        shape=line.shape,
    )


def _offsets(path: Path, lines: Sequence[tuple[int, str]]) -> list[Arrival]:
    rows = [(number, [cell.strip(' \t\r"') for cell in text.split(",")]) for number, text in lines]
    column, unit_ns = 0, _UNITS_NS["s"]
    if rows and _number(rows[0][1][0]) is None:
        number, header = rows.pop(0)
        column, unit_ns = _column(f"{path}: line {number}", header)
    arrivals = []
    for number, cells in rows:
        offset = _number(cells[column]) if column < len(cells) else None
        if offset is None:
            raise TraceError(f"{path}: line {number}: {','.join(cells)!r:.80} has no offset in column {column + 1}")
        if not abs(offset * unit_ns) <= MAX_DURATION_NS:
            raise TraceError(f"{path}: line {number}: {offset:g} is out of range; is it in another unit?")
        arrivals.append(Arrival(round(offset * unit_ns)))
    return arrivals


def _column(where: str, header: Sequence[str]) -> tuple[int, int]:
    """Which column holds the offsets, and the nanoseconds of its unit. Raises TraceError rather than guess."""
    words = [re.findall(r"[a-z0-9]+", name.lower()) for name in header]
    column = next((at for at, said in enumerate(words) if _names_offsets(said)), None if len(words) > 1 else 0)
    if column is None:
        raise TraceError(f"{where}: no column is named time, timestamp, offset or arrival; name the one that counts so")
    unit = words[column][-1] if words[column] else "s"
    return column, _UNITS_NS.get(unit, _UNITS_NS["s"])


def _names_offsets(words: Sequence[str]) -> bool:
    """Whether these are the words of an offset and, at most, a unit after them: `arrival_ms`, not `service_time`."""
    said = words[:-1] if words and words[-1] in _UNITS_NS else words
    return bool(said) and _OFFSET_WORDS.issuperset(said)


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def mean_rate(arrivals: Sequence[Arrival]) -> float:
    """Arrivals per second between the first and the last. Raises TraceError where they span no time."""
    span_ns = arrivals[-1].at_ns - arrivals[0].at_ns if arrivals else 0
    if not span_ns:
        raise TraceError("a rate needs at least two arrivals at different times")
    return (len(arrivals) - 1) * 1e9 / span_ns


def rescaled(arrivals: Sequence[Arrival], rate_per_s: float) -> list[Arrival]:
    """The trace in other time: stretched or compressed to this mean rate, its pattern kept.

    Raises as `mean_rate`, and for a rate so low that the trace would never end.
    """
    factor = mean_rate(arrivals) / rate_per_s
    if not arrivals[-1].at_ns * factor <= MAX_DURATION_NS:
        raise TraceError(f"a rate of {rate_per_s:g}/s would stretch the trace beyond a hundred years")
    return [replace(arrival, at_ns=round(arrival.at_ns * factor)) for arrival in arrivals]


def cut(arrivals: Sequence[Arrival], seconds: float) -> list[Arrival]:
    """The arrivals of the trace's first so many seconds."""
    return [arrival for arrival in arrivals if arrival.at_ns < seconds * 1e9]
