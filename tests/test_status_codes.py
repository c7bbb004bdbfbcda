"""Every error has its gRPC status."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from server import errors
from server.wire.status_codes import CODES, MAX_TEXT, to_status

EXPECTED = {
    errors.InvalidRequest("x"): grpc.StatusCode.INVALID_ARGUMENT,
    errors.NotFound("x"): grpc.StatusCode.NOT_FOUND,
    errors.Infeasible("x"): grpc.StatusCode.FAILED_PRECONDITION,
    errors.Overloaded("x", 1): grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DeadlineMissed("x"): grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled("x"): grpc.StatusCode.CANCELLED,
    errors.Unavailable("x"): grpc.StatusCode.UNAVAILABLE,
    errors.Unauthenticated("x"): grpc.StatusCode.UNAUTHENTICATED,
    errors.PermissionDenied("x"): grpc.StatusCode.PERMISSION_DENIED,
    errors.NotOffered("x"): grpc.StatusCode.UNIMPLEMENTED,
    errors.RuntimeFailed("x"): grpc.StatusCode.INTERNAL,
}


def descendants(kind: type[errors.ServingError]) -> Iterator[type[errors.ServingError]]:
    """Every class below, at any depth."""
    for child in kind.__subclasses__():
        yield child
        yield from descendants(child)


def test_table_is_total() -> None:
    """No error class lacks a status, and the table lists nothing else."""
    ours = {kind for kind in descendants(errors.ServingError) if kind.__module__ == errors.__name__}
    assert set(CODES) == ours


@pytest.mark.parametrize(("error", "code"), EXPECTED.items(), ids=lambda value: type(value).__name__)
def test_codes_are_the_contracts(error: errors.ServingError, code: grpc.StatusCode) -> None:
    """Each situation has the code that clients were promised."""
    assert to_status(error).code == code.value[0]


def test_overloaded_says_when_to_retry() -> None:
    """A refusal for load carries RetryInfo with the exact delay, inside a status that repeats code and text."""
    status = to_status(errors.Overloaded("the queue is full", 1_250_000_007))
    detailed = status_pb2.Status.FromString(status.details)
    retry = error_details_pb2.RetryInfo()
    assert detailed.details[0].Unpack(retry)
    assert (detailed.code, detailed.message) == (status.code, status.message) == (8, "the queue is full")
    assert retry.retry_delay.ToNanoseconds() == 1_250_000_007


def test_long_text_is_cut() -> None:
    """A text never outgrows what a client accepts as headers."""
    assert len(to_status(errors.InvalidRequest("x" * 10_000)).message) == MAX_TEXT
