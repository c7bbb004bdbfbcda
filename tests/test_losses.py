"""The losses of distillation beside values computed by hand, in the papers' formulas."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from variants.recipes.training.losses import (
    angle_loss,
    answer_loss,
    distance_loss,
    hint_loss,
    log_probabilities,
    response_loss,
    task_loss,
)

EQUILATERAL = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, math.sqrt(0.75)]])
RIGHT_ANGLED = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
"""Sides 3, 4 and 5; the cosines at its corners are 0, 3/5 and 4/5."""


def test_response_is_the_softened_divergence_times_temperature_squared() -> None:
    """KL(teacher || student) of softmax(logits / 2), the mean over two samples, times 4; the direction matters."""
    teacher = np.array([[2.0, 0.0, -2.0], [1.0, 1.0, 4.0]])
    student = np.array([[0.0, 0.0, 0.0], [3.0, 1.0, 0.0]])
    p, q = (np.exp(logits / 2) / np.exp(logits / 2).sum(axis=1, keepdims=True) for logits in (teacher, student))
    expected = 4 * (p * np.log(p / q)).sum(axis=1).mean()
    found = response_loss(torch.tensor(student), torch.tensor(teacher), 2.0)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    backwards = 4 * (q * np.log(q / p)).sum(axis=1).mean()
    assert abs(backwards - expected) > 0.05  # so the assertion above tells the two apart


def test_a_known_response() -> None:
    """Odds of 3 : 1 against odds of 1 : 1 once softened: a divergence of 3/4 ln 3/2 + 1/4 ln 1/2, times 25."""
    teacher, student = torch.tensor([[5 * math.log(3.0), 0.0]]), torch.zeros(1, 2)
    apart = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert response_loss(student, teacher, 5.0).item() == pytest.approx(25 * apart, rel=1e-5)


def test_probabilities_are_taken_for_what_they_are() -> None:
    """A module that ends in softmax is softened like its logits would be."""
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]])
    torch.testing.assert_close(log_probabilities(logits.softmax(1), 3.0), log_probabilities(logits, 3.0))


@pytest.mark.parametrize("margin", [30.0, 60.0])
def test_certain_probabilities_are_not_distorted(margin: float) -> None:
    """A softmax as sure as a margin of 30 is softened, and learnt from, like its logits."""
    logits = torch.tensor([[margin, 0.0, -5.0]], requires_grad=True)
    torch.testing.assert_close(log_probabilities(logits.softmax(1), 4.0), log_probabilities(logits, 4.0))
    by_softmax, by_logits = (
        torch.autograd.grad(task_loss(answer, torch.tensor([1])), logits)[0] for answer in (logits.softmax(1), logits)
    )
    torch.testing.assert_close(by_softmax, by_logits)


def test_probabilities_of_zero_give_finite_gradients() -> None:
    """Beyond what 32 bits can say a probability is 0, of which no logarithm may become infinite."""
    logits = torch.tensor([[200.0, 0.0, -5.0]], requires_grad=True)
    task_loss(logits.softmax(1), torch.tensor([1])).backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert bool(logits.grad.isfinite().all())


def test_the_task_is_cross_entropy_or_squared_distance() -> None:
    """Class numbers are learnt by their negative log probability, values by their squared distance."""
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    assert task_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2)
    assert task_loss(torch.tensor([[1.0], [4.0]]), torch.tensor([[2.0], [2.0]])).item() == pytest.approx(2.5)


def test_answers_of_several_outputs_add_up() -> None:
    """Each output's mean squared distance counts once, whatever its size."""
    ours = [torch.tensor([[1.0, 1.0]]), torch.tensor([[3.0]])]
    theirs = [torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0]])]
    assert answer_loss(ours, theirs).item() == pytest.approx(2.0 + 9.0)


def weighing(rows: list[list[float]]) -> nn.Linear:
    """A projection with these weights [out, in] and no bias."""
    projection = nn.Linear(len(rows[0]), len(rows), bias=False)
    projection.weight.data = torch.tensor(rows)
    return projection


def test_hints_are_compared_at_each_position_through_the_projection() -> None:
    """One student channel becomes two: x -> (x, -2x). The distances 0, 4, 1 and 1 of two positions average 1.5."""
    projection = weighing([[1.0], [-2.0]])
    feature = torch.tensor([[[1.0, 3.0]]])
    hint = torch.tensor([[[1.0, 1.0], [-1.0, -7.0]]])  # off by 0 and 2 in the first channel, 1 and 1 in the second
    assert hint_loss(feature, hint, projection).item() == pytest.approx((0 + 4 + 1 + 1) / 4)


def test_the_finer_map_is_averaged_down() -> None:
    """A teacher's 4x4 map against a student's 2x2: each student pixel is compared with the mean of four."""
    hint = torch.arange(16.0).reshape(1, 1, 4, 4)  # means of the quarters: 2.5, 4.5, 10.5, 12.5
    feature = torch.tensor([[[[2.5, 4.5], [10.5, 13.5]]]])
    assert hint_loss(feature, hint, weighing([[1.0]])).item() == pytest.approx(1 / 4)
    assert hint_loss(hint, feature, weighing([[1.0]])).item() == pytest.approx(1 / 4)


def test_hints_of_fully_connected_layers_have_no_positions() -> None:
    """[samples, channels] alone is compared as it is: (1 + 2 - 4)² is 1."""
    found = hint_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[4.0]]), weighing([[1.0, 1.0]]))
    assert found.item() == pytest.approx(1.0)


def test_the_projection_learns_too() -> None:
    """Gradients reach the student's layer and the projection: of (2x - 1)² at x = 1 they are 4 and 2."""
    projection, feature = weighing([[2.0]]), torch.ones(1, 1, requires_grad=True)
    hint_loss(feature, torch.ones(1, 1), projection).backward()  # type: ignore[no-untyped-call]
    assert feature.grad is not None
    assert projection.weight.grad is not None
    assert [feature.grad.item(), projection.weight.grad.item()] == [4.0, 2.0]


def test_distances_are_compared_relative_to_their_mean() -> None:
    """Sides 3, 4, 5 over their mean 4 against 1, 1, 1: the Huber loss of 1/4, 0 and 1/4 is 0.5 / 16 twice, over 3."""
    assert distance_loss(EQUILATERAL, RIGHT_ANGLED).item() == pytest.approx(2 * (0.5 / 16) / 3, rel=1e-5)


def test_far_distances_are_compared_linearly() -> None:
    """Beyond 1 the Huber loss is linear: of ten distances four are 8 / 3.2 = 2.5, 1.5 away, and six are 0, 1 away."""
    line = torch.tensor([[0.0], [0.0], [0.0], [0.0], [8.0]])
    simplex = torch.eye(5)  # all ten distances alike
    assert distance_loss(line, simplex).item() == pytest.approx((4 * (1.5 - 0.5) + 6 * 0.5) / 10, rel=1e-5)


def test_angles_are_compared_by_their_cosines() -> None:
    """Cosines 0, 3/5 and 4/5 against three times 1/2: half the squares of 0.5, 0.1 and 0.3, over three corners."""
    expected = (0.25 + 0.01 + 0.09) / 2 / 3
    assert angle_loss(EQUILATERAL, RIGHT_ANGLED).item() == pytest.approx(expected, rel=1e-4)


def angles_by_differences(feature: Tensor, hint: Tensor) -> Tensor:
    """RKD-A as the paper has it: the directions of all pairs, and the products of those that share a corner."""
    cosines = []
    for each in (feature, hint):
        directions = nn.functional.normalize(each.unsqueeze(0) - each.unsqueeze(1), dim=2)
        cosines.append(directions @ directions.transpose(1, 2))
    triples = [(i, j, k) for i in range(len(hint)) for j in range(len(hint)) for k in range(len(hint))]
    real = [slice(None), *zip(*[each for each in triples if len(set(each)) == 3], strict=True)]
    ours, theirs = (each[tuple(torch.tensor(axis) for axis in real[1:])] for each in cosines)
    return nn.functional.smooth_l1_loss(ours, theirs)


def test_angles_need_no_memory_for_differences() -> None:
    """Values and gradients are the formula's, far from the origin too; nothing kept has [samples, samples, width]."""
    generator = torch.Generator().manual_seed(0)
    samples, width = 8, 500
    hint = torch.randn(samples, 3, generator=generator)
    feature = (torch.randn(samples, width, generator=generator) + 10).requires_grad_()
    kept: list[int] = []

    def note(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        found = angle_loss(feature, hint)
    expected = angles_by_differences(feature, hint)
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(loss, feature)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-8)
    assert max(kept) <= samples * width


def test_samples_that_coincide_on_one_side_count_by_real_triples_alone() -> None:
    """Two corners in one sample make no angle: of six corners the two from the twins have cosine 0, the far one's 1."""
    feature = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    expected = (4 * 0.5 * 0.5**2 + 2 * 0.5 * 0.5**2) / 6  # against 1/2 at every corner of the equilateral one
    assert angle_loss(feature, EQUILATERAL).item() == pytest.approx(expected, rel=1e-5)


LOSSES: list[Callable[[Tensor, Tensor], Tensor]] = [
    distance_loss,
    angle_loss,
    lambda ours, theirs: hint_loss(ours, theirs, weighing([[1.0, 0.3, 0.01, 0.7], [0.1, 1.0, 0.2, 0.9]])),
    lambda ours, _: task_loss(ours, torch.tensor([0, 1, 2, 3, 0])),
    lambda ours, _: response_loss(ours, ours.flip(0), 4.0),
    lambda ours, _: answer_loss([ours], [ours.flip(0)]),
]


@pytest.mark.parametrize("reduced", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES, ids=["distance", "angle", "hint", "task", "response", "answer"])
def test_losses_do_not_lose_bits_under_autocast(loss: Callable[[Tensor, Tensor], Tensor], reduced: torch.dtype) -> None:
    """Whatever the layers compute in, a loss is what it is in 32 bits, to the bit."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(5, 4, generator=generator), torch.randn(5, 2, generator=generator)
    with torch.autocast("cpu", reduced):
        found = loss(ours, theirs)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(ours, theirs))


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_relations_do_not_see_scale_place_turn_or_width(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """A student whose samples lie alike in a wider space, turned, shifted and enlarged, has nothing to learn."""
    torch.manual_seed(0)
    hint = torch.randn(6, 2, 2)
    turned = hint.flatten(1) @ torch.linalg.qr(torch.randn(7, 7))[0][:4]
    assert loss(5 * turned + 3, hint).item() == pytest.approx(0.0, abs=1e-9)
    assert loss(torch.randn(6, 7), hint).item() > 1e-3


@pytest.mark.parametrize("loss", [distance_loss, angle_loss])
def test_equal_samples_give_finite_gradients(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Two identical samples are no distance apart and have no direction; training must survive that."""
    feature = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0], [3.0, 1.0]], requires_grad=True)
    loss(feature, torch.randn(4, 3)).backward()  # type: ignore[no-untyped-call]
    assert feature.grad is not None
    assert bool(feature.grad.isfinite().all())
