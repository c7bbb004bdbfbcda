"""What the training data say of a model's first output: class numbers, values, or nothing that a loss could take.

Rules of this file: whole numbers alone do not say that they are classes, for ages and identities are none: the task or
the metric does. Labels that cannot be learnt are refused, and the reason says what to change.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Samples
from variants.model_config import ModelConfig
from variants.recipes.recipe import RecipeRejected

if TYPE_CHECKING:
    import torch


def means_classes(config: ModelConfig) -> bool:
    """Whether targets are class numbers."""
    return config.task == "classification" or config.metric in ("top1", "macro_f1")


def target_of(samples: Samples, first: torch.Tensor, config: ModelConfig) -> torch.Tensor | None:
    """The target as a loss takes it; None where it says nothing about the first output. Raises RecipeRejected.

    `first` is that output for some samples. Classes come as int64 [samples], values as float32 of the output's shape.
    """
    import torch

    target = samples.target
    if target is None:
        return None
    if means_classes(config):
        return torch.from_numpy(_class_numbers(target, first.shape[1])) if first.ndim == 2 else None
    is_value = target.dtype.kind == "f" or (config.task == "regression" and target.dtype.kind in "iu")
    shape = (len(samples), *first.shape[1:])
    if not is_value or target.size != np.prod(shape):
        return None
    return torch.from_numpy(target.astype(np.float32).reshape(shape))


def _class_numbers(target: Any, classes: int) -> Any:
    """Labels as int64 [samples]. Raises RecipeRejected for what is not one class number per sample."""
    if classes == 1:
        raise RecipeRejected(
            "class numbers are learnt with one output per class, and the model has a single output; let it answer for "
            "both classes, or leave out `training.target` to learn from the source's own answers"
        )
    if target.dtype.kind not in "iu" or target.size != len(target):
        raise RecipeRejected(
            f"the training target must be one class number per sample, not {target.dtype} of shape "
            f"{list(target.shape[1:])} per sample"
        )
    least, most = int(target.min()), int(target.max())
    if least < 0 or most >= classes:
        raise RecipeRejected(
            f"the training labels run from {least} to {most}, but the model answers with {classes} classes: "
            f"they must be 0 to {classes - 1}"
        )
    return target.reshape(-1).astype(np.int64)
