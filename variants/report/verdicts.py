"""The tables of a model: verdicts with their reasons, what fell and why, and all evidence by runtime."""

from __future__ import annotations

from dataclasses import fields

from variants.model_config import Metric
from variants.report import figures
from variants.report.facts import ModelFacts, VariantFacts
from variants.report.markup import Content, Markup, join, tag
from variants.report.svg import picture, symbol
from variants.report.tables import Column, fold, shown, table
from variants.variant import Evidence, Interval, Verdict, WorstClass

_SIGNS = {Verdict.PASSED: "✓", Verdict.REJECTED: "✕", Verdict.INCONCLUSIVE: "?", Verdict.UNVERIFIED: "–"}


def verdicts(model: ModelFacts) -> Markup:
    """Every variant with its verdict, proof, cost and reason."""
    batches = _ends(model)
    columns = [
        Column("variant", words=True), Column("verdict", words=True), Column(figures.metric_name(model.config.metric)),
        Column("drop"), Column("agreement"), *(Column(f"speed at {batch}") for batch in batches), Column("size"),
    ]  # fmt: skip
    caption = (
        "Verdicts: scores, paired drops and agreements with their 95% intervals"
        + ("; speed as a multiple of fp32's on ONNX Runtime, by batch size" if batches else "") + "."
    )  # fmt: skip
    reasons = [figures.typeset(variant.card.gate.reason) for variant in model.variants]
    return table(
        caption, columns, [_verdict(variant, model, batches) for variant in model.variants], reasons, "stacked"
    )


def _ends(model: ModelFacts) -> list[int]:
    """The smallest and the largest measured batch size."""
    sizes = model.batch_sizes
    return sorted({sizes[0], sizes[-1]}) if sizes else []


def _verdict(variant: VariantFacts, model: ModelFacts, batches: list[int]) -> list[Content]:
    proof, metric, card = variant.evidence, model.config.metric, variant.card
    return [
        named(variant),
        badge(card.gate.verdict),
        _bounded(proof.score, metric) if proof else figures.UNKNOWN,
        _bounded(proof.accuracy_drop, metric) if proof else figures.UNKNOWN,
        _bounded(proof.agreement, "agreement") if proof else figures.UNKNOWN,
        *(_speed(variant, batch) for batch in batches),
        figures.size(card.size_bytes) if card.artefact else figures.UNKNOWN,
    ]


def named(variant: VariantFacts) -> Markup:
    """A variant's mark and name, as in the pictures."""
    mark = tag("span", symbol_icon(variant), class_="icon", aria_hidden="true")
    return tag("span", mark, tag("span", variant.name), class_="named")


def symbol_icon(variant: VariantFacts) -> Markup:
    """The variant's mark as a small picture of its own."""
    return picture(16, 16, "", symbol(variant.card.gate.verdict, 8, 8, variant.hue, radius=5.5))


def legend(model: ModelFacts) -> Markup:
    """What the marks in the pictures mean; only those that occur."""
    present = {variant.card.gate.verdict for variant in model.variants if variant.hue}
    entries = [
        tag(
            "li",
            tag("span", picture(16, 16, "", symbol(verdict, 8, 8, hue, radius=5.5)), class_="icon", aria_hidden="true"),
            words,
        )
        for verdict, hue, words in (
            (Verdict.PASSED, 0, "fp32"),
            *((verdict, 1, str(verdict)) for verdict in Verdict if verdict in present),
        )
    ]
    return tag("ul", entries, class_="legend")


def badge(verdict: Verdict) -> Markup:
    """A verdict as sign and word."""
    return tag("span", tag("span", _SIGNS[verdict], aria_hidden="true"), f" {verdict}", class_=f"badge {verdict}")


def _bounded(interval: Interval, metric: Metric) -> list[Content]:
    return [figures.score(interval.value, metric), " ", tag("small", figures.bounds(interval, metric))]


def _speed(variant: VariantFacts, batch: int) -> Content:
    if variant.speed is None or batch not in variant.speed.speed_ups:
        return figures.UNKNOWN
    faster = variant.speed.speed_ups[batch]
    latency = variant.latencies.get(batch)
    return [figures.ratio(faster), " ", tag("small", figures.duration(latency) if latency else "")]


def what_fell(model: ModelFacts) -> Markup:
    """The variants that should take no traffic, one sentence each; what is stale or damaged too."""
    fallen = model.fallen
    said = [
        tag("li", named(v), tag("span", figures.typeset(fallen[v.name]))) for v in model.variants if v.name in fallen
    ]
    said += [tag("li", tag("span", sentence)) for sentence in model.absent]
    if not said:
        return tag("p", "Nothing fell: every variant passed, and none makes another one pointless.")
    return tag("ul", said, class_="fell")


def what_auto_tried(model: ModelFacts) -> Markup | None:
    """Every candidate of `variants: auto` with its end; None where it did not choose the variants."""
    if model.record is None:
        return None
    columns = [
        Column("candidate", words=True), Column("end", words=True), Column("verdict", words=True), Column("took"),
        Column("why", words=True),
    ]  # fmt: skip
    rows: list[list[Content]] = [
        [
            attempt.name,
            str(attempt.end),
            badge(attempt.card.gate.verdict) if attempt.card else figures.UNKNOWN,
            figures.duration(attempt.seconds * 1e9) if attempt.seconds else figures.UNKNOWN,
            figures.typeset(attempt.reason),
        ]
        for attempt in model.record.attempts
    ]
    record, end = model.record, "it tried all it had"
    if record.out_of_budget or not record.complete:
        end = "the budget ended it" if record.complete else "it was interrupted, and the next build goes on"
    budget = figures.plain(figures.significant(record.budget_minutes))
    caption = f"What variants: auto tried within {budget} minutes, in this order; {end}."
    return join(tag("h3", "What was tried"), table(caption, columns, rows, class_="stacked"))


def by_runtime(model: ModelFacts) -> Markup | None:
    """All that was proven, for every variant on every runtime."""
    proofs = [
        (v, runtime, proof, _fidelity(proof)) for v in model.variants for runtime, proof in v.card.runtimes.items()
    ]
    if not proofs:
        return None
    measures = [key for key in _MEASURES if any(key in fidelity for _, _, _, fidelity in proofs)]
    columns = [
        Column("variant", words=True), Column("runtime", words=True), Column("drop"), Column("agreement"),
        Column("samples"), Column("scored in batches of"), Column("change by batch-mates"),
        *(Column(_MEASURES[key]) for key in measures),
    ]  # fmt: skip
    rows: list[list[Content]] = [
        [
            named(variant), runtime, _bounded(proof.accuracy_drop, model.config.metric),
            _bounded(proof.agreement, "agreement"), f"{proof.samples:,}", shown(proof.batch_sizes),
            shown(proof.batch_invariance), *(fidelity.get(key, figures.UNKNOWN) for key in measures),
        ]
        for variant, runtime, proof, fidelity in proofs
    ]  # fmt: skip
    return fold(
        "All evidence by runtime", table("Evidence of every variant on every runtime that ran it.", columns, rows)
    )


_MEASURES = {
    "accuracy_drop_rate": "drop rate", "top1": "top-1", "macro_f1": "macro F1", "cosine": "mean cosine",
    "least_cosine": "worst cosine", "mse": "MSE", "max_abs_difference": "largest difference", "kl": "KL (nats)",
    "mcnemar_p": "McNemar p", "worst_class": "class that loses most", "not_finite": "answers not finite",
}  # fmt: skip


def _fidelity(proof: Evidence) -> dict[str, str]:
    """How near the answers are to the reference's, as texts; without what is not known."""
    if proof.fidelity is None:
        return {}
    found = {field.name: getattr(proof.fidelity, field.name) for field in fields(proof.fidelity)}
    return {name: _measure(name, value) for name, value in found.items() if value is not None}


def _measure(name: str, value: object) -> str:
    if isinstance(value, WorstClass):
        return f"{value.label}: {figures.percent(value.recall_drop.value)} of recall, {value.samples} samples"
    if isinstance(value, float) and name in ("accuracy_drop_rate", "top1", "macro_f1"):
        return figures.percent(value)
    return shown(value)
