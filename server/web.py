"""The HTTP port: /metrics for Prometheus, / for people, /healthz and /readyz for whatever restarts and routes.

Rules of this file: read only, GET and HEAD; a bounded number of connections, each ended after a fixed time, however
slowly its client talks, and whoever has yet to say what it wants makes way for a newcomer; no asset from elsewhere.
Where tokens are in use, /metrics and / ask for one of scope `stats` as `Authorization: Bearer TOKEN`; the two probes
never do, since kubelets cannot send one.
"""

from __future__ import annotations

import contextlib
import gzip
import logging
import socket
import socketserver
import ssl
import threading
from collections.abc import Mapping
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder, gzip_accepted

from server.errors import PermissionDenied, Unauthenticated
from server.security import Authorizer, Scope
from server.status import Recent, StatusSource
from server.status_page import render

TEXT = "text/plain; charset=utf-8"
PROBES = frozenset({"/healthz", "/readyz"})
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}

_GOING_S = 1.0
"""What a connection that was cut may take to be gone."""

log = logging.getLogger(__name__)


class Page(NamedTuple):
    """One answer; `headers` are those beyond type and length."""

    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = {}


class Limits(NamedTuple):
    """How many connections at a time, and how long one may take."""

    connections: int = 32
    seconds: float = 10.0


class Site:
    """The pages themselves, apart from how they are carried: a path and its headers in, a page out."""

    def __init__(
        self, registry: CollectorRegistry, source: StatusSource, recent: Recent, authorizer: Authorizer | None
    ) -> None:
        self._registry = registry
        self._source = source
        self._recent = recent
        self._authorizer = authorizer

    def page(self, path: str, headers: Mapping[str, str], credentials: list[str]) -> Page:
        """Answer one request."""
        handlers = {"/": self._status, "/metrics": self._metrics, "/healthz": self._healthz, "/readyz": self._readyz}
        handler = handlers.get(path)
        if handler is None:
            return _text(HTTPStatus.NOT_FOUND, "not found; there are /, /metrics, /healthz and /readyz")
        if self._authorizer and path not in PROBES:
            try:
                self._authorizer.check_scope(Scope.STATS, [*credentials])
            except Unauthenticated as error:
                return _text(HTTPStatus.UNAUTHORIZED, str(error), {"WWW-Authenticate": "Bearer"})
            except PermissionDenied as error:
                return _text(HTTPStatus.FORBIDDEN, str(error))
        return handler(headers)

    def _status(self, _: Mapping[str, str]) -> Page:
        page = render(self._source(), self._recent)
        return Page(HTTPStatus.OK, "text/html; charset=utf-8", page.encode("utf-8"))

    def _metrics(self, headers: Mapping[str, str]) -> Page:
        encode, content_type = choose_encoder(headers.get("accept", ""))
        body, more = encode(self._registry), {"Vary": "Accept, Accept-Encoding"}
        if gzip_accepted(headers.get("accept-encoding", "")):
            body, more = gzip.compress(body, compresslevel=1), more | {"Content-Encoding": "gzip"}
        return Page(HTTPStatus.OK, content_type, body, more)

    def _healthz(self, _: Mapping[str, str]) -> Page:
        if self._source().live:
            return _text(HTTPStatus.OK, "live")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, "not live")

    def _readyz(self, _: Mapping[str, str]) -> Page:
        status = self._source()
        if status.ready:
            return _text(HTTPStatus.OK, "ready")
        return _text(HTTPStatus.SERVICE_UNAVAILABLE, f"not ready: {status.reason}")


def tls_context(certificate: Path, key: Path) -> ssl.SSLContext:
    """TLS with the certificate of the gRPC port. Raises OSError or ssl.SSLError for files that do not fit together."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


class WebServer:
    """Carries a site over HTTP, or HTTPS, from threads of its own between `start` and `stop`."""

    def __init__(
        self, address: tuple[str, int], site: Site, tls: ssl.SSLContext | None = None, limits: Limits | None = None
    ) -> None:
        """Prepare; nothing is bound yet. The address is a host and a port; a port of 0 picks a free one."""
        self._make = partial(_Server, (address[0].strip("[]"), address[1]), site, tls, limits or Limits())
        self._server: _Server | None = None

    def start(self) -> int:
        """Bind and answer; returns the bound port. Raises OSError if the address cannot be bound."""
        self._server = self._make()
        threading.Thread(target=self._server.serve_forever, args=(0.1,), name="http", daemon=True).start()
        return int(self._server.server_address[1])

    def stop(self) -> None:
        """Stop answering and close the port; idempotent."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()
            self._server = None


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], site: Site, tls: ssl.SSLContext | None, limits: Limits) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self.site = site
        self._tls = tls
        self._free = threading.BoundedSemaphore(limits.connections)
        self._unheard: dict[socket.socket, None] = {}  # connections without a request as yet, oldest first
        self._lock = threading.Lock()
        self._seconds = limits.seconds
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Bind without asking DNS for this host's name, as the parent would: that can take seconds."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept; a TLS handshake waits for the connection's own thread."""
        connection, address = super().get_request()
        if self._tls:
            connection = self._tls.wrap_socket(connection, server_side=True, do_handshake_on_connect=False)
        return connection, address

    def process_request(self, request: Any, client_address: Any) -> None:
        """Start the connection's thread; when there are too many, the oldest silent one goes, or else this one."""
        if self._free.acquire(blocking=False) or (self._cut_oldest_unheard() and self._free.acquire(timeout=_GOING_S)):
            with self._lock:
                self._unheard[request] = None
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def heard(self, connection: socket.socket) -> None:
        """A connection has said what it wants, or has ended."""
        with self._lock:
            self._unheard.pop(connection, None)

    def _cut_oldest_unheard(self) -> bool:
        with self._lock:
            oldest = next(iter(self._unheard), None)
            if oldest is None:
                return False
            del self._unheard[oldest]
        _cut(oldest)
        return True

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection for at most the allowed time, then cut it."""
        limit = threading.Timer(self._seconds, _cut, [request])
        limit.daemon = True
        limit.start()
        try:
            super().process_request_thread(request, client_address)
        finally:
            limit.cancel()
            self.heard(request)
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002 - the parent's signature
        """A client that went away or talked nonsense is no news."""
        log.debug("http connection failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    server_version = "gearshift"
    sys_version = ""

    def do_GET(self) -> None:
        """Answer with headers and body."""
        self.wfile.write(self._answer())

    def do_HEAD(self) -> None:
        """Answer with the headers that GET would send."""
        self._answer()

    def _answer(self) -> bytes:
        self.server.heard(self.connection)
        headers = {key.lower(): value for key, value in self.headers.items()}
        try:
            page = self.server.site.page(urlsplit(self.path).path, headers, self.headers.get_all("authorization") or [])
        except Exception:
            log.exception("the page %r failed", self.path)
            page = _text(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error; the log explains")
        self.send_response(page.status)
        about = {"Content-Type": page.content_type, "Content-Length": str(len(page.body))}
        for name, value in (about | HEADERS | dict(page.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        return page.body

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
        """Keep scrapes out of the log unless someone debugs."""
        log.debug("http " + format, *args)


def _text(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Page:
    return Page(status, TEXT, f"{text}\n".encode(), headers or {})


def _cut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
