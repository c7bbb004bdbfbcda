"""Bytes -> any protobuf message, with the one error a client may see for it."""

from __future__ import annotations

from typing import TypeVar

from google.protobuf.message import DecodeError, Message

from server.errors import InvalidRequest

M = TypeVar("M", bound=Message)


def parse(kind: type[M], message: bytes) -> M:
    """Decode `message` as `kind`; raises InvalidRequest when it is none."""
    try:
        return kind.FromString(message)
    except DecodeError:
        raise InvalidRequest(f"the message does not decode as {kind.DESCRIPTOR.full_name}") from None
