"""`gearshift bench`: from the flags to the arrivals, the load, the figures and the exit code.

Rules of this file: everything that can be wrong with the words given is told before the first request is sent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc

from protos import open_inference_pb2 as pb
from server.bench.load import CONNECT_S, Answer, Metadata, connected, open_loop, run
from server.bench.report import read, summary
from server.bench.requests import Planned, plan, read_data, target
from server.bench.tables import show
from server.remote import read_file, told
from server.settings import SettingsError
from server.trace import Arrival
from server.wire.inference import SERVICE
from server.workload import DEFAULT_SECONDS, FLAGS, arrivals_of

LAG_MS = 10.0
"""A send lag that is too much where no latency is asked; where one is, a tenth of it."""

_FLAGS = (*FLAGS, "data", "connections")
"""The flags that are told with the figures."""


@dataclass(frozen=True, slots=True)
class _Run:
    """What was to be sent and what came of it: the answers are to the first of the planned."""

    planned: Sequence[Planned]
    answers: Sequence[Answer]


def bench(chosen: argparse.Namespace) -> int:
    """Run the load that the flags describe, print and write its figures; returns the exit code.

    Raises SettingsError for what is wrong with the flags or their files.
    """
    if chosen.connections < 1:
        raise SettingsError(f"--connections must be at least 1, got {chosen.connections}")
    arrivals = arrivals_of(chosen, chosen.model)
    if chosen.json:
        _check_writable(chosen.json)
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
        answers = await open_loop(
            channels, [each.due_ns for each in planned], lambda at: planned[at].head + planned[at].body, metadata
        )
        return _Run(planned, answers)


def _check_writable(path: Path) -> None:
    try:
        path.open("a").close()
    except OSError as error:
        raise SettingsError(f"--json {path}: {error.strerror}") from None


def _tell(chosen: argparse.Namespace, done: _Run) -> int:
    """Show and write the figures; 130 after Ctrl-C."""
    interrupted = len(done.answers) < len(done.planned)
    if not done.answers:
        return 130
    ended = [read(*pair) for pair in zip(done.planned, done.answers, strict=False)]
    planned_s = None if interrupted else chosen.seconds or (None if chosen.trace else DEFAULT_SECONDS)
    seconds = planned_s or max(answer.ended_ns for answer in done.answers) / 1e9
    flags = {name: str(value) if isinstance(value := getattr(chosen, name), Path) else value for name in _FLAGS}
    facts = {"url": chosen.url, "model": chosen.model, "flags": flags, "interrupted": interrupted}
    facts |= summary(ended, seconds)
    show(facts)
    _warn_of_lag(facts["send_lag_ms"]["p99"], done.planned)
    if chosen.json:
        chosen.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 130 if interrupted else 0


def _warn_of_lag(p99_ms: float, planned: Sequence[Planned]) -> None:
    asked_ms = [each.latency_ns / 1e6 for each in planned if each.latency_ns is not None]
    most_ms = min(asked_ms) / 10 if asked_ms else LAG_MS
    if p99_ms > most_ms:
        sys.stderr.write(
            f"gearshift bench: the client could not keep up: 1 % of the requests left more than {p99_ms:.1f} ms late "
            f"(tolerable: {most_ms:.1f} ms), which their latencies include; lower the rate or free a core\n"
        )
