"""The grpcio transport behind TLS, with real certificates."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from server.transport.grpcio_transport import GrpcioTransport, Tls
from server.transport.transport import Reply


@contextmanager
def serving(certificates: Path, *, mutual: bool) -> Iterator[int]:
    """An echo server behind TLS."""
    client_ca = (certificates / "ca.pem").read_bytes() if mutual else None
    tls = Tls((certificates / "server.pem").read_bytes(), (certificates / "server.key").read_bytes(), client_ca)
    transport = GrpcioTransport({"/t.T/Echo": "unary"}, "localhost:0", tls=tls)
    port = transport.start()
    running = True

    def run() -> None:
        while running:
            transport.reply([Reply(call, call.message) for call in transport.take(None).calls])

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield port
    finally:
        transport.stop(0)
        running = False
        transport.wake()
        thread.join()


def echo(certificates: Path, port: int, certificate: str | None) -> bytes:
    """One call over TLS, with a client certificate or none; raises grpc.RpcError."""
    pair: list[bytes | None] = [None, None]
    if certificate:
        pair = [(certificates / f"{certificate}.{end}").read_bytes() for end in ("key", "pem")]
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), *pair)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        answer: bytes = channel.unary_unary("/t.T/Echo")(b"x", timeout=10)
        return answer


def test_tls(certificates: Path) -> None:
    """A client that trusts the authority gets through; a plaintext one does not."""
    with serving(certificates, mutual=False) as port:
        assert echo(certificates, port, None) == b"x"
        with grpc.insecure_channel(f"localhost:{port}") as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/t.T/Echo")(b"x", timeout=10)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls(certificates: Path) -> None:
    """With a client authority only certificates that it signed get through."""
    with serving(certificates, mutual=True) as port:
        assert echo(certificates, port, "client") == b"x"
        for certificate in (None, "stranger"):
            with pytest.raises(grpc.RpcError) as error:
                echo(certificates, port, certificate)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
