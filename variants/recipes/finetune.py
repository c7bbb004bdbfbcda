"""Fine-tuning: a changed module learns to answer like its original again.

With class targets the loss is half cross-entropy, half distillation from the original's answers (Hinton et al., 2015);
otherwise the squared distance to the original's answers. Seeded; the module is changed in place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Samples, spread
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
    batches = _batches(teacher, samples, batched=ingredients.source.max_batch > 0)
    steps = epochs * batches.per_epoch
    optimiser = torch.optim.Adam(module.parameters(), lr=config.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.learning_rate, total_steps=max(2, steps + 1))
    module.train()
    for epoch in range(epochs):
        for number, (inputs, target) in enumerate(batches.shuffled(generator)):
            loss = _loss(module, teacher, inputs, target)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            ingredients.progress((epoch * batches.per_epoch + number + 1) / steps)
    module.eval()
    return epochs


class _Batches:
    """Training samples as tensors in the order of `forward`."""

    def __init__(self, names: list[str], samples: Samples, *, batched: bool) -> None:
        self._names, self._samples, self._batched = names, samples, batched
        # whole batches, the remainder spread over them: batch normalisation fails on a last batch of one
        self.per_epoch = max(1, len(samples) // _BATCH) if batched else len(samples)

    def shuffled(self, generator: np.random.Generator) -> Any:
        """All batches once, in a new order: (inputs, target or None)."""
        for rows in np.array_split(generator.permutation(len(self._samples)), self.per_epoch):
            some = self._samples.take(rows if self._batched else rows[:1])
            yield [self._tensor(some.inputs[name]) for name in self._names], some.target

    def _tensor(self, array: Any) -> torch.Tensor:
        import torch

        return torch.from_numpy(np.array(array if self._batched else array[0]))


def _batches(teacher: nn.Module, samples: Samples, *, batched: bool) -> _Batches:
    return _Batches(input_names(teacher, samples.inputs), samples, batched=batched)


def _loss(module: nn.Module, teacher: nn.Module, inputs: list[torch.Tensor], target: Any) -> torch.Tensor:
    """The loss of one batch over the first output (with class targets) or over all of them."""
    import torch
    from torch.nn import functional

    answers = _tensors(module(*inputs))
    with torch.no_grad():
        wanted = _tensors(teacher(*inputs))
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
