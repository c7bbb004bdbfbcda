"""One model's part of the page, in the order of a person's questions.

Is it worth it? How fast, how small? Why was each taken or refused? Where is the time spent? What did the recipes find?
"""

from __future__ import annotations

from collections.abc import Iterator

from variants.report import figures
from variants.report.facts import ModelFacts, VariantFacts
from variants.report.findings import findings
from variants.report.markup import Markup, tag
from variants.report.pictures import accuracy, costs, layer_costs
from variants.report.tables import fold, pairs
from variants.report.verdicts import by_runtime, named, verdicts, what_auto_tried, what_fell


def section(model: ModelFacts, anchor: str) -> Markup:
    """The whole part."""
    return tag(
        "section",
        _heading(model, anchor),
        tag("div", list(_tiles(model)), class_="tiles"),
        accuracy(model),
        costs(model),
        tag("h3", "Verdicts"),
        verdicts(model),
        by_runtime(model),
        tag("h3", "What fell, and why"),
        what_fell(model),
        what_auto_tried(model),
        layer_costs(model),
        tag("h3", "How each variant was made"),
        [_recipe(variant, model) for variant in model.variants],
        class_="model",
    )


def _heading(model: ModelFacts, anchor: str) -> Markup:
    gate, proof, metric = model.config.gate, model.reference and model.reference.home, model.config.metric
    drop, agreement = figures.percent(gate.max_accuracy_drop), figures.percent(gate.min_agreement)
    data = f"{figures.metric_name(metric)} on {proof.samples:,} held-out samples" if proof else "no evaluation data"
    host = f"measured on one thread of {model.measurements.cpu}" if model.measurements else "no speed measured"
    facts = f"{data} · gate: drop at most {drop}, agreement at least {agreement} · {host}"
    name = tag("h2", model.name, " ", tag("small", f"version {model.version}"), id=anchor)
    return tag("header", name, tag("p", facts, class_="note"))


def _tiles(model: ModelFacts) -> Iterator[Markup]:
    """The figures to remember."""
    reference, made = model.reference, [variant for variant in model.variants if variant.hue]
    passed, proven = [variant for variant in made if variant.passed], model.beneficial
    if made:
        yield _tile(f"{len(passed)} of {len(made)}", "variants passed the gate", "beside fp32 itself")
    if reference and reference.home:
        metric, score = model.config.metric, reference.home.score
        more = f"95% interval {figures.bounds(score, metric)}"
        yield _tile(figures.score(score.value, metric), f"fp32's {figures.metric_name(metric)}", more)
    for batch in sorted({*model.batch_sizes[:1], *model.batch_sizes[-1:]}):
        yield from _fastest(proven, batch)
    if reference and proven:
        small = min(proven, key=lambda variant: variant.card.size_bytes)
        times = reference.card.size_bytes / max(1, small.card.size_bytes)
        more = f"{small.name}: {figures.size(small.card.size_bytes)}"
        yield _tile(figures.ratio(times), "smaller, the smallest verified", more)


def _fastest(proven: list[VariantFacts], batch: int) -> Iterator[Markup]:
    speeds = [(v.speed.speed_ups[batch], v) for v in proven if v.speed and batch in v.speed.speed_ups]
    if speeds:
        speed, variant = max(speeds, key=lambda entry: entry[0])
        yield _tile(figures.ratio(speed), f"the fastest verified at batch {batch}", f"{variant.name}: {_lost(variant)}")


def _tile(value: str, what: str, more: str) -> Markup:
    return tag("div", tag("strong", value), tag("span", what), tag("small", more), class_="tile")


def _lost(variant: VariantFacts) -> str:
    if variant.evidence is None:
        return "accuracy not proven"
    drop = variant.evidence.accuracy_drop
    return f"drop {figures.percent(drop.value)}, at most {figures.percent(drop.high)}"


def _recipe(variant: VariantFacts, model: ModelFacts) -> Markup:
    """Recipe, parameters and findings, on demand."""
    card = variant.card
    facts = {
        "recipe": card.recipe,
        **card.parameters,
        **{f"needs {name}": value for name, value in card.requirements.items()},
        "weights": card.weights,
        "files": [f"{file} ({sha[:12]})" for file, sha in card.artefacts.items()],
    }
    learnt = ", ".join(name.replace("_", " ") for name in card.findings)
    summary = [named(variant), tag("small", f"{card.recipe}{': ' if learnt else ''}{learnt}")]
    found = findings(card, model.config.gate.max_accuracy_drop)
    return fold(summary, tag("div", pairs(facts), found, class_="recipe"))
