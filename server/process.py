"""`gearshift serve` as a process: its signals, its log line that says ready, its exit codes.

Rules: a signal before anything is served ends it at once; later ones drain. Nothing here knows how a server is made.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from queue import SimpleQueue

from server import logs
from server.app import Server, StartError
from server.settings import Settings
from variants.model_config import RepositoryError

log = logging.getLogger(__name__)

_SWITCH_INTERVAL_S = 0.0005
"""How long a Python thread may hold on while another waits: an executor that returns must not wait 5 ms."""


def serve(settings: Settings) -> int:
    """`gearshift serve`: run until a signal; returns the exit code."""
    logs.set_up(settings.log_format, settings.log_level)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _on_signal(lambda: sys.exit(0))  # as long as there is nothing to drain
    asked_to_stop: SimpleQueue[None] = SimpleQueue()  # the one way out of a signal handler that cannot deadlock
    try:
        server = Server(settings)
        server.load_models()
        _on_signal(lambda: asked_to_stop.put(None))
        grpc_port, http_port = server.start()
    except (StartError, RepositoryError) as error:
        print(f"gearshift: {error}", file=sys.stderr)  # noqa: T201 - the promised one line
        return 2
    host = f"[{settings.host.strip('[]')}]" if ":" in settings.host else settings.host
    scheme = "https" if settings.tls_cert else "http"
    log.info("ready: gRPC on %s:%d, HTTP on %s://%s:%d", host, grpc_port, scheme, host, http_port)
    asked_to_stop.get()
    log.info("draining for at most %g s", settings.drain_seconds)
    drained = server.stop()
    log.info("drained" if drained else "stopped with unanswered work")
    if threading.active_count() > 1:  # one that is inside a runtime cannot be ended, and a normal exit aborts under it
        logging.shutdown()
        os._exit(0)
    return 0


def _on_signal(act: Callable[[], object]) -> None:
    """What SIGTERM and SIGINT do from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: act())
