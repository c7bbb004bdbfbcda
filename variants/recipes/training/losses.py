"""What a student is trained to make small: its task's loss, and how far it is from its teacher.

Rules of this file: pure functions of tensors, samples along the first dimension; every loss is the mean over what it
compares, so that weights mean the same at any batch size. They compute in at least 32 bits, inside autocast too.

Response: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015. Hints: Romero et al., "FitNets",
2015. Relations: Park, Kim, Lu, Cho, "Relational Knowledge Distillation", 2019.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def task_loss(answer: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy for class numbers (int64, [samples]), the squared distance to a target of the answer's shape."""
    from torch.nn import functional

    if target.dtype.is_floating_point:
        return functional.mse_loss(answer.float(), target)
    return functional.nll_loss(log_probabilities(answer), target)


def answer_loss(answers: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> torch.Tensor:
    """The squared distance to the teacher's answers, summed over the outputs."""
    import torch
    from torch.nn import functional

    return torch.stack([functional.mse_loss(a.float(), w.float()) for a, w in zip(answers, wanted, strict=True)]).sum()


def response_loss(answer: torch.Tensor, wanted: torch.Tensor, temperature: float) -> torch.Tensor:
    """KL of the teacher's softened classes [samples, classes] to the student's, times T² (Hinton et al., 2015).

    The factor keeps its gradients as large as a hard label's, whatever the temperature.
    """
    from torch.nn import functional

    theirs, ours = log_probabilities(wanted, temperature), log_probabilities(answer, temperature)
    return functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2


def hint_loss(feature: torch.Tensor, hint: torch.Tensor, projection: nn.Module) -> torch.Tensor:
    """The squared distance of a student's projected activations to its teacher's (Romero et al., 2015).

    Both are [samples, channels, *positions]; the finer one is averaged down to the other's positions. `projection` maps
    channels to channels, which at every position is what a 1x1 convolution does.
    """
    import torch
    from torch.nn import functional

    feature, hint = pooled_alike(feature.float(), hint.float())
    with torch.autocast(feature.device.type, enabled=False):
        projected = projection(feature.movedim(1, -1)).movedim(-1, 1)
    return functional.mse_loss(projected, hint)


def pooled_alike(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two maps [samples, channels, *positions] averaged down to the smaller of their sizes along each dimension."""
    from torch.nn import functional

    if left.shape[2:] == right.shape[2:]:
        return left, right
    size: Any = [min(pair) for pair in zip(left.shape[2:], right.shape[2:], strict=True)]
    pools = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)
    pool = pools[len(size) - 1]
    return pool(left, size), pool(right, size)


def distance_loss(feature: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
    """Huber distance of all pairs' distances, each set divided by its mean: RKD-D (Park et al., 2019).

    Each is [samples, ...] of at least two samples; their widths may differ.
    """
    from torch.nn import functional

    ours, theirs = _relative_distances(feature), _relative_distances(hint)
    return functional.smooth_l1_loss(ours, theirs)


def _relative_distances(feature: torch.Tensor) -> torch.Tensor:
    """The distances of all pairs of samples over their mean; zeros where all samples are alike."""
    from torch.nn import functional

    distances = functional.pdist(feature.float().flatten(1))
    return distances / distances.mean().clamp_min(1e-12)


def angle_loss(feature: torch.Tensor, hint: torch.Tensor) -> torch.Tensor:
    """Huber distance of the cosines at every corner of every triple of samples: RKD-A (Park et al., 2019).

    Each is [samples, ...] of at least three samples; their widths may differ.
    """
    import torch
    from torch.nn import functional

    with torch.autocast(feature.device.type, enabled=False):
        ours, theirs = _cosines(feature), _cosines(hint)
    others = ~torch.eye(len(feature), dtype=torch.bool, device=feature.device)
    triples = others[:, :, None] & others[:, None, :] & others
    return functional.smooth_l1_loss(ours[triples], theirs[triples])


def _cosines(feature: torch.Tensor) -> torch.Tensor:
    """Cosines [corner, sample, sample] of the angle between two samples seen from a third; 0 from one just like it.

    They come from the products of all pairs, [samples, samples], for differences of wide features would fill the
    memory. Centred and in 64 bits, because what is left of large products is small.
    """
    import torch

    flat = feature.flatten(1).double()
    flat = flat - flat.mean(dim=0)
    products = flat @ flat.T
    squares = products.diagonal()
    apart = squares[:, None] + squares - 2 * products
    alike = apart <= 1e-12 * squares.max()
    lengths = torch.where(alike, 1.0, apart).sqrt()
    dots = products - products[:, :, None] - products[:, None, :] + squares[:, None, None]
    cosines = dots / (lengths[:, :, None] * lengths[:, None, :])
    return cosines.masked_fill(alike[:, :, None] | alike[:, None, :], 0.0).float()


def log_probabilities(answers: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Logits [samples, classes], or probabilities where a module ends in softmax, as log-probabilities."""
    import torch

    answers = answers.float()
    sums = answers.sum(dim=1)
    if bool((answers >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        answers = answers.clamp_min(torch.finfo(answers.dtype).tiny).log()
    return torch.log_softmax(answers / temperature, dim=1)
