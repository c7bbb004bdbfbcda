"""grpc.health.v1: Check and Watch between bytes and (service, serving?).

Rules: True is SERVING, False is NOT_SERVING, None is a service nobody has heard of. An unknown service is the error
NOT_FOUND to Check but an answer to Watch, which goes on in case the service appears.
"""

from __future__ import annotations

from collections.abc import Mapping

from grpc_health.v1 import health_pb2

from server.errors import NotFound
from server.wire.messages import parse
from server.wire.tensors import quoted

SERVICE = "grpc.health.v1.Health"
CHECK = f"/{SERVICE}/Check"
WATCH = f"/{SERVICE}/Watch"
METHODS: Mapping[str, str] = {CHECK: "unary", WATCH: "server_stream"}
"""Full path -> kind, for the transport."""

LIVE = "live"
"""The service that is SERVING as long as the process works, models or not."""

_STATUS = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
    None: health_pb2.HealthCheckResponse.SERVICE_UNKNOWN,
}


def read_service(message: bytes) -> str:
    """The service a Check or Watch asks about; empty for the whole server. Raises InvalidRequest."""
    service: str = parse(health_pb2.HealthCheckRequest, message).service
    return service


def encode_check(service: str, serving: bool | None) -> bytes:
    """The answer to Check; raises NotFound for an unknown service, as the health protocol asks."""
    if serving is None:
        raise NotFound(f"no service {quoted(service)} is known here")
    return encode_watch(serving)


def encode_watch(serving: bool | None) -> bytes:
    """One message of a Watch."""
    encoded: bytes = health_pb2.HealthCheckResponse(status=_STATUS[serving]).SerializeToString()
    return encoded
