"""int8-mixed: static int8, with as few of the most sensitive layers in floating point as the gate asks for.

Rules of this file: a layer's sensitivity is what the answers lose when it alone is in 8 bits; layers are kept in that
order, and the smallest number whose trial passes is taken. More kept layers need not mean better answers, so each
number is tried itself. Ranges are observed once and shared by every candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from variants.recipes.int8.qdq import insert_qdq
from variants.recipes.int8.static import Calibrated, QuantizeStatic, assemble, calibrate, try_out
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.trial import Trial, Tried

_NAMED = 3


class QuantizeMixed(QuantizeStatic):
    """`most` limits how many layers may stay in floating point; unsaid, all but one."""

    most: int | None = Field(None, ge=0)


def quantize_mixed(ingredients: Ingredients, parameters: QuantizeMixed) -> Product:
    """Scan the layers one by one, then keep the k most sensitive in floating point: the smallest k that passes.

    A quick build doubles k instead of counting. Raises RecipeRejected with the numbers where no k passes, and without
    tuning data to try any on.
    """
    trial = _trial(ingredients)
    calibrated = calibrate(_part(ingredients, 0.0, 0.2), parameters)
    sensitivity = _scan(_part(ingredients, 0.2, 0.6), trial, calibrated)
    ranked = [layer for layer, _ in sensitivity]
    tried = _fewest_kept(_part(ingredients, 0.6, 0.9), trial, calibrated, ranked, parameters.most)
    kept, found = max(tried.items())
    operators = calibrated.prepared.layers
    findings = {
        "sensitivity": [
            {"layer": layer, "operator": operators[layer], "damage": round(damage, 6) if np.isfinite(damage) else None}
            for layer, damage in sensitivity
        ],
        "mixed": [{"kept": k, **each.facts(), "chosen": found.passes and k == kept} for k, each in tried.items()],
    }
    if not found.passes:
        raise RecipeRejected(_none_passes(tried, sensitivity), findings)
    product = assemble(ingredients, calibrated, _without(calibrated, ranked[:kept]), "int8-mixed")
    facts = {"kept_layers": ranked[:kept], **product.facts}
    return replace(product, facts=facts, findings=findings | dict(product.findings))


def _trial(ingredients: Ingredients) -> Trial:
    """What tries candidates. Raises RecipeRejected where there is nothing, or where even fp32 itself would not pass."""
    trial = ingredients.trial
    if trial is None:
        raise RecipeRejected(
            "mixed int8 tries layers on tuning data, and there is none: add `tuning:` to model.yaml, or `training:` or "
            "`calibration:` data of at least 128 samples, of which a share is set aside"
        )
    if not trial.judge(trial.reference).passes:
        raise RecipeRejected(
            "no choice of layers can pass: not even fp32's own answers prove what the gate asks on as many samples; "
            "give more evaluation data, or a wider gate"
        )
    return trial


def _part(ingredients: Ingredients, begin: float, end: float) -> Ingredients:
    """The ingredients for a part of the work, whose progress is a part of the whole's."""
    return replace(ingredients, progress=lambda share: ingredients.progress(begin + (end - begin) * share))


def _scan(ingredients: Ingredients, trial: Trial, calibrated: Calibrated) -> list[tuple[str, float]]:
    """Each layer with the damage that it does alone in 8 bits, the most sensitive first."""
    damages = {}
    layers = calibrated.prepared.layers
    for position, layer in enumerate(layers):
        model = insert_qdq(calibrated.prepared.graph, calibrated.ranges, [layer], reduce_range=calibrated.reduce_range)
        damages[layer] = try_out(ingredients, trial, model).damage
        ingredients.progress((position + 1) / len(layers))
    return sorted(damages.items(), key=lambda entry: -entry[1])


def _fewest_kept(
    ingredients: Ingredients, trial: Trial, calibrated: Calibrated, ranked: Sequence[str], most: int | None
) -> dict[int, Tried]:
    """What was tried by the number of kept layers, up to the first that passes."""
    limit = len(ranked) - 1 if most is None else min(most, len(ranked) - 1)
    numbers = range(limit + 1)
    steps = [k for k in numbers if k in (0, limit) or k.bit_count() == 1] if ingredients.quick else numbers
    tried: dict[int, Tried] = {}
    for k in steps:
        tried[k] = try_out(ingredients, trial, calibrated.quantise(_without(calibrated, ranked[:k])))
        ingredients.progress((k + 1) / (limit + 1))
        if tried[k].passes:
            break
    return tried


def _without(calibrated: Calibrated, kept: Sequence[str]) -> list[str]:
    """The layers but for those kept in floating point, in the graph's order."""
    return [layer for layer in calibrated.prepared.layers if layer not in kept]


def _none_passes(tried: dict[int, Tried], sensitivity: Sequence[tuple[str, float]]) -> str:
    """What a person should know: how near the best came, and what does the harm."""
    kept, best = min(tried.items(), key=lambda entry: (entry[1].drop.high, entry[1].damage))
    worst = ", ".join(f"{layer} ({damage:.3g})" for layer, damage in sensitivity[:_NAMED])
    return (
        f"no choice of up to {max(tried)} of {len(sensitivity)} layers in floating point passes the gate: the best, "
        f"with {kept}, has a drop of {best.drop.value:.2%} (at most {best.drop.high:.2%}) and an agreement of "
        f"{best.agreement.value:.2%} (at least {best.agreement.low:.2%}) on the tuning data; the layers that do the "
        f"most damage alone are {worst}"
    )
