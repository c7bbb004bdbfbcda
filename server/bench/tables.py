"""The figures of a load for a person: tables on a terminal, plain aligned columns elsewhere.

Rules of this file: it only formats; the server's texts are shown, never interpreted as markup.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

UNKNOWN = "–"
SHOWN = ("p50", "p95", "p99", "p99.9")


def show(facts: Mapping[str, Any]) -> None:
    """Print the document that `command` made."""
    console = Console(width=None if sys.stdout.isatty() else 220, highlight=False)
    console.print(Text(_title(facts)))
    console.print(_table(("", ""), _figures(facts)))
    if facts["variants"]:
        columns = ("variant", "answers", "share", "proven", "measured", "batch", *SHOWN)
        console.print("By variant, latencies in ms:")
        console.print(_table(columns, (_variant(name, each) for name, each in facts["variants"].items())))
    flags = (("code", "slo_met", "floor_met", "requests"), facts["outcomes"])
    console.print(_table(flags[0], ([_plain(row[name]) for name in flags[0]] for row in flags[1])))
    if facts["reasons"]:
        console.print(_table(("reason", "answers"), ((name, f"{n}") for name, n in facts["reasons"].items())))
    for code, text in facts["errors"].items():
        console.print(Text(f"{code}, for example: {text}"))


def _title(facts: Mapping[str, Any]) -> str:
    ended = ", stopped early" if facts["interrupted"] else ""
    rate, seconds = facts["offered_per_s"], facts["seconds"]
    pace = "at once" if seconds is None else f"in {seconds:.1f} s, {rate:.1f}/s"
    return f"{facts['model']} at {facts['url']}: {facts['requests']} requests {pace}{ended}"


def _figures(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [
        ("SLO attainment", f"{_percent(facts['slo_attainment'])} of all requests"),
        ("… over admitted", f"{_percent(facts['slo_attainment_admitted'])} of {facts['admitted']}"),
        ("goodput", UNKNOWN if facts["goodput_per_s"] is None else f"{facts['goodput_per_s']:.1f}/s"),
        ("effective accuracy", f"{_fraction(facts['effective_accuracy'])} (a miss counts 0)"),
        ("mean accuracy", f"{_fraction(facts['mean_accuracy'])} proven, over answers in time"),
        ("measured accuracy", _fraction(facts["measured_accuracy"])),
        ("latency", _percentiles(facts["latency_ms"])),
        ("client's send lag", _percentiles(facts["send_lag_ms"])),
        ("mean batch size", UNKNOWN if facts["batch_size_mean"] is None else f"{facts['batch_size_mean']:.1f}"),
    ]  # fmt: skip


def _variant(name: str, facts: Mapping[str, Any]) -> tuple[str, ...]:
    latencies = (f"{facts['latency_ms'][key]:.1f}" for key in SHOWN)
    return (
        name,
        str(facts["answers"]),
        _percent(facts["share"]),
        _fraction(facts["accuracy"]),
        _fraction(facts["measured_accuracy"]),
        UNKNOWN if facts["batch_size_mean"] is None else f"{facts['batch_size_mean']:.1f}",
        *latencies,
    )


def _table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """With a rule under the header where somebody looks, else plain."""
    names = list(columns)
    table = Table(box=SIMPLE_HEAD if sys.stdout.isatty() else None, padding=(0, 1, 0, 0), show_header=any(names))
    for name in names:
        table.add_column(name, overflow="fold", min_width=min(len(name), 9))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _percentiles(facts: Mapping[str, float] | None) -> str:
    return UNKNOWN if facts is None else "  ".join(f"{name} {value:.1f}" for name, value in facts.items()) + " ms"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{share:.2%}"


def _fraction(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.4f}"


def _plain(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return UNKNOWN if value is None else str(value)
