"""Training: a changed module learns its task again, or to answer like its original.

Rules of this file: seeded; the module is changed in place and comes back on the CPU, in fp32 and in eval mode. On CUDA
it trains in mixed precision (see `mixed_precision.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from variants.data import Samples, spread
from variants.export import input_names
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.losses import answer_loss, response_loss, task_loss
from variants.recipes.training.mixed_precision import MixedPrecision

if TYPE_CHECKING:
    import torch
    from torch import nn

_BATCH = 64
_TEMPERATURE = 2.0
_QUICK_EPOCHS, _QUICK_SAMPLES = 1, 512

Recover = Literal["finetune", "distill"]


def finetune(
    module: nn.Module,
    teacher: nn.Module,
    ingredients: Ingredients,
    *,
    recover: Recover = "distill",
    epochs: int | None = None,
) -> Losses:
    """Train `module` on the training data; returns the losses. Raises RecipeRejected without data or for bad labels.

    `finetune` learns the task alone: cross-entropy with class targets, the squared distance to targets of the output's
    shape. `distill` learns half that, half from the teacher's softened classes (Hinton et al., 2015). Whatever has no
    such target, and with `distill` whatever has no classes, learns the teacher's answers: the squared distance to them.
    """
    epochs, rate = effort(ingredients, epochs)
    batches = Batches(teacher, ingredients)

    def loss(batch: Batch) -> Parts:
        answers = tensors_of(module(*batch.inputs))
        if batch.target is None or (recover == "distill" and not batches.learns_classes):
            return {"answers": answer_loss(answers, batch.wanted)}
        further = {"answers": answer_loss(answers[1:], batch.wanted[1:])} if answers[1:] else {}
        task = task_loss(answers[0], batch.target)
        if recover == "finetune":
            return {"task": task} | further
        response = response_loss(answers[0], batch.wanted[0], _TEMPERATURE)
        return {"task": task / 2, "response": response / 2} | further

    return fit(module, loss, batches, epochs=epochs, learning_rate=rate, progress=ingredients.progress)


def effort(ingredients: Ingredients, epochs: int | None = None) -> tuple[int, float]:
    """How many epochs to train, and the highest learning rate. Raises RecipeRejected without training data."""
    config = ingredients.config.training
    if config is None or ingredients.training is None:
        raise RecipeRejected("training needs training data; add `training:` to model.yaml")
    epochs = config.epochs if epochs is None else epochs
    return min(epochs, _QUICK_EPOCHS) if ingredients.quick else epochs, config.learning_rate


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs in the order of `forward`, the target where there is one, and the teacher's answers by output.

    The target is class numbers (int64, [samples]) or values of the first output's shape (float32).
    """

    inputs: list[torch.Tensor]
    target: torch.Tensor | None
    wanted: list[torch.Tensor]


Losses = list[dict[str, float]]
"""For each epoch the mean loss by part, and of their sum in `total`."""

Parts = dict[str, "torch.Tensor"]
"""The loss of a batch by its parts, each with its weight; what training makes small is their sum."""


def fit(
    learner: nn.Module,
    loss: Callable[[Batch], Parts],
    batches: Batches,
    *,
    epochs: int,
    learning_rate: float,
    progress: Callable[[float], None],
    precision: MixedPrecision | None = None,
) -> Losses:
    """Train all parameters of `learner`; returns the losses.

    Raises RecipeRejected when the loss is no longer a number, or no step could be taken.
    """
    import torch

    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    precision = precision or MixedPrecision.here()
    learner.to(precision.device).train()
    steps = epochs * batches.per_epoch
    optimiser = torch.optim.Adam(learner.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(2, steps + 1))
    history, taken = [], []
    for epoch in range(epochs):
        losses: list[Parts] = []
        for batch in batches.shuffled(generator, precision.device):
            with precision.autocast():
                parts = loss(batch)
            taken.append(precision.step(torch.stack(list(parts.values())).sum(), optimiser))
            if taken[-1]:
                schedule.step()
            losses.append({name: part.detach() for name, part in parts.items()})
            progress(len(taken) / steps)
        history.append(_means(losses, taken[-len(losses) :], epoch + 1))
    if not any(taken):
        raise RecipeRejected("training changed nothing: every step overflowed in half precision; train for longer")
    learner.cpu().eval()
    return history


def _means(losses: Sequence[Parts], taken: Sequence[bool], epoch: int) -> dict[str, float]:
    """The mean of each part over an epoch's batches, and of their sum, in `total`.

    A loss that is not finite in a step that was skipped did no harm and is left out; in one that was taken it spoilt
    the weights. Raises RecipeRejected then, and when no loss is finite.
    """
    import torch

    table = torch.stack([torch.stack(list(parts.values())) for parts in losses]).cpu()
    finite = table.isfinite().all(dim=1)
    if bool((torch.tensor(taken) & ~finite).any()) or not bool(finite.any()):
        raise RecipeRejected(
            f"training diverged in epoch {epoch}: its loss is no longer a finite number; lower `training.learning_rate`"
        )
    means = table[finite].double().mean(dim=0)
    return {"total": float(means.sum())} | dict(zip(losses[0], means.tolist(), strict=True))


class Batches:
    """Training samples as tensors in the order of `forward`, with the teacher's answers, which are asked for once.

    Raises RecipeRejected for labels that the model has no output for.
    """

    def __init__(self, teacher: nn.Module, ingredients: Ingredients) -> None:
        training = ingredients.training
        if training is None:
            raise RecipeRejected("training needs training data; add `training:` to model.yaml")
        self._samples = samples = spread(training, _QUICK_SAMPLES) if ingredients.quick else training
        self._names, self._batched = input_names(teacher, samples.inputs), ingredients.source.max_batch > 0
        # whole batches, the remainder spread over them: batch normalisation fails on a last batch of one
        self.per_epoch = max(1, len(samples) // _BATCH) if self._batched else len(samples)
        self._wanted = self._answers(teacher, MixedPrecision.here().device)
        first = self._wanted[0] if self._batched else self._wanted[0][0]
        self.learns_classes = _means_classes(ingredients.config) and first.ndim == 2
        self._target = _target(samples, first, ingredients.config, classes=self.learns_classes)

    def shuffled(self, generator: np.random.Generator, device: str = "cpu") -> Iterator[Batch]:
        """All batches once, in a new order."""
        for rows in self._split(generator.permutation(len(self._samples))):
            wanted = [output[rows] for output in self._wanted] if self._batched else self._wanted[rows[0]]
            target = None if self._target is None else self._target[rows].to(device)
            yield Batch(self._inputs(rows, device), target, [output.to(device) for output in wanted])

    def _answers(self, teacher: nn.Module, device: str) -> Any:
        """By output, one row per sample; where samples come one by one, by sample and then by output."""
        import torch

        asked = teacher if device == "cpu" else copy.deepcopy(teacher).to(device)
        with torch.no_grad():
            answers = (asked(*self._inputs(rows, device)) for rows in self._split(np.arange(len(self._samples))))
            pieces = [[output.cpu() for output in tensors_of(answer)] for answer in answers]
        return [torch.cat(output) for output in zip(*pieces, strict=True)] if self._batched else pieces

    def _split(self, order: Any) -> list[Any]:
        return np.array_split(order, self.per_epoch)

    def _inputs(self, rows: Any, device: str) -> list[torch.Tensor]:
        import torch

        arrays = (self._samples.take(rows).inputs[name] for name in self._names)
        return [torch.from_numpy(np.array(array if self._batched else array[0])).to(device) for array in arrays]


def _means_classes(config: ModelConfig) -> bool:
    """Whether targets are class numbers; whole numbers alone do not say so: ages and identities are no classes."""
    return config.task == "classification" or config.metric in ("top1", "macro_f1")


def _target(samples: Samples, first: torch.Tensor, config: ModelConfig, *, classes: bool) -> torch.Tensor | None:
    """The target as a loss takes it; None where it says nothing about the first output. Raises RecipeRejected."""
    import torch

    target = samples.target
    if target is None:
        return None
    if classes:
        return torch.from_numpy(_class_numbers(target, first.shape[1]))
    is_value = target.dtype.kind == "f" or (config.task == "regression" and target.dtype.kind in "iu")
    shape = (len(samples), *first.shape[1:])
    if not is_value or _means_classes(config) or target.size != np.prod(shape):
        return None
    return torch.from_numpy(target.astype(np.float32).reshape(shape))


def _class_numbers(target: Any, classes: int) -> Any:
    """Labels as int64 [samples]. Raises RecipeRejected for what is not one class number per sample."""
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


def as_finding(losses: Losses) -> dict[str, object]:
    """Losses as the card and the report have them."""
    return {"training": [{name: round(loss, 6) for name, loss in epoch.items()} for epoch in losses]}


def tensors_of(answer: Any) -> list[torch.Tensor]:
    """The tensors that a module returned, in order."""
    if isinstance(answer, dict):
        return list(answer.values())
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]
