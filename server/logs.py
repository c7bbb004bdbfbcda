"""Logging set up once: lines for a person on a terminal, one JSON object per line everywhere else.

Rules of this file: logs go to standard error; no record holds a tensor; text that clients sent may be in a message,
so control characters never reach a terminal or split a line.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal, TextIO

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_CONTROL = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


def set_up(form: Literal["auto", "console", "json"], level: str, stream: TextIO | None = None) -> None:
    """Send every logger's records to `stream` (standard error) in this form from now on; replaces earlier set-ups."""
    stream = stream or sys.stderr
    console = form == "console" or (form == "auto" and stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(ConsoleFormatter() if console else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())


class ConsoleFormatter(logging.Formatter):
    """`12:00:01 INFO text key=value …`."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(message)s", "%H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - the parent's name
        """One line: what would break it or steer the terminal is shown escaped."""
        facts = "".join(f" {key}={value}" for key, value in _facts(record).items())
        return (super().formatMessage(record) + facts).replace("\n", "\\n").translate(_CONTROL)


class JsonFormatter(logging.Formatter):
    """`{"ts": …, "level": …, "logger": …, "msg": …}` and whatever the call gave as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """One JSON object on one line; the time is RFC 3339 in UTC."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, object] = {
            "ts": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "msg": record.getMessage(),
        }
        line |= _facts(record)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _facts(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}
