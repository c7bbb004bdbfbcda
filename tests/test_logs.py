"""Logs: one object or one line per record, whatever is in it."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from server import logs


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Give the root logger back as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_is_one_object_per_line_with_the_facts_of_the_call() -> None:
    """Time, level, logger, message, extra facts and the exception all sit in one line."""
    stream = io.StringIO()
    logs.set_up("json", "info", stream)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("server.app").exception("ready %s", "\x1b[31m", extra={"grpc": "127.0.0.1:8001"})
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert (record["level"], record["logger"], record["msg"]) == ("error", "server.app", "ready \x1b[31m")
    assert record["grpc"] == "127.0.0.1:8001"
    assert record["ts"].endswith("Z")
    assert "two\nlines" in record["exception"]


def test_a_console_line_cannot_be_split_or_steer_the_terminal() -> None:
    """Text from a client is shown escaped."""
    stream = io.StringIO()
    logs.set_up("console", "info", stream)
    logging.getLogger("server").info("model %s", "a\nINFO forged \x1b[31m", extra={"id": "b\r"})
    text = stream.getvalue()
    assert text.endswith("model a\\nINFO forged \\x1b[31m id=b\\x0d\n")
    assert text.count("\n") == 1


def test_auto_is_json_unless_a_person_looks() -> None:
    """A terminal gets lines, a pipe gets JSON."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    logs.set_up("auto", "info", terminal)
    logging.getLogger("server").info("hello")
    logs.set_up("auto", "info", pipe)
    logging.getLogger("server").info("hello")
    assert terminal.getvalue().rstrip().endswith("hello")
    assert json.loads(pipe.getvalue())["msg"] == "hello"


def test_the_level_is_obeyed() -> None:
    """Debug lines appear only when asked for."""
    stream = io.StringIO()
    logs.set_up("json", "info", stream)
    logging.getLogger("server").debug("quiet")
    assert stream.getvalue() == ""
