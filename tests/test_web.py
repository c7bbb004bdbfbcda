"""The HTTP port: a real server on a free port, asked with a real client."""

from __future__ import annotations

import gzip
import http.client
import re
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from server.events import BatchRan, PassedOver, RequestEnded
from server.metrics import Metrics, ModelLoad
from server.scheduling.slo import Outcome
from server.security import Authorizer, Scope
from server.status import ModelStatus, Recent, ServerStatus
from server.status_page import render
from server.web import Limits, Site, WebServer, tls_context
from variants.variant import Interval, LatencyProfile, State, Variant

FP32 = Variant(
    "fp32", State.ELIGIBLE, "", "fp32", "onnxruntime", "cpu", score=Interval(0.9812, 0.96, 0.99),
    profile=LatencyProfile((1, 8), (2_000_000, 8_000_000)), size_bytes=3 << 20,
)  # fmt: skip
INT8 = Variant("int8-dynamic", State.UNVERIFIED, "no evaluation data", "int8", "onnxruntime", "cpu")
READY = ServerStatus(
    live=True, ready=True, reason="", executors=2, busy_executors=1, hardware="2 cores",
    models=(ModelStatus("digits", "3", (FP32, INT8), ModelLoad(5, 2048, 7, 0.25)),), failed={"broken": "no such file"},
)  # fmt: skip


class Server:
    """A web server whose status the test sets, and a client for it."""

    def __init__(self, authorizer: Authorizer | None = None, tls: ssl.SSLContext | None = None) -> None:
        self.status = READY
        self.now_ns = 0
        self.recent = Recent(lambda: self.now_ns)
        self.registry = CollectorRegistry()
        Metrics(self.registry).add_model("digits", "3", [FP32, INT8])
        site = Site(self.registry, lambda: self.status, self.recent, authorizer)
        self.web = WebServer(("127.0.0.1", 0), site, tls, Limits(connections=4, seconds=5))
        self.port = self.web.start()

    def ask(self, path: str, method: str = "GET", **headers: str) -> http.client.HTTPResponse:
        """One request on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        connection.request(method, path, headers={key.replace("_", "-"): value for key, value in headers.items()})
        return connection.getresponse()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server without tokens."""
    server = Server()
    yield server
    server.web.stop()


def answered(variant: str, milliseconds: int) -> RequestEnded:
    """An answer of the digits model."""
    return RequestEnded(
        "digits", "3", variant, Outcome.OK, "fit", 1, None, None, True, 0, milliseconds * 1_000_000, 0, 0, None
    )


def test_metrics_come_in_the_text_format_and_in_openmetrics(server: Server) -> None:
    """The Accept header chooses, as Prometheus does."""
    plain = server.ask("/metrics")
    assert plain.status == 200
    assert plain.getheader("content-type", "").startswith("text/plain; version=0.0.4")
    assert b"# TYPE gearshift_requests_total counter" in plain.read()
    modern = server.ask("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert modern.getheader("content-type", "").startswith("application/openmetrics-text; version=1.0.0")
    assert modern.read().endswith(b"# EOF\n")


def test_metrics_are_compressed_for_those_who_ask(server: Server) -> None:
    """Prometheus asks for gzip on every scrape."""
    answer = server.ask("/metrics", accept_encoding="gzip")
    assert answer.getheader("content-encoding") == "gzip"
    assert gzip.decompress(answer.read()) == server.ask("/metrics").read()


def test_readiness_follows_the_server_and_liveness_does_not(server: Server) -> None:
    """Draining is not ready and yet alive, so nobody restarts a server that is finishing its work."""
    assert (server.ask("/healthz").status, server.ask("/readyz").status) == (200, 200)
    server.status = replace(READY, ready=False, reason="draining")
    assert server.ask("/healthz").status == 200
    refused = server.ask("/readyz")
    assert (refused.status, refused.read()) == (503, b"not ready: draining\n")
    server.status = replace(READY, live=False)
    assert server.ask("/healthz").status == 503


def test_head_sends_the_headers_of_get_and_no_body(server: Server) -> None:
    """HEAD is supported on every page."""
    for path in ("/", "/metrics", "/healthz", "/readyz", "/nowhere"):
        head, get = server.ask(path, "HEAD"), server.ask(path)
        assert head.status == get.status
        assert head.getheader("content-length") == str(len(get.read()))
        assert head.read() == b""


@pytest.mark.parametrize("path", ["/nowhere", "/metrics/", "/../etc/passwd", "/favicon.ico"])
def test_other_paths_are_not_found(path: str, server: Server) -> None:
    """There are four pages."""
    assert server.ask(path).status == 404


def test_a_query_does_not_change_the_page(server: Server) -> None:
    """Probes and scrapers may add one."""
    assert server.ask("/readyz?verbose=1").status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_nothing_can_be_changed_over_http(method: str, server: Server) -> None:
    """Only GET and HEAD exist."""
    assert server.ask("/", method).status == 501


def test_no_version_of_python_is_told(server: Server) -> None:
    """The Server header names the program only, and pages may load nothing."""
    answer = server.ask("/")
    assert answer.getheader("server", "").strip() == "gearshift"
    assert "default-src 'none'" in answer.getheader("content-security-policy", "")


def test_a_failing_page_is_a_500_that_tells_nothing(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The cause goes to the log and the next page works."""
    good = server.status
    server.status = None  # type: ignore[assignment]
    answer = server.ask("/")
    assert (answer.status, answer.read()) == (500, b"internal error; the log explains\n")
    assert "AttributeError" in caplog.text
    server.status = good
    assert server.ask("/").status == 200


def test_a_slow_client_is_cut_off() -> None:
    """A connection that never completes its request ends by itself."""
    site = Site(CollectorRegistry(), lambda: READY, Recent(lambda: 0), None)
    web = WebServer(("127.0.0.1", 0), site, limits=Limits(connections=1, seconds=0.5))
    port = web.start()
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(b"GET / HTTP/1.1\r\nHost: ")
            assert slow.recv(1) == b""
    finally:
        web.stop()


def test_connections_that_say_nothing_make_way(server: Server) -> None:
    """As many silent connections as there may be, and then some, do not keep a probe from its answer."""
    silent = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(6)]
    assert server.ask("/healthz").status == 200
    assert silent[0].recv(1) == b""
    for connection in silent:
        connection.close()


def test_connections_that_are_being_answered_are_bounded() -> None:
    """One too many is closed at once while the others still wait for their page."""
    asked, answer = threading.Semaphore(0), threading.Event()

    def status() -> ServerStatus:
        asked.release()
        assert answer.wait(10)
        return READY

    site = Site(CollectorRegistry(), status, Recent(lambda: 0), None)
    web = WebServer(("127.0.0.1", 0), site, limits=Limits(connections=2, seconds=10))
    port = web.start()
    try:
        clients = [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(2)]
        for client in clients:
            client.sendall(b"GET /readyz HTTP/1.0\r\n\r\n")
            assert asked.acquire(timeout=10)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as extra:
            assert extra.recv(1) == b""
        answer.set()
        for client in clients:
            assert client.recv(12) == b"HTTP/1.0 200"
            client.close()
    finally:
        answer.set()
        web.stop()


def test_tokens_guard_pages_and_not_probes() -> None:
    """With tokens in use the page and the metrics need one of scope stats; kubelets still get their answer."""
    grants = [("watcher", frozenset({Scope.STATS})), ("user", frozenset({Scope.INFER}))]
    server = Server(Authorizer(grants))
    try:
        for path in ("/", "/metrics"):
            nobody = server.ask(path)
            assert (nobody.status, nobody.getheader("www-authenticate")) == (401, "Bearer")
            assert server.ask(path, authorization="Bearer nonsense").status == 401
            assert server.ask(path, authorization="Bearer user").status == 403
            assert server.ask(path, authorization="Bearer watcher").status == 200
        assert (server.ask("/healthz").status, server.ask("/readyz").status) == (200, 200)
    finally:
        server.web.stop()


def test_the_port_speaks_tls_when_told_to(certificates: Path) -> None:
    """With a certificate the pages come over HTTPS, and a client without TLS gets nothing."""
    server = Server(tls=tls_context(certificates / "server.pem", certificates / "server.key"))
    try:
        trust = ssl.create_default_context(cafile=certificates / "ca.pem")
        connection = http.client.HTTPSConnection("127.0.0.1", server.port, context=trust, timeout=10)
        connection.request("GET", "/readyz")
        assert connection.getresponse().read() == b"ready\n"
        connection.close()
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            server.ask("/readyz")
    finally:
        server.web.stop()


class Text(HTMLParser):
    """The rows of a page's tables as lists of cell texts; fails on tags that do not match."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in {"meta", "br"}:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page_shows_each_variant_with_its_figures(server: Server) -> None:
    """State, reason, interval, profiled latencies, throughput, share and percentiles; dashes where nothing is known."""
    for milliseconds in range(1, 101):
        server.recent(answered("fp32", milliseconds))
    rows = Text(server.ask("/").read().decode()).rows
    assert rows[1] == [
        "fp32", "eligible", "0.9812 [0.9600, 0.9900]", "2.00 ms", "8.00 ms", "–", "1,000/s", " 100%", "50.00 ms",
        "95.00 ms", "3.00 MiB", "fp32, onnxruntime, cpu", "–",
    ]  # fmt: skip
    assert rows[2] == [
        "int8-dynamic", "unverified", "–", "–", "–", "–", "–", " 0%", "–", "–", "–", "int8, onnxruntime, cpu",
        "no evaluation data",
    ]  # fmt: skip
    assert ["broken", "no such file"] in rows


def test_the_page_shows_load_and_recent_decisions(server: Server) -> None:
    """Queue, executors and what ran last, newest first."""
    for at_ns, variant in ((0, "fp32"), (1_500_000_000, "int8-dynamic")):
        server.now_ns = at_ns
        server.recent(BatchRan("digits", "3", variant, 1, 3, 8, "fit", 9_000_000, 8_000_000, variant == "fp32"))
    page = server.ask("/").read().decode()
    assert "1 of 2 executors busy" in page
    assert "queue 5 requests, 2.0 KiB · in flight 7 · saturation 25%" in page
    assert Text(page).rows[-2:] == [
        ["0.0 s ago", "digits 3", "int8-dynamic", "8 samples of 3 requests", "1", "9.00 ms", "8.00 ms", "fit", "–"],
        ["1.5 s ago", "digits 3", "fp32", "8 samples of 3 requests", "1", "failed", "8.00 ms", "fit", "–"],
    ]
    assert "<strong>9.00 ms</strong>" in page, "a prediction that was exceeded stands out"


def test_a_decision_says_what_every_more_accurate_variant_lacked(server: Server) -> None:
    """Time, samples or time of those behind, in words; other circumstances come first."""
    missing = (
        PassedOver("fp32", "slack", 3_100_000), PassedOver("amp", "batch", 1), PassedOver("int8", "drain", 12_340_000)
    )  # fmt: skip
    ran = BatchRan("digits", "3", "pruned", 0, 1, 1, "drain", 7_000_000, 8_000_000, False, missing)
    server.recent(ran)
    server.recent(replace(ran, reason="overload", passed_over=missing[:1]))
    server.recent(replace(ran, reason="best", passed_over=()))
    whys = [row[-1] for row in Text(server.ask("/").read().decode()).rows[-3:]]
    assert whys == [
        "the most accurate that was allowed",
        "not everyone could be in time, and this batch saves the most; fp32 was 3.10 ms short of being in time",
        (
            "fp32 was 3.10 ms short of being in time; amp was 1 sample short of a full batch; "
            "int8 would have made those behind 12.34 ms late"
        ),
    ]


def test_the_page_escapes_whatever_it_shows() -> None:
    """No name or reason becomes markup, and `$` in one does not become a template's field."""
    evil = "<script>$body"
    variant = Variant(evil, State.DISABLED, evil, evil, evil, evil)
    status = ServerStatus(
        True, False, evil, 1, 0, evil, (ModelStatus(evil, evil, (variant,), ModelLoad(0, 0, 0, 0.0)),), {evil: evil}
    )  # fmt: skip
    recent = Recent(lambda: 0)
    recent(BatchRan(evil, evil, evil, 0, 1, 1, evil, 1, 1, False, (PassedOver(evil, evil, 1),)))
    page = render(status, recent)
    assert "<script" not in page
    assert page.count("&lt;script&gt;$body") >= 10
    Text(page)


def test_the_page_needs_nothing_from_elsewhere(server: Server) -> None:
    """It has no script, image, font or style sheet to fetch; it refreshes itself and fits a phone and the dark."""
    page = server.ask("/").read().decode()
    assert re.findall(r"(?:src|href)=\S+", page) == ['href="/metrics">/metrics</a>.</footer>']
    assert 'http-equiv="refresh"' in page
    assert 'name="viewport"' in page
    assert "color-scheme: light dark" in page


def test_traffic_is_shared_over_the_latest_answers_only() -> None:
    """Old answers leave the memory, refusals never enter it, and percentiles are exact."""
    recent = Recent(lambda: 0, answers=10)
    for _ in range(50):
        recent(answered("fp32", 1))
    for milliseconds in (10, 20, 30, 40):
        recent(answered("int8-dynamic", milliseconds))
    recent(replace(answered("fp32", 1), outcome=Outcome.REJECTED))
    recent(replace(answered("fp32", 1), model="made-up", outcome=Outcome.INVALID))
    traffic = recent.traffic("digits", "3")
    assert {name: (part.answers, part.share) for name, part in traffic.items()} == {
        "fp32": (6, 0.6), "int8-dynamic": (4, 0.4),
    }  # fmt: skip
    assert (traffic["int8-dynamic"].p50_ns, traffic["int8-dynamic"].p95_ns) == (20_000_000, 40_000_000)
    assert recent.traffic("made-up", "3") == {}


def test_decisions_are_bounded() -> None:
    """However much runs, the memory keeps the latest few."""
    recent = Recent(lambda: 0, decisions=3)
    for number in range(10):
        recent(BatchRan("digits", "3", "fp32", number, 1, 1, "fit", 1, 1, False))
    assert [batch.executor for batch, _ in recent.decisions()] == [9, 8, 7]
