"""Server reflection, v1 and v1alpha: one request's bytes -> its answer's bytes.

The two versions differ in their package name only, so one function answers both. Everything it can tell is in the
files of `protos/` and the two standard services.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection import SERVICE_NAME, ReflectionServicer

from server.wire import health, inference, variants
from server.wire.messages import parse

METHODS: Mapping[str, str] = {
    f"/{service}/ServerReflectionInfo": "bidi" for service in (SERVICE_NAME, "grpc.reflection.v1.ServerReflection")
}
"""Full path -> kind, for the transport."""

_SERVICER = ReflectionServicer((inference.SERVICE, variants.SERVICE, health.SERVICE, SERVICE_NAME))


def answer(message: bytes) -> bytes:
    """Answer one ServerReflectionRequest; raises InvalidRequest when it is none."""
    request = parse(reflection_pb2.ServerReflectionRequest, message)
    response: bytes = next(_SERVICER.ServerReflectionInfo(iter([request]), None)).SerializeToString()
    return response
