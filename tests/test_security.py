"""Security: every method has a scope, tokens grant just theirs, and nothing else gets through."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.errors import PermissionDenied, Unauthenticated
from server.security import SCOPES, Authorizer, Scope, TokensError
from server.services import METHODS

INFER = "/inference.GRPCInferenceService/ModelInfer"
INDEX = "/inference.GRPCInferenceService/RepositoryIndex"
LOAD = "/inference.GRPCInferenceService/RepositoryModelLoad"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A tokens file with comments, a blank line and three tokens."""
    path = tmp_path / "tokens"
    path.write_text("# who may what\n\ns3cret infer\nwatch3r stats,infer\n  r00t admin\n", encoding="utf-8")
    return path


@pytest.fixture
def authorizer(tokens: Path) -> Authorizer:
    """The authorizer of that file."""
    return Authorizer.from_file(tokens)


def bearer(token: str) -> list[tuple[str, str | bytes]]:
    """The metadata of a call with this token."""
    return [("user-agent", "test"), ("authorization", f"Bearer {token}")]


def test_every_method_this_server_registers_has_a_row() -> None:
    """No rpc is reachable by another way than the table, and no row is left over from an rpc that has gone."""
    assert SCOPES.keys() == METHODS.keys()


def test_only_health_and_server_probes_are_open(authorizer: Authorizer) -> None:
    """What is open is a short, known list, and each of it needs no credentials."""
    open_methods = {method for method, scope in SCOPES.items() if scope is None}
    assert {method.rsplit("/", 1)[1] for method in open_methods} == {
        "Check", "Watch", "ServerLive", "ServerReady",
    }  # fmt: skip
    for method in open_methods:
        authorizer.check(method, [])


@pytest.mark.parametrize("method", [method for method, scope in SCOPES.items() if scope] + ["/no.such/Method", ""])
def test_everything_else_needs_a_valid_token_of_its_scope(method: str, authorizer: Authorizer) -> None:
    """No token is unauthenticated, one of another scope is denied; a method nobody knows asks for admin."""
    needed = SCOPES.get(method, Scope.ADMIN)
    with pytest.raises(Unauthenticated):
        authorizer.check(method, [])
    for token, scopes in {"s3cret": {"infer"}, "watch3r": {"stats", "infer"}, "r00t": {"admin"}}.items():
        if needed in scopes:
            authorizer.check(method, bearer(token))
        else:
            with pytest.raises(PermissionDenied, match=str(needed)):
                authorizer.check(method, bearer(token))


@pytest.mark.parametrize(
    "metadata",
    [
        pytest.param([("authorization", "s3cret")], id="no scheme"),
        pytest.param([("authorization", "Basic s3cret")], id="another scheme"),
        pytest.param([("authorization", "Bearer s3cre")], id="prefix"),
        pytest.param([("authorization", "Bearer s3crett")], id="longer"),
        pytest.param([("authorization", "Bearer S3CRET")], id="another case"),
        pytest.param([("authorization", "Bearer ")], id="empty"),
        pytest.param([("authorization", "")], id="nothing"),
        pytest.param([("authorization", b"\xff\xfe")], id="bytes"),
        pytest.param([("authorization", "Bearer s3cret infer")], id="the whole line"),
        pytest.param([("authorization", "Bearer #")], id="a comment"),
        pytest.param([("authorization", "Bearer s3cret"), ("authorization", "Bearer s3cret")], id="twice"),
        pytest.param([("token", "s3cret")], id="another header"),
    ],
)
def test_wrong_credentials_are_unauthenticated(metadata: list[tuple[str, str | bytes]], authorizer: Authorizer) -> None:
    """Whatever is not exactly one bearer token of the file is refused."""
    with pytest.raises(Unauthenticated):
        authorizer.check(INFER, metadata)


def test_the_scheme_and_the_header_ignore_case(authorizer: Authorizer) -> None:
    """`bearer` is as good as `Bearer`, as RFC 7235 says of schemes."""
    authorizer.check(INFER, [("Authorization", "bearer s3cret")])


def test_admin_implies_nothing_else(authorizer: Authorizer) -> None:
    """A token for loading models does not infer or look."""
    authorizer.check(LOAD, bearer("r00t"))
    for method in (INFER, INDEX):
        with pytest.raises(PermissionDenied):
            authorizer.check(method, bearer("r00t"))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("hush-hush", "line 1: should be"),
        ("hush-hush infer stats", "line 1: should be"),
        ("hush-hush infer,root", "line 1: scopes are infer, stats, admin"),
        ("hush-hush infer\nhush-hush stats", "line 2: the token occurs a second time"),
        ("# nobody\n", "holds no token"),
        (b"\xff\xfe", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_file_is_told_without_showing_a_token(content: str | bytes | None, said: str, tmp_path: Path) -> None:
    """The line number is enough to find the mistake; logs are no place for tokens."""
    path = tmp_path / "tokens"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TokensError) as caught:
        Authorizer.from_file(path)
    assert said in str(caught.value)
    assert "hush" not in str(caught.value)


def test_tokens_are_not_kept(authorizer: Authorizer) -> None:
    """Only digests stay in memory, so a dump of the object shows no token."""
    assert "s3cret" not in repr(vars(authorizer))
