"""The status page as HTML: a pure function of the snapshots in `server.status`.

Rules of this file: every text that comes from a model, a variant or the host is escaped; nothing is loaded from
elsewhere, and no script runs; a figure that is not known shows as a dash, never as zero.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from importlib.resources import files
from string import Template

from server.events import BatchRan, PassedOver
from server.status import ModelStatus, Recent, ServerStatus, Traffic
from variants.variant import LatencyProfile, State, Variant

UNKNOWN = "–"
SHOWN_BATCH_SIZES = (1, 8, 32)
VARIANT_COLUMNS = (
    "variant", "state", "accuracy [95 %]", *(f"latency b={size}" for size in SHOWN_BATCH_SIZES), "throughput",
    "traffic", "p50", "p95", "size", "runs as", "why this state",
)  # fmt: skip
DECISION_COLUMNS = ("when", "model", "variant", "batch", "executor", "took", "predicted", "reason", "why")
WORDY = frozenset({"why"})
"""Columns of sentences that may run over several lines."""
REASONS = {
    "best": "the most accurate that was allowed",
    "pinned": "the request named it",
    "overload": "not everyone could be in time, and this batch saves the most",
    "late": "nothing could be in time any more",
    "retry": "a batch with this request failed, or its executor was lost",
}
"""The reasons that say more than which variants were passed over."""

_PAGE = Template(files("server").joinpath("status_page.html").read_text(encoding="utf-8"))


def render(status: ServerStatus, recent: Recent) -> str:
    """The whole page."""
    state = "ready" if status.ready else f"not ready: {status.reason}"
    summary = f"{status.busy_executors} of {status.executors} executors busy · {status.hardware}"
    sections = [_model(model, recent) for model in status.models]
    if status.failed:
        rows = [[escape(name), escape(reason)] for name, reason in status.failed.items()]
        sections.append("<h2>Not loaded</h2>" + _table(("model", "why"), rows))
    if not sections:
        sections.append("<p>No model is loaded.</p>")
    sections.append(_decisions(recent))
    return _PAGE.substitute(state=escape(state), summary=escape(summary), body="\n".join(sections))


def _model(model: ModelStatus, recent: Recent) -> str:
    traffic = recent.traffic(model.name, model.version)
    answers = sum(part.answers for part in traffic.values())
    load = model.load
    caption = (
        f"queue {load.queue_depth} requests, {_bytes(load.queue_bytes)} · in flight {load.inflight_requests} · "
        f"saturation {load.saturation_ratio:.0%} · traffic, p50 and p95 over the last {answers} answers"
    )
    rows = [_variant(variant, traffic.get(variant.name), answers) for variant in model.variants]
    idle = [variant.state is not State.ELIGIBLE for variant in model.variants]
    heading = f"<h2>{escape(model.name)} <small>version {escape(model.version)}</small></h2>"
    return heading + _table(VARIANT_COLUMNS, rows, caption, idle)


def _variant(variant: Variant, traffic: Traffic | None, answers: int) -> list[str]:
    profile, score = variant.profile, variant.score
    share = traffic.share if traffic else 0.0
    return [
        escape(variant.name),
        escape(variant.state),
        f"{score.value:.4f} [{score.low:.4f}, {score.high:.4f}]" if score else UNKNOWN,
        *(_latency(profile, size) for size in SHOWN_BATCH_SIZES),
        f"{_throughput(profile):,.0f}/s" if profile else UNKNOWN,
        f'<meter value="{share:.3f}"></meter> {share:.0%}' if answers else UNKNOWN,
        _milliseconds(traffic.p50_ns) if traffic else UNKNOWN,
        _milliseconds(traffic.p95_ns) if traffic else UNKNOWN,
        _bytes(variant.size_bytes) if variant.size_bytes else UNKNOWN,
        escape(f"{variant.precision}, {variant.runtime}, {variant.device}"),
        escape(variant.reason) or UNKNOWN,
    ]


def _decisions(recent: Recent) -> str:
    rows = [[*_decision(batch, age_ns), _why(batch)] for batch, age_ns in recent.decisions()]
    if not rows:
        return ""
    caption = "Newest first. What was predicted includes the margin that all but one batch in a hundred should keep."
    return "<h2>Recent decisions</h2>" + _table(DECISION_COLUMNS, rows, caption, cards=True)


def _decision(batch: BatchRan, age_ns: int) -> list[str]:
    took = "failed" if batch.failed else _milliseconds(batch.compute_ns)
    exceeded = not batch.failed and batch.compute_ns > batch.predicted_ns
    return [
        f"{age_ns / 1e9:,.1f} s ago",
        escape(f"{batch.model} {batch.version}"),
        escape(batch.variant),
        f"{_count(batch.samples, 'sample')} of {_count(batch.requests, 'request')}",
        str(batch.executor),
        f"<strong>{took}</strong>" if exceeded else took,
        _milliseconds(batch.predicted_ns),
        escape(batch.reason),
    ]


def _why(batch: BatchRan) -> str:
    """The decision in words: its circumstances, then what every more accurate variant lacked."""
    passed_over = [f"{passed.variant} {_lacked(passed)}" for passed in batch.passed_over]
    circumstances = REASONS.get(batch.reason)
    return escape("; ".join([*([circumstances] if circumstances else []), *passed_over])) or UNKNOWN


def _lacked(passed: PassedOver) -> str:
    match passed.reason:
        case "slack":
            return f"was {_milliseconds(passed.short)} short of being in time"
        case "batch":
            return f"was {_count(passed.short, 'sample')} short of a full batch"
        case "drain":
            return f"would have made those behind {_milliseconds(passed.short)} late"
        case "reserve":
            return f"would have kept tight requests waiting {_milliseconds(passed.short)} too long"
        case other:
            return f"was passed over: {other}"


def _table(
    columns: Iterable[str],
    rows: list[list[str]],
    caption: str = "",
    idle: list[bool] | None = None,
    *,
    cards: bool = False,
) -> str:
    """A table of cells that are HTML already; the rows marked idle are dimmed, `cards` become one each on a phone."""
    columns = tuple(columns)
    kinds = [" class=why" if column in WORDY else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{column}</th>' for column, kind in zip(columns, kinds, strict=True))
    openings = [f'<td data-column="{column}"{kind}>' for column, kind in zip(columns, kinds, strict=True)]
    body = "".join(
        f"<tr{' class=idle' if idle and idle[number] else ''}>"
        + "".join(f"{opening}{cell}</td>" for opening, cell in zip(openings, row, strict=True))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    table = (
        f"<table{' class=cards' if cards else ''}>{title}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    )
    return f'<div class="scroll">{table}</div>'


def _latency(profile: LatencyProfile | None, size: int) -> str:
    if profile is None or size > profile.max_batch_size:
        return UNKNOWN
    return _milliseconds(profile.latency_ns(size))


def _throughput(profile: LatencyProfile) -> float:
    """Samples a second of one executor at its best measured batch size."""
    sizes = zip(profile.batch_sizes, profile.latencies_ns, strict=True)
    return max(size * 1e9 / latency_ns for size, latency_ns in sizes)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _milliseconds(duration_ns: int) -> str:
    return f"{duration_ns / 1e6:,.2f} ms"


def _bytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB" if count >= 2**20 else f"{count / 1024:,.1f} KiB"
