"""The last words of a build: a table of all variants, and plain sentences where a recipe did harm or did not pay.

Rules of this file: speeds are ratios of what was measured in one build, fp32 on ONNX Runtime over the variant; a
variant is as fast as it is served, one sample after another where batch-mates would change an answer. What has no
benefit here takes no traffic on a host like this one: a server decides by its own measurements, by the same rules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from rich.table import Table

from variants.evaluate import judge, may_batch
from variants.measurements import EAGER, Measured, Measurements
from variants.model_config import GateConfig
from variants.repository import RepositoryError, VersionFolder
from variants.variant import REFERENCE, Card, Interval, Verdict
from variants.verify import REFERENCE_RUNTIME

_FASTER = 0.97
"""A latency must be this share of fp32's to count as faster: less is within what a busy host does to a measurement."""

_WORSE = 0.001
"""A proven drop below this is not worth a sentence; the card has it."""


Times = Mapping[int, int]
"""Nanoseconds as served, by how many samples."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A variant on this host, on the runtime that is fastest for it: speed-up by batch size over fp32 on ONNX Runtime.

    `no_benefit`: at no batch size and on no runtime faster than fp32 on *its* fastest, and not proven better either.
    """

    runtime: str
    speed_ups: Mapping[int, float]
    no_benefit: bool = False


def sound_cards(version: VersionFolder) -> tuple[dict[str, Card], list[str]]:
    """The cards of the variants that are whole and current, and a sentence on each of the others."""
    cards, said = {}, []
    for name in sorted(version.manifest().variants):
        try:
            card = version.card(name)
            for file in card.artefacts if card else ():
                version.artefact(name, file)
        except RepositoryError as error:
            said.append(f"{name} takes no traffic until it is built again, for it is damaged: {error}.")
            continue
        if card is None:
            said.append(f"{name} takes no traffic until it is built again, for fp32 or how it is scored has changed.")
        else:
            cards[name] = card
    return cards, said


def speeds(measurements: Measurements, cards: Mapping[str, Card], gate: GateConfig | None = None) -> dict[str, Speed]:
    """The speed of every variant that was measured; without fp32 there is nothing to compare with.

    Where a variant passes the `gate` on some runtimes only, the others do not count.
    """
    reference = measurements.variants.get(REFERENCE, {}).get(REFERENCE_RUNTIME)
    if reference is None or REFERENCE not in cards:
        return {}
    unit = as_served(reference, cards[REFERENCE], REFERENCE_RUNTIME)
    times: dict[str, dict[str, Times]] = {}
    for name in sorted(measurements.variants.keys() & cards.keys()):
        measured = measurements.variants[name]
        usable = [runtime for runtime in measured if _may_serve(cards[name], runtime, gate)]
        times[name] = {runtime: as_served(measured[runtime], cards[name], runtime) for runtime in usable}
    fastest = {name: min(own, key=lambda each: _per_sample(own[each])) for name, own in times.items() if own}
    base = times[REFERENCE][fastest[REFERENCE]]
    return {
        name: Speed(best, _ratios(unit, times[name][best]), _is_of_no_benefit(cards[name], times[name], base))
        for name, best in fastest.items()
    }


def _may_serve(card: Card, runtime: str, gate: GateConfig | None) -> bool:
    """Whether a runtime passes the gate by itself, where any does; ONNX Runtime is the reference's home."""
    if card.variant == REFERENCE and runtime in (REFERENCE_RUNTIME, EAGER):
        return runtime != EAGER
    proof = card.runtimes.get(runtime)
    if gate is None or proof is None or card.gate.verdict is not Verdict.PASSED:
        return True
    return judge(proof.accuracy_drop, proof.agreement, proof.samples, gate) is Verdict.PASSED


def as_served(measured: Measured, card: Card, runtime: str) -> Times:
    """Batch size -> nanoseconds: in one batch or, where each sample must run alone, one after another."""
    profile, batches = measured.profile, may_batch(card, card.runtimes.get(runtime))
    return {size: profile.latency_ns(size) if batches else size * profile.latency_ns(1) for size in profile.batch_sizes}


def _per_sample(times: Times) -> float:
    """What a server chooses a runtime by."""
    return sum(ns / size for size, ns in times.items())


def _ratios(theirs: Times, ours: Times) -> dict[int, float]:
    """How many times as fast, by batch size."""
    return {size: theirs[size] / ns for size, ns in ours.items() if size in theirs}


def _is_of_no_benefit(card: Card, times: Mapping[str, Times], base: Times) -> bool:
    """Nowhere faster than fp32 as it is served, and not proven better."""
    if card.variant == REFERENCE or any(
        runtime in card.runtimes and card.runtimes[runtime].accuracy_drop.high < 0 for runtime in times
    ):
        return False
    return not any(ratio > 1 / _FASTER for own in times.values() for ratio in _ratios(base, own).values())


def table(cards: Mapping[str, Card], found: Mapping[str, Speed], title: str) -> Table:
    """All variants side by side."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    batches = sorted({batch for speed in found.values() for batch in speed.speed_ups})
    for column in ("variant", "verdict", "score", "drop", "size", *(f"b={b} vs fp32" for b in batches), "on"):
        align: Literal["left", "right"] = "left" if column in ("variant", "verdict", "on") else "right"
        result.add_column(column, no_wrap=column not in ("score", "drop"), justify=align)
    for name in sorted(cards, key=lambda n: (n != REFERENCE, n)):
        card, speed = cards[name], found.get(name)
        proof = card.runtimes.get(speed.runtime if speed else "") or next(iter(card.runtimes.values()), None)
        result.add_row(
            name,
            f"{card.gate.verdict}, no benefit" if speed and speed.no_benefit else str(card.gate.verdict),
            _interval(proof.score) if proof else "-",
            _interval(proof.accuracy_drop) if proof else "-",
            _size(card.size_bytes) if card.artefact else "-",
            *(f"{speed.speed_ups[b]:.2f}x" if speed and b in speed.speed_ups else "-" for b in batches),
            speed.runtime if speed else "-",
        )
    return result


def _interval(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def sentences(cards: Mapping[str, Card], found: Mapping[str, Speed]) -> list[str]:
    """What a table does not say aloud: which recipes did not pay here, and which passed yet cost accuracy."""
    said = [_slower(name, speed, found[REFERENCE]) for name, speed in sorted(found.items()) if name != REFERENCE]
    said += [_worse(name, card) for name, card in sorted(cards.items())]
    return [sentence for sentence in said if sentence]


def _worse(name: str, card: Card) -> str:
    drops = {runtime: proof.accuracy_drop for runtime, proof in card.runtimes.items()}
    shown = {runtime: drop for runtime, drop in drops.items() if drop.low > 0 and drop.value >= _WORSE}
    if name == REFERENCE or not shown:
        return ""
    losses = ", ".join(f"{drop.value:.2%} on {runtime}" for runtime, drop in shown.items())
    return f"{name} is measurably less accurate than fp32: it loses {losses}."


def _slower(name: str, speed: Speed, reference: Speed) -> str:
    """Against fp32 as it is served, on its own fastest runtime."""
    common = [batch for batch in speed.speed_ups if batch in reference.speed_ups]
    ratios = {batch: speed.speed_ups[batch] / reference.speed_ups[batch] for batch in common}
    if not speed.no_benefit:
        ratios = {batch: ratio for batch, ratio in ratios.items() if ratio < _FASTER}
    said = ", ".join(f"{ratio:.2f}x at batch {batch}" for batch, ratio in ratios.items())
    if speed.no_benefit:
        where = f"nowhere faster than fp32 on {reference.runtime} ({said})"
        return f"{name} is of no benefit on this host: {where}, so a server here gives it no traffic."
    return f"{name} is at some batch sizes slower than fp32 on {reference.runtime} ({said})." if ratios else ""
