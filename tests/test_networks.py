"""The lightweight networks: the papers' sizes to the weight, and what they make of small images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_fixtures import run
from torch import nn

from variants.export import export_graph
from variants.networks.blocks import InvertedResidual, Shape, SqueezeExcite, halvings_for, scaled, thinned
from variants.networks.efficientnet import efficientnet
from variants.networks.mobilenet_v2 import mobilenet_v2
from variants.networks.mobilenet_v3 import mobilenet_v3

torch.set_num_threads(1)  # several threads of torch get in each other's way on a shared host

Make = Callable[..., nn.Module]
FAMILIES: list[Any] = [
    mobilenet_v2,
    mobilenet_v3,
    partial(mobilenet_v3, size="large"),
    partial(efficientnet, depth=0.5),
]


def weights(network: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (mobilenet_v2, 3_504_872),
        (partial(mobilenet_v2, width=0.5), 1_968_680),
        (mobilenet_v3, 2_542_856),
        (partial(mobilenet_v3, size="large"), 5_483_032),
        (efficientnet, 5_288_548),
        (partial(efficientnet, depth=1.1), 7_794_184),
        (partial(efficientnet, width=1.1, depth=1.2), 9_109_994),
    ],
    ids=["v2", "v2 at half width", "v3 small", "v3 large", "B0", "B1", "B2"],
)
def test_they_have_the_published_number_of_weights(make: Make, count: int) -> None:
    """For 1000 classes of colour images, to the last weight: torchvision publishes the same."""
    assert weights(make()) == count


def test_an_inverted_residual_by_hand() -> None:
    """8 channels, expanded to 16, 3x3 depthwise, squeezed to 4, back to 8: counted by hand, norms two a channel."""
    block = InvertedResidual(Shape(8, 16, 8, 3, stride=1, squeezed=4), nn.ReLU)
    expansion, depthwise, projection = 8 * 16 + 2 * 16, 9 * 16 + 2 * 16, 16 * 8 + 2 * 8
    squeeze = (16 * 4 + 4) + (4 * 16 + 16)
    assert weights(block) == expansion + depthwise + squeeze + projection


def test_the_shortcut_is_there_where_shapes_stay() -> None:
    """A block whose weights are all zero passes its input on, unless it changes size or channels."""
    image = torch.randn(2, 8, 4, 4)
    for shape, passes in (
        (Shape(8, 16, 8, 3, 1), True),
        (Shape(8, 16, 8, 3, 2), False),
        (Shape(8, 16, 16, 3, 1), False),
    ):
        block = InvertedResidual(shape, nn.ReLU).eval()
        for parameter in block.parameters():
            parameter.data.zero_()
        answer = block(image)
        assert torch.equal(answer, image) is passes
        assert answer.shape == (2, shape.out, 4 // shape.stride, 4 // shape.stride)


def test_the_projection_has_no_activation() -> None:
    """The narrow end of a block is linear: negative values come out of it."""
    torch.manual_seed(0)
    assert InvertedResidual(Shape(8, 16, 16, 3, 1), nn.ReLU).eval()(torch.randn(2, 8, 4, 4)).min() < 0


def test_squeeze_excite_weighs_channels_by_their_mean() -> None:
    """With convolutions that pass the mean on, each channel is multiplied by the sigmoid of its own mean."""
    layer = SqueezeExcite(2, 2, nn.Identity, nn.Sigmoid)
    passing = {"weight": torch.eye(2).reshape(2, 2, 1, 1), "bias": torch.zeros(2)}
    for convolution in (layer.weigh[1], layer.weigh[3]):
        convolution.load_state_dict(passing)
    image = torch.tensor([[[[1.0, 3.0]], [[0.0, -2.0]]]])
    expected = image * torch.tensor([2.0, -1.0]).sigmoid().reshape(1, 2, 1, 1)
    torch.testing.assert_close(layer(image), expected)


def test_widths_are_multiples_of_eight_and_hardly_less_than_asked() -> None:
    """The rule of the MobileNet papers: 12 rounds up, 11 down but not by more than a tenth, and 8 is the least."""
    assert [scaled(32, 0.5), scaled(24, 0.5), scaled(1), scaled(11), scaled(90), scaled(92)] == [16, 16, 8, 16, 88, 96]


def test_small_images_are_halved_less_often() -> None:
    """The first strides go; at least 4 pixels are left, and 224 pixels are halved as in the papers."""
    assert [halvings_for(pixels) for pixels in (7, 8, 16, 28, 32, 64, 224)] == [0, 1, 2, 2, 3, 4, 5]
    assert thinned([2, 1, 2, 1, 2], 2) == [1, 1, 2, 1, 2]
    assert thinned([2, 1, 2], 5) == [2, 1, 2]


@pytest.mark.parametrize("make", FAMILIES)
@pytest.mark.parametrize(("pixels", "left"), [(8, 4), (32, 4), (64, 4)])
def test_any_image_becomes_one_answer_per_class(make: Make, pixels: int, left: int) -> None:
    """Grey images of several sizes; the last feature map keeps 4 pixels a side."""
    network: Any = make(1, 7, width=0.25, halvings=halvings_for(pixels)).eval()
    image = torch.randn(2, 1, pixels, pixels)
    assert network.features(image).shape[2:] == (left, left)
    assert network(image).shape == (2, 7)


@pytest.mark.parametrize("make", FAMILIES)
def test_they_learn(make: Make) -> None:
    """A few steps on two patterns of 8x8 pixels tell them apart in training mode: gradients reach every weight."""
    torch.manual_seed(0)
    network = make(1, 2, width=0.25, halvings=1, dropout=0.0)
    images, labels = torch.randn(2, 1, 8, 8).repeat(8, 1, 1, 1), torch.arange(2).repeat(8)
    optimiser = torch.optim.Adam(network.parameters(), lr=0.002)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(network(images + 0.1 * torch.randn_like(images)), labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.item())
        optimiser.step()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert losses[-1] < losses[0] / 2


@pytest.mark.slow
@pytest.mark.parametrize("make", FAMILIES)
def test_they_are_exported_with_a_batch_that_varies(make: Make, tmp_path: Path) -> None:
    """The graph answers like the network at batch 1, 3 and 9, which the export itself proves, and at 5."""
    torch.manual_seed(0)
    network = make(1, 3, width=0.25, halvings=1).eval()
    images = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    export_graph(network, {"image": images}, tmp_path / "g.onnx", batched=True)
    with torch.inference_mode():
        expected = network(torch.from_numpy(images)).numpy()
    np.testing.assert_allclose(run(tmp_path / "g.onnx", image=images), expected, atol=1e-4)
