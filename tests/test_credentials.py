"""Who may call the whole server: tokens and their scopes on every rpc and page, TLS and mutual TLS on both ports."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import grpc
import models
import numpy as np
import pytest
from serving import UNLIMITED, WAIT_S, Serving, failure, request_for, serving

from protos import open_inference_pb2 as pb
from protos import open_inference_pb2_grpc as pb_grpc
from server.app import StartError
from server.security import SCOPES
from server.services import METHODS

Code = grpc.StatusCode
ROW = np.ones((1, 256), np.float32)
TOKENS = "# who\nin infer\nst stats\nad admin\nall infer,stats,admin\n"


def test_tokens(tmp_path: Path) -> None:
    """Every rpc of the server asks for the scope of the one table; the HTTP pages ask too, the probes never."""
    models.add_ladder(tmp_path / "repository")
    (tmp_path / "tokens").write_text(TOKENS)
    with serving(tmp_path / "repository", admin=True, auth_tokens=str(tmp_path / "tokens")) as running:
        for method, kind in METHODS.items():
            for token, granted in (("", ()), ("in", ("infer",)), ("st", ("stats",)), ("ad", ("admin",)), ("no", ())):
                code = _code_with_token(running, method, kind, token)
                scope = SCOPES[method]
                if scope is None or scope.value in granted:
                    assert code not in {Code.UNAUTHENTICATED, Code.PERMISSION_DENIED}, (method, token)
                else:
                    expected = Code.PERMISSION_DENIED if granted else Code.UNAUTHENTICATED
                    assert code is expected, (method, token)
        with pytest.raises(urllib.error.HTTPError, match="401"):
            running.page("/metrics")
        assert running.page("/readyz") == "ready\n"
        page = running.page("/metrics", Authorization="Bearer st")
    assert "gearshift_requests_total" in page


def _code_with_token(running: Serving, method: str, kind: str, token: str) -> grpc.StatusCode:
    """The status of an empty call with a token, "" being none; OK for the first message of a stream."""
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        if kind == "unary":
            running.channel.unary_unary(method)(b"", metadata=metadata, timeout=WAIT_S)
        elif kind == "server_stream":
            call = running.channel.unary_stream(method)(b"", metadata=metadata, timeout=WAIT_S)
            next(call)
            call.cancel()
        else:
            metadata.append(("triton_grpc_error", "true"))
            next(running.channel.stream_stream(method)(iter([b""]), metadata=metadata, timeout=WAIT_S))
    except grpc.RpcError as error:
        return error.code()
    return Code.OK


def test_a_stream_without_credentials_ends(tmp_path: Path) -> None:
    """Without the Triton header too, wrong credentials end the stream with their status."""
    models.add_ladder(tmp_path / "repository")
    (tmp_path / "tokens").write_text(TOKENS)
    with serving(tmp_path / "repository", auth_tokens=str(tmp_path / "tokens")) as running:
        calls = running.v2.ModelStreamInfer(iter([request_for("ladder", x=ROW)]), timeout=WAIT_S)
        assert failure(lambda: next(calls)).code() is Code.UNAUTHENTICATED


def test_a_client_ca_that_is_none_is_named(tmp_path: Path, certificates: Path) -> None:
    """A file without a certificate is refused at start by its flag, not as an address that cannot be bound."""
    models.add_ladder(tmp_path / "repository")
    (tmp_path / "not.pem").write_text("no certificate")
    pair: dict[str, Any] = {"tls_cert": str(certificates / "server.pem"), "tls_key": str(certificates / "server.key")}
    with (
        pytest.raises(StartError, match="--tls-client-ca"),
        serving(tmp_path / "repository", **pair, tls_client_ca=str(tmp_path / "not.pem")),
    ):
        pass


@pytest.mark.parametrize("mutual", [False, True])
def test_tls(tmp_path: Path, certificates: Path, mutual: bool) -> None:
    """Over TLS an inference and the pages work; plaintext, and with mTLS a missing or foreign certificate, do not."""
    models.add_ladder(tmp_path)
    flags: dict[str, Any] = {"tls_cert": str(certificates / "server.pem"), "tls_key": str(certificates / "server.key")}
    if mutual:
        flags["tls_client_ca"] = str(certificates / "ca.pem")
    trusted = (certificates / "ca.pem").read_bytes()

    def ready(running: Serving, certificate: str | None) -> bool:
        pair = (
            [(certificates / f"{certificate}.{end}").read_bytes() for end in ("key", "pem")]
            if certificate
            else [None] * 2
        )
        credentials = grpc.ssl_channel_credentials(trusted, *pair)
        with grpc.secure_channel(f"localhost:{running.grpc_port}", credentials, UNLIMITED) as channel:
            return bool(
                pb_grpc.GRPCInferenceServiceStub(channel).ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S).ready
            )

    with serving(tmp_path, **flags) as running:
        assert ready(running, "client")
        assert (
            failure(lambda: running.v2.ServerReady(pb.ServerReadyRequest(), timeout=WAIT_S)).code() is Code.UNAVAILABLE
        )
        for certificate in (None, "stranger"):
            if mutual:
                assert failure(ready, running, certificate).code() is Code.UNAVAILABLE
            else:
                assert ready(running, certificate)
        context = ssl.create_default_context(cafile=certificates / "ca.pem")
        with urllib.request.urlopen(f"https://localhost:{running.http_port}/metrics", context=context) as response:
            assert b"gearshift_" in response.read()
