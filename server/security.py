"""Who may call what: bearer tokens from a file, each with scopes, checked against one table of every method.

Rules of this file: a method without a row asks for `admin`, so a new rpc is closed until someone decides otherwise;
scopes do not imply one another; tokens are kept as digests only and compared in constant time, all of them for every
call; no message says which part of a credential was wrong.

Open to everyone are the health service, ServerLive and ServerReady: kubelets cannot send metadata, and the answers
tell no more than whether a name is serving.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

from server.errors import PermissionDenied, Unauthenticated
from server.settings import SettingsError


class Scope(StrEnum):
    """What a token may do."""

    INFER = "infer"
    STATS = "stats"
    ADMIN = "admin"


class TokensError(SettingsError):
    """The tokens file is wrong, told in one line that never shows a token."""


_INFERENCE = "/inference.GRPCInferenceService/"
_VARIANTS = "/gearshift.v1.VariantService/"
_HEALTH = "/grpc.health.v1.Health/"

SCOPES: dict[str, Scope | None] = {
    _HEALTH + "Check": None,
    _HEALTH + "Watch": None,
    _INFERENCE + "ServerLive": None,
    _INFERENCE + "ServerReady": None,
    _INFERENCE + "ServerMetadata": Scope.INFER,
    _INFERENCE + "ModelReady": Scope.INFER,
    _INFERENCE + "ModelMetadata": Scope.INFER,
    _INFERENCE + "ModelConfig": Scope.INFER,
    _INFERENCE + "ModelInfer": Scope.INFER,
    _INFERENCE + "ModelStreamInfer": Scope.INFER,
    _INFERENCE + "ModelStatistics": Scope.STATS,
    _INFERENCE + "RepositoryIndex": Scope.STATS,
    _INFERENCE + "RepositoryModelLoad": Scope.ADMIN,
    _INFERENCE + "RepositoryModelUnload": Scope.ADMIN,
    _VARIANTS + "ListVariants": Scope.STATS,
    _VARIANTS + "ExplainRoute": Scope.STATS,
    _VARIANTS + "SetVariantState": Scope.ADMIN,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo": Scope.INFER,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Scope.INFER,
}
"""Full method -> the scope it asks for; None is open. Whatever is missing asks for `admin`."""


class Authorizer:
    """Checks credentials. Immutable, so any thread may use it."""

    def __init__(self, tokens: Iterable[tuple[str, frozenset[Scope]]]) -> None:
        """Take (token, scopes) pairs; the tokens themselves are not kept."""
        self._grants = tuple((_digest(token), scopes) for token, scopes in tokens)

    @classmethod
    def from_file(cls, path: Path) -> Authorizer:
        """Read lines `TOKEN scope[,scope]`; blank lines and # comments are skipped. Raises TokensError."""
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise TokensError(f"--auth-tokens {path}: cannot be read: {type(error).__name__}") from None
        grants: dict[str, frozenset[Scope]] = {}
        for number, line in enumerate(lines, start=1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            token, scopes = _parse(words, f"--auth-tokens {path}, line {number}")
            if token in grants:
                raise TokensError(f"--auth-tokens {path}, line {number}: the token occurs a second time")
            grants[token] = scopes
        if not grants:
            raise TokensError(f"--auth-tokens {path}: holds no token, so nobody could call anything")
        return cls(grants.items())

    def check(self, method: str, metadata: Iterable[tuple[str, str | bytes]]) -> None:
        """Let a call through or raise Unauthenticated or PermissionDenied. `method` is the full path."""
        scope = SCOPES.get(method, Scope.ADMIN)
        if scope is not None:
            self.check_scope(scope, [value for key, value in metadata if key.lower() == "authorization"])

    def check_scope(self, scope: Scope, credentials: list[str | bytes]) -> None:
        """Check the values of the authorization header, of which there must be one. Raises as `check` does."""
        if len(credentials) != 1:
            raise Unauthenticated("send one `authorization: Bearer TOKEN`")
        value = credentials[0].decode("latin-1") if isinstance(credentials[0], bytes) else credentials[0]
        kind, _, token = value.partition(" ")
        granted = self._scopes_of(token.strip()) if kind.lower() == "bearer" else None
        if granted is None:
            raise Unauthenticated("the credentials are not valid")
        if scope not in granted:
            raise PermissionDenied(f"the credentials lack the scope {scope.value!r}")

    def _scopes_of(self, token: str) -> frozenset[Scope] | None:
        digest, found = _digest(token), None
        for known, scopes in self._grants:  # all of them: stopping early would tell how far down the file a token is
            if hmac.compare_digest(known, digest):
                found = scopes
        return found


def _parse(words: list[str], where: str) -> tuple[str, frozenset[Scope]]:
    if len(words) != 2:
        raise TokensError(f"{where}: should be `TOKEN scope[,scope]`")
    try:
        return words[0], frozenset(Scope(word) for word in words[1].split(","))
    except ValueError:
        raise TokensError(f"{where}: scopes are {', '.join(Scope)}") from None


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
