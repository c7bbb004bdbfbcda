"""int8-static: weights and activations in bytes, with the activations' ranges observed on calibration data.

Rules of this file: weights are scaled per channel, because one scale per tensor destroys real models; how ranges are
taken from what was observed is decided by measured damage, never by belief. Scales are constants, so a batch changes no
answer. Intermediate files stay in the recipe's own folder.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import onnx
from pydantic import Field

from variants.data import Samples, spread
from variants.recipes.graph import finished
from variants.recipes.int8.calibration import METHODS, Activations, Method, Ranges
from variants.recipes.int8.qdq import Prepared, insert_qdq, prepare
from variants.recipes.int8.tensorrt import TENSORRT_FILE, insert_tensorrt_qdq, tensorrt_layers
from variants.recipes.int8.tensors import quantised_layers, quantised_tensors
from variants.recipes.int8.u8s8 import Int8
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.runtimes.runtime import RuntimeUnavailable
from variants.trial import Trial, Tried

_QUICK_SAMPLES = 64
_ERROR_SAMPLES = 32


class QuantizeStatic(Int8):
    """`exclude` names nodes that stay in floating point; `calibrate` says how an activation's range is chosen.

    `auto` tries each method and keeps the one that damages the answers least; `quick` builds try `minmax` alone.
    """

    exclude: list[str] = Field(default_factory=list)
    calibrate: Literal["auto", Method] = "auto"


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A prepared graph with the ranges to quantise it in, and the trials that chose them (plain JSON)."""

    prepared: Prepared
    samples: Samples
    method: Method
    ranges: Ranges
    reduce_range: bool
    tried: tuple[Mapping[str, object], ...] = ()

    def quantise(self, layers: Collection[str]) -> onnx.ModelProto:
        """The graph with these layers, and what lies between them, in 8 bits."""
        return insert_qdq(self.prepared.graph, self.ranges, self.prepared.nodes(layers), reduce_range=self.reduce_range)


def quantize_static(ingredients: Ingredients, parameters: QuantizeStatic) -> Product:
    """Quantise weights and activations as QDQ, with ranges observed on calibration data.

    A second file says the same with TensorRT's symmetric scales. Raises RecipeRejected without calibration data, and
    where no layer has constant weights.
    """
    calibrated = calibrate(ingredients, parameters)
    return assemble(ingredients, calibrated, list(calibrated.prepared.layers), "int8-static")


def calibrate(ingredients: Ingredients, parameters: QuantizeStatic) -> Calibrated:
    """Observe the activations once, and choose the ranges by trial. Raises RecipeRejected."""
    if ingredients.calibration is None:
        raise RecipeRejected("static quantisation needs calibration data; add `calibration:` to model.yaml")
    prepared = prepare(ingredients, parameters.exclude)
    samples = _samples(ingredients, ingredients.calibration)
    tries: tuple[Method, ...] = METHODS
    if parameters.calibrate != "auto":
        tries = (parameters.calibrate,)
    elif ingredients.trial is None or ingredients.quick:
        tries = ("minmax",)
    needed = {*prepared.nodes(prepared.layers), *tensorrt_layers(prepared)}
    activations = _activations(ingredients, prepared, prepared.tensors(needed), samples)
    observed = activations.observe(histograms=tries != ("minmax",))
    reduce_range = parameters.reduces_range(ingredients.hardware)
    candidates = [
        Calibrated(
            prepared, samples, method, {name: each.range(method) for name, each in observed.items()}, reduce_range
        )
        for method in tries
    ]
    return _least_damaged(ingredients, candidates)


def _samples(ingredients: Ingredients, calibration: Samples) -> Samples:
    """As many calibration samples as the configuration asks for."""
    config = ingredients.config.calibration
    most = config.samples if config else 256
    return spread(calibration, min(most, _QUICK_SAMPLES) if ingredients.quick else most)


def _activations(ingredients: Ingredients, prepared: Prepared, names: Collection[str], samples: Samples) -> Activations:
    return Activations(prepared.graph, names, samples, ingredients.source.max_batch, ingredients.hardware.cores)


def _least_damaged(ingredients: Ingredients, candidates: Sequence[Calibrated]) -> Calibrated:
    """The candidate that passes the gate with the least damage, or has the least where none passes."""
    unknown = dict.fromkeys(("drop", "agreement", "damage", "passes"))
    if ingredients.trial is None:
        return replace(candidates[0], tried=({"method": candidates[0].method, **unknown, "chosen": True},))
    found = []
    for position, candidate in enumerate(candidates):
        model = candidate.quantise(candidate.prepared.layers)
        found.append(try_out(ingredients, ingredients.trial, model))
        ingredients.progress((position + 1) / len(candidates))
    best = min(range(len(found)), key=lambda position: (not found[position].passes, found[position].damage))
    tried = [
        {"method": candidate.method, **each.facts(), "chosen": position == best}
        for position, (candidate, each) in enumerate(zip(candidates, found, strict=True))
    ]
    return replace(candidates[best], tried=tuple(tried))


def try_out(ingredients: Ingredients, trial: Trial, model: onnx.ModelProto) -> Tried:
    """How a candidate does on the tuning data. Raises RecipeRejected where it cannot be loaded."""
    candidate = ingredients.work / "candidate.onnx"
    onnx.save(model, candidate)
    try:
        return trial.judge(candidate)
    except RuntimeUnavailable as error:
        raise RecipeRejected(f"the quantised graph cannot be loaded: {error}") from error


def assemble(ingredients: Ingredients, calibrated: Calibrated, layers: Collection[str], name: str) -> Product:
    """The artefacts with these layers in 8 bits, and what is known of them. Raises RecipeRejected."""
    prepared, model = calibrated.prepared, calibrated.quantise(layers)
    count = quantised_layers(model.graph, layers)
    if count == 0:
        raise RecipeRejected("no layer could be quantised: the types of its tensors cannot be inferred")
    target = finished(ingredients, model, f"{name}.onnx")
    kept = set(prepared.layers) - set(layers)
    tensorrt = finished(ingredients, insert_tensorrt_qdq(prepared, calibrated.ranges, kept), f"{name}.tensorrt.onnx")
    few = spread(calibrated.samples, _ERROR_SAMPLES)
    tensors = quantised_tensors(
        model.graph,
        onnx.load(prepared.graph).graph,
        lambda names: _activations(ingredients, prepared, names, few),
    )
    facts: dict[str, object] = {
        "quantised_layers": count,
        "calibration_method": calibrated.method,
        "calibration_samples": len(calibrated.samples),
        "reduce_range": calibrated.reduce_range,
    }
    if ingredients.trial is None:
        facts["calibration_choice"] = "there was no tuning data to try other methods on"
    findings = {"calibration": list(calibrated.tried), "tensors": tensors}
    return Product({"model.onnx": target, TENSORRT_FILE: tensorrt}, "int8", facts, findings)
