"""The commands that ask a running server over gRPC and show what it says: `gearshift variants` and `explain`.

Rules of this file: the server's texts are shown, never interpreted as markup; what the server does not know is a dash
in a table and null in JSON; every failure is one line and an exit code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table
from rich.text import Text

from protos import gearshift_pb2, gearshift_pb2_grpc, open_inference_pb2, open_inference_pb2_grpc
from server.settings import SettingsError
from variants.variant import LatencyProfile

TIMEOUT_SECONDS = 10.0
SHOWN_BATCH_SIZES = (1, 8, 32)
UNKNOWN = "–"
READY = "READY"
SLO_FIELDS = ("latency_ms", "min_accuracy", "max_accuracy_drop", "floor", "on_infeasible", "variant", "priority")
"""What `gearshift explain` may ask: the flags and the fields of the message have the same names."""


class _Remote:
    """A running server: one method per rpc, each with the token's metadata and a time limit."""

    def __init__(self, channel: grpc.Channel, token: str | None) -> None:
        self._variants = gearshift_pb2_grpc.VariantServiceStub(channel)
        self._inference = open_inference_pb2_grpc.GRPCInferenceServiceStub(channel)
        metadata = (("authorization", f"Bearer {token}"),) if token else ()
        self._options: dict[str, Any] = {"metadata": metadata, "timeout": TIMEOUT_SECONDS}

    def index(self) -> list[open_inference_pb2.RepositoryIndexResponse.ModelIndex]:
        """Every model version it knows."""
        return list(
            self._inference.RepositoryIndex(open_inference_pb2.RepositoryIndexRequest(), **self._options).models
        )

    def variants(self, model: str) -> gearshift_pb2.ListVariantsResponse:
        """The variants of the model's newest version."""
        listing: gearshift_pb2.ListVariantsResponse = self._variants.ListVariants(
            gearshift_pb2.ListVariantsRequest(model=model), **self._options
        )
        return listing

    def route(self, model: str, slo: gearshift_pb2.Slo) -> gearshift_pb2.ExplainRouteResponse:
        """What a request with this SLO would get."""
        route: gearshift_pb2.ExplainRouteResponse = self._variants.ExplainRoute(
            gearshift_pb2.ExplainRouteRequest(model=model, slo=slo), **self._options
        )
        return route


def show_variants(chosen: argparse.Namespace) -> int:
    """`gearshift variants`: one table per model, or one JSON document; returns the exit code."""
    return _asking(chosen, lambda remote: _variants(chosen, remote))


def show_route(chosen: argparse.Namespace) -> int:
    """`gearshift explain`: the variant such a request would get, and every other with its why."""
    return _asking(chosen, lambda remote: _route(chosen, remote))


def _variants(chosen: argparse.Namespace, remote: _Remote) -> None:
    index = remote.index() if chosen.model is None else []
    names = [chosen.model] if chosen.model else [entry.name for entry in index if entry.state == READY]
    listings = [remote.variants(name) for name in names]
    failed = [entry for entry in index if entry.state != READY]
    if chosen.json:
        facts = [listing_facts(listing) for listing in listings]
        facts += [{"model": entry.name, "version": entry.version, "reason": entry.reason} for entry in failed]
        _print_json(facts)
        return
    console = _console()
    for listing in listings:
        console.print(_listing_table(listing))
    for entry in failed:
        console.print(Text(f"{entry.name} is not served: {entry.reason or entry.state}"))
    if not listings and not failed:
        console.print("The server has no model.")


def _route(chosen: argparse.Namespace, remote: _Remote) -> None:
    asked = {name: getattr(chosen, name) for name in SLO_FIELDS}
    route = remote.route(chosen.model, gearshift_pb2.Slo(**{k: v for k, v in asked.items() if v is not None}))
    if chosen.json:
        _print_json(_route_facts(route))
        return
    rows = [
        (
            each.variant,
            "yes" if each.allowed else "no",
            _milliseconds(_optional(each, "predicted_latency_us")),
            each.why,
        )
        for each in route.candidates
    ]
    answer = f"{route.variant} would answer" if route.variant else "the request would be refused"
    console = _console()
    console.print(Text(f"{route.model} version {route.version}: {answer} ({route.reason})"))
    console.print(_table(("variant", "allowed", "latency", "why"), rows))


def listing_facts(listing: gearshift_pb2.ListVariantsResponse) -> dict[str, Any]:
    """What `--json` writes of one model; `server.simulation.profiles` reads it back."""
    variants = [
        {
            "variant": info.variant,
            "recipe": info.recipe,
            "state": info.state,
            "reason": info.reason,
            "precision": info.precision,
            "runtime": info.runtime,
            "device": info.device,
            "accuracy": _interval(info, "accuracy"),
            "accuracy_drop": _interval(info, "accuracy_drop"),
            "latency_ms": _by_batch_size(info.latency),
            "crowded_latency_ms": _by_batch_size(info.crowded_latency),
            "lengths": [
                {"elements": each.elements, "latency_ms": _by_batch_size(each.latency)} for each in info.lengths
            ],
            "batchable": info.batchable if info.HasField("batchable") else True,
            "samples_per_second": info.samples_per_second or None,
            "size_bytes": info.size_bytes,
            "gate_verdict": info.gate_verdict,
        }
        for info in listing.variants
    ]
    facts: dict[str, Any] = {"model": listing.model, "version": listing.version, "variants": variants}
    if listing.executors:
        facts["executors"] = listing.executors
    if listing.HasField("default_slo"):
        facts["slo"] = _slo_facts(listing.default_slo)
    return facts


def _slo_facts(slo: gearshift_pb2.Slo) -> dict[str, Any]:
    return {
        "latency_ms": _optional(slo, "latency_ms"),
        "max_accuracy_drop": _optional(slo, "max_accuracy_drop"),
        "on_infeasible": list(slo.on_infeasible) or None,
    }


def _by_batch_size(points: Iterable[gearshift_pb2.BatchLatency]) -> dict[str, float]:
    return {str(point.batch_size): point.latency_us / 1e3 for point in points}


def _route_facts(route: gearshift_pb2.ExplainRouteResponse) -> dict[str, Any]:
    candidates = [
        {
            "variant": candidate.variant,
            "allowed": candidate.allowed,
            "why": candidate.why,
            "predicted_latency_ms": _thousandth(_optional(candidate, "predicted_latency_us")),
        }
        for candidate in route.candidates
    ]
    return {
        "model": route.model,
        "version": route.version,
        "variant": route.variant or None,
        "reason": route.reason,
        "candidates": candidates,
    }


def _listing_table(listing: gearshift_pb2.ListVariantsResponse) -> Table:
    columns = ("variant", "accuracy [95 %]", *(f"b={size}" for size in SHOWN_BATCH_SIZES))
    rows = []
    for info in listing.variants:
        accuracy = _interval(info, "accuracy")
        rows.append(
            (
                info.variant,
                "{value:.4f} [{low:.4f}, {high:.4f}]".format(**accuracy) if accuracy else UNKNOWN,
                *_latencies(info.latency),
                f"{info.samples_per_second:,.0f}/s" if info.samples_per_second else UNKNOWN,
                f"{info.size_bytes / 2**20:,.2f} MiB" if info.size_bytes else UNKNOWN,
                info.runtime or UNKNOWN,
                info.state,
                info.reason,
            )
        )
    title = f"{listing.model} version {listing.version}"
    return _table((*columns, "throughput", "size", "runtime", "state", "why"), rows, title)


def _latencies(points: Iterable[gearshift_pb2.BatchLatency]) -> list[str]:
    """The shown batch sizes' latencies, interpolated between measured ones as the server itself does."""
    measured = [(point.batch_size, max(1, round(point.latency_us * 1e3))) for point in points]
    if not measured:
        return [UNKNOWN] * len(SHOWN_BATCH_SIZES)
    profile = LatencyProfile(*zip(*measured, strict=True))
    return [
        _milliseconds(profile.latency_ns(size) / 1e3) if size <= profile.max_batch_size else UNKNOWN
        for size in SHOWN_BATCH_SIZES
    ]


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]], title: str | None = None) -> Table:
    table = Table(title=Text(title) if title else None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _console() -> Console:
    """Fits the terminal; where nobody looks, wide enough that no row is broken."""
    return Console(width=None if sys.stdout.isatty() else 220, highlight=False)


def _print_json(facts: object) -> None:
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")


def _interval(info: gearshift_pb2.VariantInfo, name: str) -> dict[str, float] | None:
    if not info.HasField(name):
        return None
    interval = getattr(info, name)
    return {"value": interval.value, "low": interval.low, "high": interval.high}


def _optional(message: Any, name: str) -> float | None:
    return getattr(message, name) if message.HasField(name) else None


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1e3


def _milliseconds(microseconds: float | None) -> str:
    return UNKNOWN if microseconds is None else f"{microseconds / 1e3:,.2f} ms"


def _asking(chosen: argparse.Namespace, ask: Callable[[_Remote], None]) -> int:
    """Run `ask` on the server that the flags name; a failed rpc becomes one line and 1, or 2 for a wrong argument."""
    trust, token = read_file(chosen.tls_ca), read_file(chosen.token_file)
    if token and not token.strip().isascii():
        raise SettingsError(f"{chosen.token_file}: holds no token")
    try:
        with _channel(chosen.url, trust) as channel:
            ask(_Remote(channel, token.decode("ascii").strip() if token else None))
    except grpc.RpcError as error:
        sys.stderr.write(f"gearshift {chosen.command}: {told(error, chosen.url)}\n")
        return 2 if error.code() is grpc.StatusCode.INVALID_ARGUMENT else 1
    return 0


def _channel(url: str, trust: bytes | None) -> grpc.Channel:
    options = [("grpc.max_receive_message_length", -1)]
    if trust is None:
        return grpc.insecure_channel(url, options)
    return grpc.secure_channel(url, grpc.ssl_channel_credentials(root_certificates=trust), options)


def read_file(path: Path | None) -> bytes | None:
    """What a flag's file holds, None without the flag. Raises SettingsError."""
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None


def told(error: grpc.RpcError, url: str) -> str:
    """A failed rpc in one line."""
    details = " ".join(str(error.details() or "").split())
    if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
        return f"no answer from {url}: is `gearshift serve` running there? ({details})"
    return f"{error.code().name}: {details}"
