"""The pieces that lightweight networks share: inverted residuals, squeeze-and-excite, widths that fit a processor.

Rules of this file: images are [batch, channels, height, width]; shapes and layer order are the papers', so that at
width 1 the counts of weights are theirs.

Inverted residuals: Sandler et al., "MobileNetV2", 2018. Squeeze-and-excite: Hu et al., 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import Tensor, nn

Activation = Callable[[], nn.Module]

HALVINGS = 5
"""How often the papers' networks halve an image of 224 pixels, down to 7."""


def scaled(channels: float, width: float = 1.0) -> int:
    """`channels` times `width` as a multiple of 8, never less than nine tenths of it (the MobileNet papers' rule)."""
    wanted = channels * width
    rounded = max(8, int(wanted + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * wanted else rounded


def halvings_for(pixels: int) -> int:
    """How often to halve an image of this size: down to at least 4 pixels, and five times at most."""
    return min(HALVINGS, max(0, pixels.bit_length() - 3))


def thinned(strides: Iterable[int], halvings: int) -> list[int]:
    """A network's strides with only the last `halvings` of those that halve: the first ones become 1."""
    kept = list(strides)
    halving = [position for position, stride in enumerate(kept) if stride > 1]
    for position in halving[: max(0, len(halving) - halvings)]:
        kept[position] = 1
    return kept


def convolution(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: Activation | None = None
) -> nn.Sequential:
    """A convolution that keeps the size at stride 1, batch normalisation, and an activation where one is given."""
    layers = [
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out),
    ]
    return nn.Sequential(*layers, *([activation()] if activation else []))


class SqueezeExcite(nn.Module):
    """Weighs each channel by what the whole image says: average, two 1x1 convolutions, a gate in [0, 1]."""

    def __init__(self, channels: int, squeezed: int, activation: Activation, gate: Activation) -> None:
        super().__init__()
        self.weigh = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            activation(),
            nn.Conv2d(squeezed, channels, 1),
            gate(),
        )

    def forward(self, image: Tensor) -> Tensor:
        """The same shape again."""
        weighed: Tensor = image * self.weigh(image)
        return weighed


@dataclass(frozen=True, slots=True)
class Shape:
    """What distinguishes one inverted residual from the next; `squeezed` is 0 without squeeze-and-excite."""

    channels: int
    expanded: int
    out: int
    kernel: int
    stride: int
    squeezed: int = 0


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, squeeze-and-excite, 1x1 projection without activation, and a shortcut.

    The expansion is left out where it would not expand; the shortcut is there where size and channels stay.
    """

    def __init__(
        self, shape: Shape, activation: Activation, squeeze: tuple[Activation, Activation] = (nn.ReLU, nn.Sigmoid)
    ) -> None:
        super().__init__()
        expanded = shape.expanded
        layers: list[nn.Module] = []
        if expanded != shape.channels:
            layers.append(convolution(shape.channels, expanded, 1, activation=activation))
        layers.append(
            convolution(expanded, expanded, shape.kernel, stride=shape.stride, groups=expanded, activation=activation)
        )
        if shape.squeezed:
            layers.append(SqueezeExcite(expanded, shape.squeezed, *squeeze))
        self.change = nn.Sequential(*layers, convolution(expanded, shape.out, 1))
        self.is_residual = shape.stride == 1 and shape.channels == shape.out

    def forward(self, image: Tensor) -> Tensor:
        """[batch, channels, height, width] -> [batch, out, height / stride, width / stride]."""
        changed: Tensor = self.change(image)
        return image + changed if self.is_residual else changed


class ImageNetwork(nn.Module):
    """Features, their average over the image, and a head: [batch, in_channels, height, width] -> [batch, classes]."""

    def __init__(self, features: nn.Sequential, head: nn.Sequential) -> None:
        super().__init__()
        self.features, self.head = features, head
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out")

    def forward(self, image: Tensor) -> Tensor:
        """One answer per class, not yet probabilities."""
        answers: Tensor = self.head(self.features(image).mean(dim=(2, 3)))
        return answers
