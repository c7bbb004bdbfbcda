"""A model's pictures, each as a figure with its heading and what one should know to read it.

Rules of this file: where there is nothing to draw, a sentence says so and how to get it.
"""

from __future__ import annotations

from collections.abc import Callable

from variants.measurements import EAGER, LayerTime, Measured
from variants.report import bars, curves, figures, layers, pareto
from variants.report.facts import ModelFacts, VariantFacts
from variants.report.findings import damage_by_layer
from variants.report.markup import Content, Markup, join, tag
from variants.report.svg import both
from variants.report.verdicts import legend

FULL, HALF, THIRD, MIDDLE, NARROW = 1080.0, 540.0, 340.0, 640.0, 350.0
"""The widths that pictures are drawn for: their share of a wide page, a tablet's page, and a phone's."""

_READING = (
    "Up and left is better. Whiskers are the 95% interval of the drop against fp32, which the gate judges. The "
    "staircase is the Pareto front of the verified variants, along what is proven: the lower ends of their whiskers. "
    "Speeds are multiples of fp32's on ONNX Runtime."
)
_NO_LATENCY = (
    "No latency was measured with this build, so there is no picture of speed; run `gearshift build` again, on the "
    "host in question."
)
_NO_EVIDENCE = (
    "Nothing is proven without evaluation data: name some under `evaluation:` in model.yaml, and build again, to see "
    "accuracy against latency."
)


def figure(heading: str, note: Content, *content: Content, class_: str | None = None) -> Markup:
    """A picture with its caption."""
    caption = tag("figcaption", tag("strong", heading), tag("span", note, class_="note"))
    return tag("figure", caption, content, class_=class_)


def accuracy(model: ModelFacts) -> Markup:
    """The Pareto pictures at the smallest and the largest batch size, and latency over all of them."""
    if not model.batch_sizes:
        return tag("p", _NO_LATENCY, class_="absent")
    smallest, largest = model.batch_sizes[0], model.batch_sizes[-1]
    if not pareto.points_of(model, smallest):
        return tag("div", tag("p", _NO_EVIDENCE, class_="absent full"), _latency(model), class_="grid half")
    hero = both(*(pareto.draw(model, smallest, width, 450) for width in (FULL, NARROW, MIDDLE)))
    note = [_READING, _unnamed(model, smallest), _left_out(model, smallest), legend(model)]
    drawn = [figure("Accuracy against latency, one request at a time", note, hero, class_="full")]
    if largest > smallest and pareto.points_of(model, largest):
        picture = both(*(pareto.draw(model, largest, width, 360) for width in (HALF, NARROW)))
        drawn.append(figure(f"The same in batches of {largest}", "What a full batch takes.", picture))
    return tag("div", drawn, _latency(model), class_="grid half")


def _unnamed(model: ModelFacts, batch: int) -> str | None:
    points = pareto.points_of(model, batch)
    is_crowded = len(pareto.named_points(points, NARROW)) < len(points)
    return (
        " Where it is crowded, only some marks off the front are named; point at one to read it."
        if is_crowded
        else None
    )


def _left_out(model: ModelFacts, batch: int) -> str | None:
    drawn = {point.variant.name for point in pareto.points_of(model, batch)}
    absent = [variant.name for variant in model.variants if variant.name not in drawn]
    return f" Not drawn, for lack of evidence or of a latency on this host: {', '.join(absent)}." if absent else None


def _latency(model: ModelFacts) -> Markup:
    lines = [
        curves.Curve(variant.name, variant.hue, sorted(variant.latencies.items()), faint=not variant.passed)
        for variant in model.variants
        if variant.latencies
    ]
    if eager := _eager(model):
        points = list(zip(eager.profile.batch_sizes, eager.profile.latencies_ns, strict=True))
        lines.append(curves.Curve("torch, eager", 0, points, faint=True))
    kind = "fastest proven" if any(variant.evidence for variant in model.variants) else "fastest"
    note = f"Each variant on its {kind} runtime, as it is served. Dashed: not verified, or never served."
    return figure(
        "Latency by batch size", note, both(*(curves.latencies(lines, width, 360) for width in (HALF, NARROW)))
    )


def _eager(model: ModelFacts) -> Measured | None:
    """The person's own module in torch, where it was measured beside fp32's artefact."""
    reference = model.reference
    if reference is None or EAGER in reference.card.runtimes:
        return None
    return reference.measured.get(EAGER)


def costs(model: ModelFacts) -> Markup:
    """Size, work and memory."""
    built = [variant for variant in model.variants if variant.card.artefact]
    weighed = [variant for variant in built if variant.peak_memory is not None]
    size = _by_variant(
        "Size on disk",
        "The darker part is left after compression.",
        built,
        lambda variant: variant.card.size_bytes,
        lambda v: f"{figures.size(v.card.size_bytes)} · {figures.size(v.card.compressed_bytes)} packed",
        inner=lambda variant: variant.card.compressed_bytes,
    )
    return tag(
        "div",
        size,
        _by_variant(
            "Work for one sample",
            "Two operations per multiply-accumulate.",
            built,
            lambda variant: variant.card.flops,
            lambda variant: figures.flops(variant.card.flops),
        ),
        _by_variant(
            "Peak memory",
            "Of one process, at the largest batch; on ONNX Runtime where it was measured there.",
            weighed,
            lambda variant: _peak(variant)[0],
            lambda variant: f"{figures.size(_peak(variant)[0])} · {_peak(variant)[1]}",
        ),
        class_="grid third",
    )


def _peak(variant: VariantFacts) -> tuple[int, str]:
    return variant.peak_memory or (0, figures.UNKNOWN)


Value = Callable[[VariantFacts], float]


def _by_variant(
    heading: str,
    note: str,
    variants: list[VariantFacts],
    value: Value,
    shown: Callable[[VariantFacts], str],
    inner: Value | None = None,
) -> Markup:
    """Bars of one measure, which `shown` writes."""
    if not variants:
        return figure(heading, "Not measured with this build.")
    rows = [
        bars.Bar(
            variant.name,
            variant.hue,
            value(variant),
            shown(variant),
            inner(variant) if inner else None,
            faint=not variant.passed,
        )
        for variant in variants
    ]
    baseline = next((value(variant) for variant in variants if variant.hue == 0), None)
    return figure(heading, note, bars.draw(rows, heading, THIRD, baseline=baseline))


def layer_costs(model: ModelFacts) -> Markup | None:
    """Cost against sensitivity, and where fp32 and the fastest verified variant spend their time."""
    times = _times(model.reference) if model.reference else ()
    scans = (damage_by_layer(variant.card.findings.get("sensitivity")) for variant in model.variants)
    drawn = []
    if known := layers.matched(times, next((scan for scan in scans if scan), {})):
        picture = both(*(layers.cost_against_sensitivity(known, width, 340) for width in (FULL, NARROW, MIDDLE)))
        note = "Right: time to be won by int8. Up: accuracy to be lost by it. Low and right is where int8 pays."
        drawn.append(figure("Cost against sensitivity", note, picture, class_="full"))
    for variant in _profiled(model):
        rows, heading = layers.time_bars(_times(variant)), f"Time by layer: {variant.name}"
        note = f"One sample on {variant.profiled}, one thread."
        drawn.append(figure(heading, note, both(*(bars.draw(rows, heading, width) for width in (HALF, NARROW)))))
    return join(tag("h3", "Layers"), tag("div", drawn, class_="grid half")) if drawn else None


def _times(variant: VariantFacts) -> tuple[LayerTime, ...]:
    return variant.measured[variant.profiled].layers if variant.profiled else ()


def _profiled(model: ModelFacts) -> list[VariantFacts]:
    """The reference, and the fastest verified variant whose layers were timed."""
    reference = [variant for variant in model.variants if variant.hue == 0 and variant.profiled]
    front = model.front(model.batch_sizes[0]) if model.batch_sizes else []
    return [*reference, *[variant for variant in front if variant.hue and variant.profiled][:1]]
