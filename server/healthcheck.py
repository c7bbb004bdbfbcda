"""`python -m server.healthcheck [PORT]`: exit 0 when the server in this container is ready, else 1 and a line of why.

It asks the gRPC health service, so it goes the way that requests go, and needs no token. It speaks no TLS: the
certificate names the service, not this container; where TLS is on, probe the HTTP port's /readyz over HTTPS instead.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc


def check(port: int, timeout_seconds: float = 3.0) -> str | None:
    """None when the server serves, else why not."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=""), timeout=timeout_seconds
            )
        except grpc.RpcError as error:
            return f"no answer: {error.code().name}"
    serving = health_pb2.HealthCheckResponse.SERVING
    return None if answer.status == serving else health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)


if __name__ == "__main__":
    problem = check(int(sys.argv[1]) if len(sys.argv) > 1 else 8001)
    sys.exit(problem)
