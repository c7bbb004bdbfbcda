"""The grpcio transport behind TLS, with real certificates made by openssl."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from server.transport.grpcio_transport import GrpcioTransport, Tls
from server.transport.transport import Reply

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl command")


def openssl(*arguments: str | Path) -> None:
    """Run openssl; raises when it fails."""
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two authorities, `ca` and `other`, and a certificate for localhost from each: `server`, `client`, `stranger`."""
    made = tmp_path_factory.mktemp("tls")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    for name in ("ca", "other"):
        files = ("-keyout", made / f"{name}.key", "-out", made / f"{name}.pem")
        openssl("req", "-x509", *curve, *files, "-days", "2", "-subj", f"/CN={name}")
    (made / "names").write_text("subjectAltName=DNS:localhost")
    for name, authority in (("server", "ca"), ("client", "ca"), ("stranger", "other")):
        request = made / f"{name}.csr"
        openssl("req", *curve, "-keyout", made / f"{name}.key", "-out", request, "-subj", f"/CN={name}")
        signer = ("-CA", made / f"{authority}.pem", "-CAkey", made / f"{authority}.key", "-CAcreateserial")
        openssl(
            "x509",
            "-req",
            "-in",
            request,
            *signer,
            "-days",
            "2",
            "-extfile",
            made / "names",
            "-out",
            made / f"{name}.pem",
        )
    return made


@contextmanager
def serving(folder: Path, *, mutual: bool) -> Iterator[int]:
    """An echo server behind TLS."""
    client_ca = (folder / "ca.pem").read_bytes() if mutual else None
    tls = Tls((folder / "server.pem").read_bytes(), (folder / "server.key").read_bytes(), client_ca)
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


def echo(folder: Path, port: int, certificate: str | None) -> bytes:
    """One call over TLS, with a client certificate or none; raises grpc.RpcError."""
    pair = [(folder / f"{certificate}.{end}").read_bytes() for end in ("key", "pem")] if certificate else [None, None]
    credentials = grpc.ssl_channel_credentials((folder / "ca.pem").read_bytes(), *pair)
    with grpc.secure_channel(f"localhost:{port}", credentials) as channel:
        answer: bytes = channel.unary_unary("/t.T/Echo")(b"x", timeout=10)
        return answer


def test_tls(folder: Path) -> None:
    """A client that trusts the authority gets through; a plaintext one does not."""
    with serving(folder, mutual=False) as port:
        assert echo(folder, port, None) == b"x"
        with grpc.insecure_channel(f"localhost:{port}") as channel, pytest.raises(grpc.RpcError) as error:
            channel.unary_unary("/t.T/Echo")(b"x", timeout=10)
        assert error.value.code() == grpc.StatusCode.UNAVAILABLE


def test_mutual_tls(folder: Path) -> None:
    """With a client authority only certificates that it signed get through."""
    with serving(folder, mutual=True) as port:
        assert echo(folder, port, "client") == b"x"
        for certificate in (None, "stranger"):
            with pytest.raises(grpc.RpcError) as error:
                echo(folder, port, certificate)
            assert error.value.code() == grpc.StatusCode.UNAVAILABLE
