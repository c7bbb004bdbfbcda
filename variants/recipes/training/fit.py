"""Training: a changed module learns its task again, or to answer like its original.

Rules of this file: seeded, which the process outside does not notice; the module is changed in place and comes back on
the CPU, in fp32 and in eval mode. On CUDA it trains in mixed precision (see `mixed_precision.py`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from variants.data import spread
from variants.export import input_names
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.losses import answer_loss, response_loss, task_loss
from variants.recipes.training.mixed_precision import MixedPrecision
from variants.recipes.training.targets import means_classes, target_of

if TYPE_CHECKING:
    import torch
    from torch import nn

_BATCH = 64
_TEMPERATURE = 2.0
_QUICK_EPOCHS, _QUICK_SAMPLES = 1, 512
_DIVERGED = "training diverged {}: its {} no longer finite; lower `training.learning_rate`"

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
    batches = Batches(teacher, ingredients, labels_suffice=recover == "finetune")

    def loss(batch: Batch) -> Parts:
        answers = answers_to(batch, module)
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

    The target is class numbers (int64, [samples]) or values of the first output's shape (float32). `wanted` is empty
    where nothing is learnt from the teacher.
    """

    inputs: list[torch.Tensor]
    target: torch.Tensor | None
    wanted: list[torch.Tensor]


def answers_to(batch: Batch, learner: nn.Module) -> list[torch.Tensor]:
    """What a module in training answers. Raises RecipeRejected where it is not one answer for each of the teacher's."""
    inputs = (tensor.clone() for tensor in batch.inputs)  # a module may change what it is given
    answers, wanted = tensors_of(learner(*inputs)), len(batch.wanted) or 1
    if len(answers) != wanted:
        raise RecipeRejected(
            f"in training it gives {len(answers)} outputs and in use {wanted}: nobody knows what auxiliary ones should "
            "learn; build the module without them"
        )
    return answers


@contextmanager
def seeded() -> Iterator[None]:
    """Within it torch draws the same numbers every time; afterwards it goes on where it was."""
    import torch

    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(0)
        yield


Losses = list[dict[str, float]]
"""For each epoch the mean loss by part, and of their sum in `total`."""

Parts = dict[str, "torch.Tensor"]
"""The loss of a batch by its parts, each with its weight; what training makes small is their sum."""


@seeded()
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
    """Train all parameters of `learner`, those that were frozen too; returns the losses.

    Raises RecipeRejected when the loss or a weight is no longer a number, no step could be taken, or the module cannot
    be trained in this way.
    """
    import torch

    learning = _unfrozen(learner)
    generator = np.random.default_rng(0)
    precision = precision or MixedPrecision.here()
    learner.to(precision.device).train()
    sound = _finite(learner)
    steps = epochs * batches.per_epoch
    optimiser = torch.optim.Adam(learning, lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, learning_rate, total_steps=max(2, steps + 1))
    history, taken = [], []
    for epoch in range(epochs):
        losses: list[Parts] = []
        for batch in batches.shuffled(generator, precision.device):
            with _enough_samples(), precision.autocast():
                parts = loss(batch)
            total = torch.stack(list(parts.values())).sum()
            if not total.requires_grad:
                raise RecipeRejected(
                    "its answers have no gradient, as those of an argmax or under `torch.no_grad`: it cannot be trained"
                )
            taken.append(precision.step(total, optimiser))
            if taken[-1]:
                schedule.step()
            losses.append({name: part.detach() for name, part in parts.items()})
            progress(len(taken) / steps)
        history.append(_means(losses, taken[-len(losses) :], epoch + 1))
    if not any(taken):
        raise RecipeRejected("training changed nothing: every step overflowed in half precision; train for longer")
    if not sound <= _finite(learner):  # the loss does not tell what the last step did
        raise RecipeRejected(_DIVERGED.format("in its last step", "weights are"))
    learner.cpu().eval()
    return history


def _unfrozen(learner: nn.Module) -> list[nn.Parameter]:
    """All parameters but whole numbers, ready to learn. Raises RecipeRejected for what the optimiser cannot handle."""
    from torch import nn

    if any(isinstance(layer, (nn.Embedding, nn.EmbeddingBag)) and layer.sparse for layer in learner.modules()):
        raise RecipeRejected(
            "its embeddings have sparse gradients, which Adam does not take; build them with sparse=False"
        )
    learning = [parameter for parameter in learner.parameters() if parameter.is_floating_point()]
    for parameter in learning:
        parameter.requires_grad_(True)
    return learning


@contextmanager
def _enough_samples() -> Iterator[None]:
    """Batch normalisation in training fails on a batch that is a single value per channel: say what is missing."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise RecipeRejected(
            "its batch normalisation cannot be trained on one sample at a time; give `training:` more samples, and the "
            "model a batch dimension"
        ) from error


def _finite(module: nn.Module) -> set[str]:
    """The parameters and buffers without NaN and infinities; a mask may have had some from the beginning."""
    values = chain(module.named_parameters(), module.named_buffers())
    return {name for name, value in values if bool(value.isfinite().all())}


def _means(losses: Sequence[Parts], taken: Sequence[bool], epoch: int) -> dict[str, float]:
    """The mean of each part over an epoch's batches, and of their sum, in `total`.

    A loss that is not finite in a step that was skipped did no harm and is left out; in one that was taken it spoilt
    the weights. Raises RecipeRejected then, and when no loss is finite.
    """
    import torch

    table = torch.stack([torch.stack(list(parts.values())) for parts in losses]).cpu()
    finite = table.isfinite().all(dim=1)
    if bool((torch.tensor(taken) & ~finite).any()) or not bool(finite.any()):
        raise RecipeRejected(_DIVERGED.format(f"in epoch {epoch}", "loss is"))
    means = table[finite].double().mean(dim=0)
    return {"total": float(means.sum())} | dict(zip(losses[0], means.tolist(), strict=True))


class Batches:
    """Training samples as tensors in the order of `forward`, with the teacher's answers, which are asked for once.

    Where `labels_suffice`, they are asked for only if there is no target, or a second output that it says nothing of.
    Raises RecipeRejected for labels that the model has no output for.
    """

    def __init__(self, teacher: nn.Module, ingredients: Ingredients, *, labels_suffice: bool = False) -> None:
        import torch

        training = ingredients.training
        if training is None:
            raise RecipeRejected("training needs training data; add `training:` to model.yaml")
        self._samples = samples = spread(training, _QUICK_SAMPLES) if ingredients.quick else training
        self._names, self._batched = input_names(teacher, samples.inputs), ingredients.source.max_batch > 0
        # whole batches, the remainder spread over them: batch normalisation fails on a last batch of one
        self.per_epoch = max(1, len(samples) // _BATCH) if self._batched else len(samples)
        device = MixedPrecision.here().device
        asked = teacher if device == "cpu" else copy.deepcopy(teacher).to(device)
        order = self._split(np.arange(len(samples)))
        answers = self._answers(asked, order[:1], device)
        first = answers[0][0]
        self.learns_classes = means_classes(ingredients.config) and first.ndim == 2 and first.shape[1] > 1
        self._target = target_of(samples, first, ingredients.config)
        self._wanted: Any = []  # by output, a row per sample; where samples come one by one, by sample and by output
        if not labels_suffice or self._target is None or len(answers[0]) > 1:
            answers += self._answers(asked, order[1:], device)
            self._wanted = [torch.cat(output) for output in zip(*answers, strict=True)] if self._batched else answers

    def shuffled(self, generator: np.random.Generator, device: str = "cpu") -> Iterator[Batch]:
        """All batches once, in a new order."""
        for rows in self._split(generator.permutation(len(self._samples))):
            target = None if self._target is None else self._target[rows].to(device)
            yield Batch(self._inputs(rows, device), target, [output.to(device) for output in self._wanted_at(rows)])

    def _wanted_at(self, rows: Any) -> list[torch.Tensor]:
        if self._batched:
            return [output[rows] for output in self._wanted]
        return self._wanted[rows[0]] if self._wanted else []

    def _answers(self, teacher: nn.Module, batches: list[Any], device: str) -> list[list[torch.Tensor]]:
        """By batch and then by output."""
        import torch

        with torch.no_grad():
            answers = (teacher(*self._inputs(rows, device)) for rows in batches)
            return [[output.cpu() for output in tensors_of(answer)] for answer in answers]

    def _split(self, order: Any) -> list[Any]:
        return np.array_split(order, self.per_epoch)

    def _inputs(self, rows: Any, device: str) -> list[torch.Tensor]:
        import torch

        inputs = self._samples.take(rows).inputs
        arrays = (inputs[name] if self._batched else inputs[name][0] for name in self._names)
        return [torch.from_numpy(np.array(array)).to(device) for array in arrays]


def as_finding(losses: Losses) -> dict[str, object]:
    """Losses as the card and the report have them."""
    return {"training": [{name: round(loss, 6) for name, loss in epoch.items()} for epoch in losses]}


def tensors_of(answer: Any) -> list[torch.Tensor]:
    """The tensors that a module returned, in order."""
    if isinstance(answer, dict):
        return list(answer.values())
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]
