"""What recipes learnt on the way: candidates tried, scans, searches and losses, drawn or tabulated.

Rules of this file: a finding is plain JSON whose form a recipe decides, so each is drawn if it has the form that its
picture needs, and shown as a table in any other. None is required, and unknown ones are shown too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from variants.report import bars, curves, figures
from variants.report.markup import Content, Markup, join, tag
from variants.report.svg import both
from variants.report.tables import fold, number, rows_of, shown, value_table
from variants.report.tensors import tensor_table
from variants.variant import Card

WIDE, NARROW = 540.0, 350.0
_SHOWN = 16
"""How many layers a picture shows, and how many entries a table that is not folded; all are there to unfold."""

Draw = Callable[[object], Markup | None]
"""A finding as a picture with its table, None where it has not the form for it."""


def findings(card: Card, max_drop: float) -> list[Markup]:
    """Every finding of a card, the known ones in the order of a recipe's work; `max_drop` is the gate's limit.

    What a later step of a chain found under the same name is numbered: `training 2`.
    """
    known = _drawings(max_drop)
    order = {name: position for position, name in enumerate(known)}
    names = sorted(card.findings, key=lambda name: order.get(_base(name), len(order)))
    return [_finding(name, card.findings[name], known.get(_base(name))) for name in names]


def _base(name: str) -> str:
    return name.rstrip(" 0123456789")


def _finding(name: str, value: object, known: tuple[str, Draw] | None) -> Markup:
    heading = known[0] + name.removeprefix(_base(name)) if known else name.replace("_", " ").capitalize()
    drawn = known[1](value) if known else None
    is_broad = drawn is None or name == "tensors"
    content = _tabulated(heading, value) if drawn is None else drawn
    return tag("section", tag("h4", heading), content, class_="finding broad" if is_broad else "finding")


def _tabulated(heading: str, value: object) -> Markup:
    """Any finding; a long one is folded."""
    entries = len(value) if isinstance(value, Mapping | list | tuple) else 0
    return fold(f"{entries} entries", value_table(heading, value)) if entries > _SHOWN else value_table(heading, value)


def _drawings(max_drop: float) -> dict[str, tuple[str, Draw]]:
    """The findings with a picture: heading and drawing by name."""

    def kept(value: object) -> Markup | None:
        return search(value, "kept", "layers kept in floating point", figures.whole, max_drop)

    def sparsity(value: object) -> Markup | None:
        return search(value, "sparsity", "sparsity", lambda at: figures.percent(at, 0), max_drop)

    return {
        "training": ("Training", training),
        "channels": ("Channels", channels),
        "zero_share_by_layer": ("Zeros by layer", zeros),
        "calibration": ("Calibration candidates", calibration),
        "sensitivity": ("Sensitivity scan", sensitivity),
        "mixed": ("How many layers stay in floating point", kept),
        "sparsity": ("Sparsity search", sparsity),
        "tensors": ("Quantised tensors", tensor_table),
    }


def _fitting(drawn: Sequence[bars.Bar], what: str) -> Markup:
    return both(*(bars.draw(drawn, what, width) for width in (WIDE, NARROW)))


def _note(words: str) -> Markup:
    return tag("p", words, class_="note")


def calibration(value: object) -> Markup | None:
    """How far each way to choose ranges moved the answers, and which was taken."""
    rows = rows_of(value) or []
    damages = [(str(row.get("method")), number(row.get("damage")), row) for row in rows]
    drawn = [
        bars.Bar(method, 1, damage, f"{figures.significant(damage)} · {_fate(row)}", faint=not row.get("chosen"))
        for method, damage, row in damages
        if damage is not None
    ]
    if not drawn or len(drawn) < len(rows):
        return None
    return join(
        _note("Damage: how far the answers moved from fp32's, as a share of their size, on the tuning samples."),
        _fitting(drawn, "damage by calibration method"),
        fold("All figures", value_table("Calibration candidates", value, "method")),
    )


def _fate(row: Mapping[str, object]) -> str:
    return "chosen" if row.get("chosen") else "passes" if row.get("passes") else "fails"


def sensitivity(value: object) -> Markup | None:
    """The layers by the damage that quantising one alone does; without a figure, that left no finite answers."""
    rows = rows_of(value) or []
    if not rows or any("layer" not in row or "damage" not in row for row in rows):
        return None
    damages = {str(row["layer"]): number(row["damage"]) for row in rows}
    most = max(damage_by_layer(value).values(), default=1.0)
    order = sorted(damages.items(), key=lambda entry: -math.inf if entry[1] is None else -entry[1])
    drawn = [
        bars.Bar(layer, 1, most if at is None else at, "no finite answers" if at is None else figures.significant(at))
        for layer, at in order[:_SHOWN]
    ]
    rest = f" The {_SHOWN} most sensitive of {len(damages)}." if len(damages) > _SHOWN else ""
    return join(
        _note(f"Damage done to the answers by quantising this layer alone.{rest}"),
        _fitting(drawn, "damage by layer"),
        fold("All layers", value_table("Sensitivity by layer", value, "layer")),
    )


def damage_by_layer(value: object) -> dict[str, float]:
    """A sensitivity scan as layer -> finite damage, empty if it is none."""
    rows = rows_of(value) or []
    found = {str(row.get("layer")): number(row.get("damage")) for row in rows if "layer" in row}
    return {layer: damage for layer, damage in found.items() if damage is not None}


def channels(value: object) -> Markup | None:
    """How many channels each group of layers had, and has."""
    rows = rows_of(value) or []
    widths = [(row.get("layers"), number(row.get("before")), number(row.get("after"))) for row in rows]
    drawn = [
        bars.Bar(shown(layers), 1, before, f"{before:.0f} → {after:.0f}", inner=after)
        for layers, before, after in widths
        if before is not None and after is not None
    ]
    if not drawn or len(drawn) < len(rows):
        return None
    rest: Content = fold("All groups", value_table("Channels by group", value)) if len(drawn) > _SHOWN else None
    note = _note("The darker part is left. Layers that share their channels lose the same ones.")
    return join(note, _fitting(drawn[:_SHOWN], "channels by group"), rest)


def search(value: object, key: str, knob: str, form: Callable[[float], str], max_drop: float) -> Markup | None:
    """Candidates along one knob, whose setting is each row's `key`."""
    rows = rows_of(value) or []
    found = [(number(row.get(key)), number(row.get("drop")), row) for row in rows]
    candidates = [
        curves.Candidate(at, drop, passes=bool(row.get("passes")), chosen=bool(row.get("chosen")))
        for at, drop, row in found
        if at is not None and drop is not None
    ]
    if not candidates or len(candidates) < len(rows):
        return None
    return join(
        _note(
            "Drop on the tuning samples. ● would pass the gate, × would not: the gate asks its bound, not its value."
        ),
        both(*(curves.search(candidates, knob, form, max_drop, width, 260) for width in (WIDE, NARROW))),
        fold("All figures", value_table(f"Candidates by {knob}", value, key)),
    )


def training(value: object) -> Markup | None:
    """Losses by epoch: numbers, or several losses by name in each epoch."""
    epochs = rows_of(value)
    if epochs is None:
        epochs = [{"loss": loss} for loss in value] if isinstance(value, list | tuple) else []
    lines = []
    for hue, name in enumerate(dict.fromkeys(key for epoch in epochs for key in epoch), start=1):
        losses = [(float(at), number(epoch.get(name))) for at, epoch in enumerate(epochs, start=1)]
        if known := [(at, loss) for at, loss in losses if loss is not None]:
            lines.append(curves.Curve(name, hue, known))
    return both(*(curves.losses(lines, width, 210) for width in (WIDE, NARROW))) if lines else None


def zeros(value: object) -> Markup | None:
    """The share of zeros in each layer."""
    shares = [(str(layer), number(share)) for layer, share in value.items()] if isinstance(value, Mapping) else []
    known = [(layer, share) for layer, share in shares if share is not None]
    if not known or len(known) < len(shares):
        return None
    drawn = [bars.Bar(layer, 1, share, figures.percent(share, 1)) for layer, share in known]
    rest: Content = fold("All layers", value_table("Zeros by layer", value)) if len(known) > _SHOWN else None
    return join(_fitting(drawn[:_SHOWN], "share of zeros by layer"), rest)
