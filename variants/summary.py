"""The last words of a build: which variants are worth keeping, a table of all, and plain sentences on the rest.

Rules of this file: speeds are ratios of what was measured in one build, fp32 on ONNX Runtime over the variant; a
variant is as fast as it is served, one sample after another where batch-mates would change an answer. What has no
benefit here takes no traffic on a host like this one: a server decides by its own measurements, by the same rules.
"""

from __future__ import annotations

import math
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

_NOISE = 1 / _FASTER
"""And one that is slower by less than this is not slower."""

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
    return not any(ratio > _NOISE for own in times.values() for ratio in _ratios(base, own).values())


def not_worth_keeping(cards: Mapping[str, Card], found: Mapping[str, Speed]) -> dict[str, str]:
    """Why each variant off the Pareto front of proven accuracy and measured speed is not worth keeping.

    That is what did not pass, what runs fast nowhere here, what is of no benefit over fp32, and what is dominated: by
    one whose proven drop is no larger and that is no slower at any batch size, each on the runtime that it is fastest
    on. fp32 is always worth keeping; where its speed is not known, nothing can be said of speed.
    """
    others = sorted(name for name in cards if name != REFERENCE)
    passed = [name for name in others if cards[name].gate.verdict is Verdict.PASSED]
    reasons = {name: f"{cards[name].gate.verdict}: {cards[name].gate.reason}" for name in others if name not in passed}
    if REFERENCE not in found:
        return reasons
    reasons |= {name: "passed, but no runtime that it passed on is fast here" for name in passed if name not in found}
    standing = {name: found[name] for name in passed if name in found}
    for name in [name for name, speed in standing.items() if speed.no_benefit]:
        ratios = _said(_against(standing.pop(name), found[REFERENCE]))
        reasons[name] = (
            f"passed, but of no benefit here: nowhere faster than fp32 on {found[REFERENCE].runtime} ({ratios})"
        )
    return reasons | dominated(
        {name: (proven_drop(cards[name], standing[name].runtime), standing[name]) for name in standing}
    )


def dominated(standing: Mapping[str, tuple[float, Speed]]) -> dict[str, str]:
    """Which variants, by drop and speed, another one makes pointless."""
    reasons: dict[str, str] = {}
    front: list[str] = []
    for name, (_, speed) in sorted(standing.items(), key=lambda own: (own[1][0], -_overall(own[1][1]))):
        better = next((other for other in front if _is_no_slower(standing[other][1], speed)), None)
        if better is None:
            front.append(name)
        else:
            reasons[name] = f"passed, but {better} is no slower and proven as accurate"
    return reasons


def proven_drop(card: Card, runtime: str) -> float:
    """The upper bound of the drop that was proven on a runtime, infinite without proof; the reference has none."""
    if card.variant == REFERENCE:
        return 0.0
    return card.runtimes[runtime].accuracy_drop.high if runtime in card.runtimes else math.inf


def _overall(speed: Speed) -> float:
    """One figure for all batch sizes, larger for whoever is no slower at any of them."""
    return sum(math.log(ratio) for ratio in speed.speed_ups.values() if ratio > 0)


def _is_no_slower(one: Speed, other: Speed) -> bool:
    """At any batch size at which the other was measured, by more than noise."""
    return all(one.speed_ups.get(batch, 0.0) * _NOISE >= ratio for batch, ratio in other.speed_ups.items())


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
    """What a table does not say aloud: what passed in vain, which recipes did not pay, and what cost accuracy."""
    reasons = not_worth_keeping(cards, found)
    vain = [name for name in reasons if cards[name].gate.verdict is Verdict.PASSED]
    said = [f"{name} {reasons[name]}." for name in sorted(vain)]
    said += [_slower(name, found[name], found[REFERENCE]) for name in sorted(found.keys() - {REFERENCE, *vain})]
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
    slower = {batch: ratio for batch, ratio in _against(speed, reference).items() if ratio < _FASTER}
    return f"{name} is at some batch sizes slower than fp32 on {reference.runtime} ({_said(slower)})." if slower else ""


def _against(speed: Speed, reference: Speed) -> dict[int, float]:
    """How many times as fast as fp32 is as it is served, on its own fastest runtime."""
    common = [batch for batch in speed.speed_ups if batch in reference.speed_ups]
    return {batch: speed.speed_ups[batch] / reference.speed_ups[batch] for batch in common}


def _said(ratios: Mapping[int, float]) -> str:
    return ", ".join(f"{ratio:.2f}x at batch {batch}" for batch, ratio in ratios.items())
