"""int8-qat: the weights learn to be bytes before they are, by quantisation-aware training (Jacob et al., CVPR 2018).

Rules of this file: training starts from the fp32 weights; what it leaves is a plain fp32 module, which is then
quantised exactly as `int8-static` does and judged as it will be served. The deprecated `torch.ao.quantization` is not
used.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from variants.data import Samples, spread
from variants.export import example_tensors, export_graph
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import Losses, as_finding, finetune
from variants.repository import RepositoryError
from variants.runtimes.onnx_signature import read_signature

if TYPE_CHECKING:
    from torch import nn

_BATCH = 32
_TRAINING_SHARE = 0.8
_GENTLER = 1 / 3  # rounding makes gradients coarse: at the full rate weights that were learnt get lost
WEIGHT_LIMIT = {False: 127, True: 64}
"""The largest byte of a weight, by `reduce_range`: as ONNX Runtime's quantiser has it."""


class QuantizeAware(QuantizeStatic):
    """How it trains: `epochs` (unsaid, the training's), `learning_rate` (a third of the training's) and `recover`.

    All else is what `int8-static` is told afterwards.
    """

    epochs: int | None = Field(None, ge=1)
    learning_rate: float | None = Field(None, gt=0)
    recover: Literal["finetune", "distill"] = "distill"


def quantize_aware(ingredients: Ingredients, parameters: QuantizeAware) -> Product:
    """Train with weights and layer inputs rounded as int8 kernels read them, then quantise what was learnt.

    Scales for serving come from the calibration data again, not from the training: the quantiser knows which operators
    it fuses, and its file agrees with fp32 as often as the module in training does. Weights that an earlier step of a
    chain set to zero stay zero.
    """
    source, calibration = ingredients.source, ingredients.calibration
    if source.module is None or ingredients.example is None:
        raise RecipeRejected("training needs a torch source (module and safetensors); for ONNX there is `int8-static`")
    if ingredients.training is None:
        raise RecipeRejected("quantisation-aware training needs training data; add `training:` to model.yaml")
    if calibration is None:
        raise RecipeRejected("quantisation-aware training needs calibration data; add `calibration:` to model.yaml")
    _refuse_recurrent(source.module)
    module = copy.deepcopy(source.module)
    teacher = source.module if ingredients.teacher is None else ingredients.teacher
    gently = _gently(ingredients, parameters)
    layers, losses = _train(module, teacher, calibration, gently, parameters)
    target = ingredients.work / "trained.onnx"
    try:
        export_graph(module, ingredients.example.inputs, target, batched=source.max_batch > 0, axes=source.axes)
    except RepositoryError as error:
        raise RecipeRejected(f"the trained module cannot be exported: {error}") from error
    trained = replace(source, graph=target, signature=read_signature(target), module=module)
    rest = 1 - _TRAINING_SHARE
    quantising = replace(ingredients, progress=lambda share: ingredients.progress(_TRAINING_SHARE + rest * share))
    product = quantize_static(replace(quantising, source=trained), parameters)
    rate = gently.config.training.learning_rate if gently.config.training else None
    facts = {"trained_layers": layers, "epochs": len(losses), "learning_rate": rate, **product.facts}
    return replace(product, facts=facts, findings={**as_finding(losses), **product.findings})


def _refuse_recurrent(module: nn.Module) -> None:
    """Raise RecipeRejected where int8 kernels with constant scales could take on only a small part of the model."""
    from torch.nn import RNNBase

    from variants.recipes.int8.fake_quantize import quantizable_weights

    weights = quantizable_weights(module)
    if not weights:
        raise RecipeRejected("it has no linear layer, convolution or attention to train for int8")
    recurrent = sum(p.numel() for layer in module.modules() if isinstance(layer, RNNBase) for p in layer.parameters())
    if recurrent > sum(layer.get_parameter(name).numel() for layer, name in weights):
        raise RecipeRejected(
            "most of its weights are recurrent, for which there are no int8 kernels with constant scales; "
            "there is `int8-dynamic`"
        )


def _train(
    module: nn.Module, teacher: nn.Module, calibration: Samples, ingredients: Ingredients, parameters: QuantizeAware
) -> tuple[int, Losses]:
    """Train in place; returns how many weights took part, and the losses."""
    import torch

    from variants.recipes.int8.fake_quantize import fake_quantized

    most = ingredients.config.calibration.samples if ingredients.config.calibration else 256
    samples, batched = spread(calibration, most), ingredients.source.max_batch > 0

    def calibrate() -> None:
        batches = -(-len(samples) // _BATCH) if batched else len(samples)
        with torch.no_grad():
            for rows in np.array_split(np.arange(len(samples)), batches):
                inputs = samples.take(rows).inputs
                module(*example_tensors(module, inputs, len(rows), batched=batched).values())

    limit = WEIGHT_LIMIT[parameters.reduces_range(ingredients.hardware)]
    with fake_quantized(module, limit, calibrate) as layers:
        losses = finetune(module, teacher, ingredients, recover=parameters.recover, epochs=parameters.epochs)
    return layers, losses


def _gently(ingredients: Ingredients, parameters: QuantizeAware) -> Ingredients:
    """The ingredients with the learning rate of this training, which is only the first part of the work."""
    config, training = ingredients.config, ingredients.config.training
    if training is not None:
        rate = parameters.learning_rate or _GENTLER * training.learning_rate
        config = config.model_copy(update={"training": training.model_copy(update={"learning_rate": rate})})
    return replace(ingredients, config=config, progress=lambda share: ingredients.progress(_TRAINING_SHARE * share))
