"""`gearshift bench`: from the flags to the arrivals, the load, the figures and the exit code.

Rules of this file: everything that can be wrong with the words given is told before the first request is sent.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos import open_inference_pb2 as pb
from server.bench.load import CONNECT_S, Answer, Interrupted, Metadata, connected, open_loop, run
from server.bench.report import read, span_s, summary
from server.bench.requests import Planned, plan, read_data, target
from server.bench.tables import show
from server.figures import check_writable, write_figures
from server.remote import read_file, told
from server.settings import SettingsError
from server.trace import Arrival
from server.wire.inference import SERVICE
from server.workload import DEFAULT_SECONDS, FLAGS, arrivals_of

MAX_CONNECTIONS = 1000
LAG_MS = 10.0
"""A send lag that is too much where no latency is asked; where one is, a tenth of it."""

_FLAGS = (*FLAGS, "data", "connections")
"""The flags that are told with the figures."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What was to be sent and what came of it: the answers are to the first of the planned."""

    planned: Sequence[Planned]
    answers: Sequence[Answer]
    interrupted: bool


def bench(chosen: argparse.Namespace) -> int:
    """Run the load that the flags describe, print and write its figures; returns the exit code.

    Raises SettingsError for what is wrong with the flags or their files.
    """
    if not 1 <= chosen.connections <= MAX_CONNECTIONS:
        raise SettingsError(f"--connections must be 1 to {MAX_CONNECTIONS}, got {chosen.connections}")
    arrivals = arrivals_of(chosen, chosen.model)
    if chosen.json:
        check_writable(chosen.json)
    trust, token = read_file(chosen.tls_ca), (read_file(chosen.token_file) or b"").strip()
    if chosen.token_file and not (token and token.isascii()):
        raise SettingsError(f"{chosen.token_file}: holds no token")
    metadata = (("authorization", f"Bearer {token.decode('ascii')}"),) if token else ()
    try:
        done = run(_load(chosen, arrivals, trust, metadata))
    except grpc.RpcError as error:
        sys.stderr.write(f"gearshift bench: {told(error, chosen.url)}\n")
        return 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1
    except TimeoutError:
        sys.stderr.write(f"gearshift bench: no connection to {chosen.url} within {CONNECT_S:.0f} s\n")
        return 1
    return _tell(chosen, done)


async def _load(
    chosen: argparse.Namespace, arrivals: Sequence[Arrival], trust: bytes | None, metadata: Metadata
) -> _Run:
    async with connected(chosen.url, chosen.connections, trust) as channels:
        asked = channels[0].unary_unary(
            f"/{SERVICE}/ModelConfig",
            request_serializer=pb.ModelConfigRequest.SerializeToString,
            response_deserializer=pb.ModelConfigResponse.FromString,
        )
        answer = await asked(pb.ModelConfigRequest(name=chosen.model), metadata=metadata, timeout=CONNECT_S)
        model = target(answer.config)
        data = read_data(chosen.data, model) if chosen.data else None
        planned = plan(arrivals, model, data, chosen.seed)
        due_ns = [each.due_ns for each in planned]
        try:
            answers = await open_loop(channels, due_ns, lambda at: planned[at].head + planned[at].body, metadata)
        except Interrupted as stopped:
            return _Run(planned, stopped.answers, interrupted=True)
        return _Run(planned, answers, interrupted=False)


def _tell(chosen: argparse.Namespace, done: _Run) -> int:
    """Show and write the figures; 130 after Ctrl-C."""
    if not done.answers:
        return 130
    ended = [read(*pair) for pair in zip(done.planned, done.answers, strict=False)]
    flags = {name: str(value) if isinstance(value := getattr(chosen, name), Path) else value for name in _FLAGS}
    facts = {"url": chosen.url, "model": chosen.model, "flags": flags, "interrupted": done.interrupted}
    made_s = None if chosen.trace else chosen.seconds or DEFAULT_SECONDS
    facts |= summary(ended, made_s if made_s and len(ended) == len(done.planned) else span_s(done.answers))
    show(facts)
    _warn_of_lag(facts["send_lag_ms"]["p99"], done.planned)
    _warn_of_streams(done.answers)
    if chosen.json:
        write_figures(chosen.json, facts)
    return 130 if done.interrupted else 0


def _warn_of_streams(answers: Sequence[Answer]) -> None:
    """One connection carries some thousand requests at a time; the server turns more away unseen by its scheduler."""
    reset = sum(answer.code == "UNAVAILABLE" and "RST_STREAM" in answer.detail for answer in answers)
    if reset:
        sys.stderr.write(
            f"gearshift bench: {reset} requests were turned away by their connection, which carries only about 1,000 "
            "at a time; spread them with --connections\n"
        )


def _warn_of_lag(p99_ms: float, planned: Sequence[Planned]) -> None:
    asked_ms = [each.latency_ns / 1e6 for each in planned if each.latency_ns is not None]
    most_ms = min(asked_ms) / 10 if asked_ms else LAG_MS
    if p99_ms > most_ms:
        sys.stderr.write(
            f"gearshift bench: the client could not keep up: 1 % of the requests left more than {p99_ms:.1f} ms late "
            f"(tolerable: {most_ms:.3g} ms), which their latencies include; lower the rate or free a core\n"
        )
