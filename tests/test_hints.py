"""Hints: which layers are compared, and what the dimensions of their answers are taken for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from trained_cnn import Trained, load_trained
from training_fixtures import points

from variants.recipes.distillation.hints import listening, pair_layers
from variants.recipes.recipe import RecipeRejected


@pytest.fixture(scope="module")
def trained(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The digits CNN. Not to be changed."""
    return load_trained(trained_digits, tmp_path_factory.mktemp("trained"))


class Tokens(nn.Module):
    """Steps [batch, steps, 4] through layers of every kind to [batch, 2]; the recurrent one takes steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.bend, self.recurrent = nn.Linear(4, 6), nn.GELU(), nn.LSTM(6, 8)
        self.convolution, self.head = nn.Conv1d(8, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        steps = self.recurrent(self.bend(self.widen(input)).transpose(0, 1))[0].permute(1, 2, 0)
        answer: Tensor = self.head(self.convolution(steps).relu().mean(dim=2))
        return answer


STEPS = {"input": np.zeros((3, 7, 4), np.float32)}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("widen", (3, 6, 7)),
        ("bend", (3, 6, 7)),
        ("recurrent", (3, 8, 7)),
        ("convolution", (3, 5, 7)),
        ("head", (3, 2)),
    ],
)
def test_every_layers_answer_becomes_samples_by_channels(path: str, shape: tuple[int, ...]) -> None:
    """Whether channels are last or second, and steps or samples first."""
    module = Tokens().eval()
    (pair,) = pair_layers(module, module, STEPS, {path: path})
    with listening(module, [path]) as heard:
        module(torch.from_numpy(STEPS["input"]))
    assert pair.student.as_map(heard[path]).shape == shape
    assert pair.student.channels == shape[1]


def test_without_names_the_last_maps_before_the_heads_are_compared(trained: Trained) -> None:
    """A network with positions gives its last feature map, one without gives its last hidden layer."""
    tokens = Tokens().eval()
    (pair,) = pair_layers(tokens, tokens, STEPS, {})
    assert pair.teacher.path == "convolution"
    (pair,) = pair_layers(trained.module, trained.module, trained.training.inputs, {})
    assert isinstance(trained.module.get_submodule(pair.teacher.path), nn.Conv2d)
    assert pair.teacher.channels == 32
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    (pair,) = pair_layers(plain, plain, points().inputs, {})
    assert pair.student.path == "2"


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"convolutoin": "widen"}, "the teacher has no layer 'convolutoin'.*did you mean 'convolution'"),
        ({"convolution": "wide"}, "the student has no layer 'wide'.*did you mean 'widen'"),
        ({"convolution": "head"}, "'convolution' of the teacher answers in 3 dimensions and 'head' .* in 2"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(named: dict[str, str], why: str) -> None:
    """A mistyped name gets the nearest one; maps and vectors are not compared."""
    with pytest.raises(RecipeRejected, match=why):
        pair_layers(Tokens().eval(), Tokens().eval(), STEPS, named)


def test_a_network_of_one_layer_has_no_hints(tmp_path: Path) -> None:
    """There is nothing before its head; the reason says so."""
    single = nn.Linear(4, 2).eval()
    with pytest.raises(RecipeRejected, match="no layer before its head"):
        pair_layers(single, single, points().inputs, {})


class ChannelsLast(nn.LayerNorm):
    """Normalises the channels of images, which come second again afterwards."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNext(nn.Module):
    """A block that computes with channels last and answers with them second, scaled by a weight of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.widen, self.back = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        changed: Tensor = self.back(self.widen(self.depthwise(input).permute(0, 2, 3, 1)).relu())
        return input + self.scale * changed.permute(0, 3, 1, 2)


class Patches(nn.Module):
    """A vision transformer's beginning: a convolution whose positions become tokens, channels last."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, channels, 2, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        tokens: Tensor = self.project(input).flatten(2).transpose(1, 2)
        return tokens


class LayerScale(nn.Module):
    """A weight per channel, without a word on how many."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        return input * self.gamma


IMAGES = {"input": np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)}
AFTER_CONVOLUTION: dict[str, Callable[[int], nn.Module]] = {
    "PReLU": nn.PReLU,
    "one PReLU": lambda _: nn.PReLU(),
    "InstanceNorm": lambda channels: nn.InstanceNorm2d(channels, affine=True),
    "SyncBatchNorm": nn.SyncBatchNorm,
    "BatchNorm without weights": lambda channels: nn.BatchNorm2d(channels, affine=False),
    "LayerNorm": ChannelsLast,
    "ConvNeXt": ConvNext,
    "layer scale": LayerScale,
    "pooling": lambda _: nn.MaxPool2d(2),
    "patches": Patches,
}


ALL_ALIKE = [(kind, 8) for kind in AFTER_CONVOLUTION if kind not in ("LayerNorm", "ConvNeXt")]
"""Where three dimensions of one length are told apart by the class of a layer, or by the one before it."""


@pytest.mark.parametrize(("kind", "channels"), [*((kind, 24) for kind in AFTER_CONVOLUTION), *ALL_ALIKE])
def test_channels_are_found_after_a_convolution(kind: str, channels: int) -> None:
    """The dimension as long as the layer says; of 8 channels of 8x8 pixels the class tells."""
    module = nn.Sequential(nn.Conv2d(3, channels, 1), AFTER_CONVOLUTION[kind](channels), nn.Flatten(), nn.LazyLinear(2))
    module(torch.zeros(1, 3, 8, 8))
    (pair,) = pair_layers(module.eval(), module, IMAGES, {"1": "1"})
    with listening(module, ["1"]) as heard:
        module(torch.from_numpy(IMAGES["input"]))
    assert pair.teacher.channels == channels
    assert pair.teacher.channel_axis == (2 if kind == "patches" else 1)
    assert pair.teacher.as_map(heard["1"]).shape[:2] == (3, channels)


def test_a_layer_without_weights_is_like_the_one_before_it() -> None:
    """A ReLU after a one-dimensional convolution has channels second, after a linear layer last."""
    module = nn.Sequential(nn.Conv1d(3, 24, 3, padding=1), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Flatten())
    (first, second) = pair_layers(module, module, {"input": IMAGES["input"][..., 0]}, {"1": "1", "3": "3"})
    assert [first.teacher.channel_axis, second.teacher.channel_axis] == [1, 2]


def test_what_is_heard_stays_as_it_was() -> None:
    """An activation in place changes the layer's answer afterwards, but not what was heard of it."""
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(inplace=True), nn.Linear(8, 2))
    inputs = torch.from_numpy(points().inputs["input"])
    with listening(module, ["0"]) as heard:
        module(inputs)
    assert torch.equal(heard["0"], module[0](inputs))
    assert heard["0"].min() < 0
