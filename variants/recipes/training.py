"""Fine-tuning: a changed module learns to answer like its original again.

With class targets the loss is half cross-entropy, half distillation from the original's answers (Hinton et al., 2015);
otherwise the squared distance to the original's answers. Seeded; the module is changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Samples, spread
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.source import input_names

if TYPE_CHECKING:
    import torch
    from torch import nn

_BATCH = 64
_TEMPERATURE = 2.0
_QUICK_EPOCHS, _QUICK_SAMPLES = 1, 512


def finetune(module: nn.Module, teacher: nn.Module, ingredients: Ingredients) -> int:
    """Train `module` on the training data; returns the epochs. Raises RecipeRejected without data."""
    import torch

    training, config = ingredients.training, ingredients.config.training
    if training is None or config is None:
        raise RecipeRejected("fine-tuning needs training data; add `training:` to model.yaml")
    samples = spread(training, _QUICK_SAMPLES) if ingredients.quick else training
    epochs = min(config.epochs, _QUICK_EPOCHS) if ingredients.quick else config.epochs
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    if not _learns_classes(ingredients.config):
        samples = Samples(samples.inputs)
    batches = _Batches(teacher, samples, batched=ingredients.source.max_batch > 0)
    steps = epochs * batches.per_epoch
    optimiser = torch.optim.Adam(module.parameters(), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=max(2, steps + 1))
    module.train()
    for epoch in range(epochs):
        for number, batch in enumerate(batches.shuffled(generator)):
            loss = _loss(module, *batch)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            ingredients.progress((epoch * batches.per_epoch + number + 1) / steps)
    module.eval()
    return epochs


def _learns_classes(config: ModelConfig) -> bool:
    """Whether targets are class numbers; whole numbers alone do not say so: ages and identities are no classes."""
    return config.task == "classification" or config.metric in ("top1", "macro_f1")


class _Batches:
    """Training samples as tensors in the order of `forward`, with the teacher's answers, which are asked for once."""

    def __init__(self, teacher: nn.Module, samples: Samples, *, batched: bool) -> None:
        self._names, self._samples, self._batched = input_names(teacher, samples.inputs), samples, batched
        # whole batches, the remainder spread over them: batch normalisation fails on a last batch of one
        self.per_epoch = max(1, len(samples) // _BATCH) if batched else len(samples)
        self._wanted = self._answers(teacher)

    def shuffled(self, generator: np.random.Generator) -> Any:
        """All batches once, in a new order: (inputs, target or None, the teacher's answers)."""
        for rows in self._split(generator.permutation(len(self._samples))):
            wanted = [output[rows] for output in self._wanted] if self._batched else self._wanted[rows[0]]
            yield self._inputs(rows), self._samples.take(rows).target, wanted

    def _answers(self, teacher: nn.Module) -> Any:
        """By output, one row per sample; where samples come one by one, by sample and then by output."""
        import torch

        with torch.no_grad():
            pieces = [_tensors(teacher(*self._inputs(rows))) for rows in self._split(np.arange(len(self._samples)))]
        return [torch.cat(output) for output in zip(*pieces, strict=True)] if self._batched else pieces

    def _split(self, order: Any) -> list[Any]:
        return np.array_split(order, self.per_epoch)

    def _inputs(self, rows: Any) -> list[torch.Tensor]:
        import torch

        arrays = (self._samples.take(rows).inputs[name] for name in self._names)
        return [torch.from_numpy(np.array(array if self._batched else array[0])) for array in arrays]


def _loss(module: nn.Module, inputs: list[torch.Tensor], target: Any, wanted: list[torch.Tensor]) -> torch.Tensor:
    """The loss of one batch over the first output (with class targets) or over all of them."""
    import torch
    from torch.nn import functional

    answers = _tensors(module(*inputs))
    if target is None or target.dtype.kind not in "iu" or answers[0].ndim != 2:
        return torch.stack([functional.mse_loss(a, w) for a, w in zip(answers, wanted, strict=True)]).sum()
    labels = torch.from_numpy(target.reshape(-1).astype(np.int64))
    soft, hard = _log_probabilities(wanted[0], _TEMPERATURE), _log_probabilities(answers[0], _TEMPERATURE)
    distillation = functional.kl_div(hard, soft, log_target=True, reduction="batchmean") * _TEMPERATURE**2
    return (functional.nll_loss(_log_probabilities(answers[0], 1.0), labels) + distillation) / 2


def _log_probabilities(answers: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits, or probabilities where a module ends in softmax, as log-probabilities at a temperature."""
    import torch

    sums = answers.sum(dim=1)
    if bool((answers >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        answers = answers.clamp_min(1e-9).log()
    return torch.log_softmax(answers / temperature, dim=1)


def _tensors(answer: Any) -> list[torch.Tensor]:
    if isinstance(answer, dict):
        return list(answer.values())
    return list(answer) if isinstance(answer, (tuple, list)) else [answer]
