"""Errors of the domain -> gRPC statuses: one table, total over `ServingError`.

Rules: a number is the protocol's (0 is OK); the text is the error's own, cut so that the trailers fit every client's
header limit; whoever may retry is told when, in `google.rpc.RetryInfo`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from google.rpc import error_details_pb2, status_pb2

from server import errors

MAX_TEXT = 1500
"""Characters of a status text: percent-encoded and repeated in the details it must stay below 8 KiB of headers."""

CODES: Mapping[type[errors.ServingError], int] = MappingProxyType(
    {
        errors.Cancelled: 1,  # CANCELLED
        errors.InvalidRequest: 3,  # INVALID_ARGUMENT
        errors.DeadlineMissed: 4,  # DEADLINE_EXCEEDED
        errors.NotFound: 5,  # NOT_FOUND
        errors.PermissionDenied: 7,  # PERMISSION_DENIED
        errors.Overloaded: 8,  # RESOURCE_EXHAUSTED
        errors.Infeasible: 9,  # FAILED_PRECONDITION
        errors.NotOffered: 12,  # UNIMPLEMENTED
        errors.RuntimeFailed: 13,  # INTERNAL
        errors.Unavailable: 14,  # UNAVAILABLE
        errors.Unauthenticated: 16,  # UNAUTHENTICATED
    }
)


class WireStatus(NamedTuple):
    """A gRPC status: number, text, and a serialised `google.rpc.Status` or nothing."""

    code: int
    message: str
    details: bytes


def to_status(error: errors.ServingError) -> WireStatus:
    """The status a client gets for an error. Raises KeyError for a class outside the table."""
    code = CODES[type(error)]
    text = str(error)
    message = text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    retry_after_ns = error.retry_after_ns if isinstance(error, errors.Overloaded) else None
    return WireStatus(code, message, b"" if retry_after_ns is None else _retry_details(code, message, retry_after_ns))


def _retry_details(code: int, message: str, retry_after_ns: int) -> bytes:
    retry = error_details_pb2.RetryInfo()
    retry.retry_delay.FromNanoseconds(max(0, retry_after_ns))
    status = status_pb2.Status(code=code, message=message)
    status.details.add().Pack(retry)
    serialised: bytes = status.SerializeToString()
    return serialised
