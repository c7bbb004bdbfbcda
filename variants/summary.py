"""The last words of a build: a table of all variants, and plain sentences where a recipe did harm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.table import Table

from variants.data import Array, Samples
from variants.measure import find_failures, measure_profiles, synthetic_inputs
from variants.repository import RepositoryError, VersionFolder
from variants.runtimes.runtime import RuntimeUnavailable, Session
from variants.source import Source
from variants.variant import REFERENCE, Card, Interval
from variants.verify import REFERENCE_RUNTIME, Verifier

SECONDS_PER_SESSION = 0.3

_SLOWER = 0.95
"""Below this speed-up a variant is called slower; nearer to 1 is within what a busy host does to a measurement."""


_WORSE = 0.001
"""A proven drop below this is not worth a sentence; the card has it."""


@dataclass(frozen=True, slots=True)
class Speed:
    """A variant against fp32 on this host: speed-up by batch size, on the runtime that is fastest for it."""

    runtime: str
    speed_ups: Mapping[int, float]


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


def measure_speeds(
    version: VersionFolder, cards: Mapping[str, Card], source: Source, samples: Samples | None, verifier: Verifier
) -> dict[str, Speed]:
    """The speed of every variant that can run here, on one thread, measured in interleaved rounds with fp32."""
    sessions = _sessions(version, cards, verifier)
    reference = (REFERENCE, REFERENCE_RUNTIME)
    sizes, inputs = sorted({1, max(1, source.max_batch)}), _inputs(source, samples)
    failures = find_failures(sessions, inputs, sizes)
    sessions = {key: session for key, session in sessions.items() if key not in failures}
    if reference not in sessions:
        return {}
    budget_s = SECONDS_PER_SESSION * len(sessions)
    profiles = measure_profiles(sessions, inputs, sizes, budget_s=budget_s)
    speeds = {}
    for name in {variant for variant, _ in sessions}:
        own = {runtime: profiles[name, runtime] for variant, runtime in sessions if variant == name}
        best = min(own, key=lambda runtime: own[runtime].latencies_ns[-1])
        ratios = (r / v for r, v in zip(profiles[reference].latencies_ns, own[best].latencies_ns, strict=True))
        speeds[name] = Speed(best, dict(zip(own[best].batch_sizes, ratios, strict=True)))
    return speeds


def _sessions(version: VersionFolder, cards: Mapping[str, Card], verifier: Verifier) -> dict[tuple[str, str], Session]:
    """A session per variant and runtime that has evidence, or that can run it where nothing has any."""
    sessions = {}
    for name, card in cards.items():
        files = {file: version.artefact(name, file) for file in card.artefacts}
        precision = str(card.requirements.get("precision", ""))
        for runtime, artefact in verifier.candidates(files, precision):
            is_fast = runtime.why_not(artefact, precision, verifier.hardware) is None  # not merely emulated here
            if is_fast and (not card.runtimes or runtime.name in card.runtimes):
                with suppress(RuntimeUnavailable):
                    sessions[name, runtime.name] = verifier.load(runtime, artefact, precision, threads=1)
    return sessions


def _inputs(source: Source, samples: Samples | None) -> Callable[[int], Mapping[str, Array]]:
    """Inputs of any batch size: a real sample over and over, or noise where there is no data."""

    def inputs(size: int) -> Mapping[str, Array]:
        if samples is None:
            return synthetic_inputs(source.signature.inputs, size, batch_axis=source.max_batch > 0)
        one = {name: array[0, ...] for name, array in samples.inputs.items()}
        return {name: np.repeat(a[None], size, axis=0) for name, a in one.items()} if source.max_batch else one

    return inputs


def table(cards: Mapping[str, Card], speeds: Mapping[str, Speed], title: str) -> Table:
    """All variants side by side."""
    result = Table(title=title, title_justify="left", box=None, pad_edge=False)
    batches = sorted({batch for speed in speeds.values() for batch in speed.speed_ups})
    for column in ("variant", "verdict", "score", "drop", "size", *(f"b={b} vs fp32" for b in batches), "on"):
        align: Literal["left", "right"] = "left" if column in ("variant", "verdict", "on") else "right"
        result.add_column(column, no_wrap=column not in ("score", "drop"), justify=align)
    for name in sorted(cards, key=lambda n: (n != REFERENCE, n)):
        card, speed = cards[name], speeds.get(name)
        proof = card.runtimes.get(speed.runtime if speed else "") or next(iter(card.runtimes.values()), None)
        result.add_row(
            name,
            str(card.gate.verdict),
            _interval(proof.score) if proof else "-",
            _interval(proof.accuracy_drop) if proof else "-",
            _size(card.size_bytes) if card.artefact else "-",
            *(f"{speed.speed_ups[b]:.2f}x" if speed else "-" for b in batches),
            speed.runtime if speed else "-",
        )
    return result


def _interval(interval: Interval) -> str:
    return f"{interval.value:.4f} [{interval.low:.4f}, {interval.high:.4f}]"


def _size(count: int) -> str:
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def sentences(cards: Mapping[str, Card], speeds: Mapping[str, Speed]) -> list[str]:
    """What a table does not say aloud: which recipes made the model slower, and which passed yet cost accuracy."""
    said = [_slower(name, speed) for name, speed in sorted(speeds.items())]
    said += [_worse(name, card) for name, card in sorted(cards.items())]
    return [sentence for sentence in said if sentence]


def _worse(name: str, card: Card) -> str:
    drops = {runtime: proof.accuracy_drop for runtime, proof in card.runtimes.items()}
    shown = {runtime: drop for runtime, drop in drops.items() if drop.low > 0 and drop.value >= _WORSE}
    if name == REFERENCE or not shown:
        return ""
    losses = ", ".join(f"{drop.value:.2%} on {runtime}" for runtime, drop in shown.items())
    return f"{name} is measurably less accurate than fp32: it loses {losses}."


def _slower(name: str, speed: Speed) -> str:
    slow = {batch: ratio for batch, ratio in speed.speed_ups.items() if ratio < _SLOWER}
    if name == REFERENCE or not slow:
        return ""
    where = " and ".join(f"{ratio:.2f}x at batch {batch}" for batch, ratio in slow.items())
    return f"{name} is slower than fp32 on this host ({where}): this recipe does not pay here."
