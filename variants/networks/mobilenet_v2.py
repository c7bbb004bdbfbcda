"""MobileNetV2: inverted residuals with linear bottlenecks (Sandler et al., 2018, table 2)."""

from __future__ import annotations

from torch import nn

from variants.networks.blocks import HALVINGS, ImageNetwork, InvertedResidual, Shape, convolution, scaled, thinned

# expansion, channels, blocks, stride of the first block
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _LAST = 32, 1280


def mobilenet_v2(
    in_channels: int = 3, classes: int = 1000, *, width: float = 1.0, halvings: int = HALVINGS, dropout: float = 0.2
) -> nn.Module:
    """A network of `width` times the paper's channels; its last layer is never made narrower, as in the paper.

    `halvings` below 5 keeps the resolution of small images for longer (see `halvings_for`).
    """
    first, *strides = thinned([2, *(stage[-1] for stage in _STAGES)], halvings)
    channels = scaled(_STEM, width)
    layers: list[nn.Module] = [convolution(in_channels, channels, 3, stride=first, activation=nn.ReLU6)]
    for (expansion, base, blocks, _), first_stride in zip(_STAGES, strides, strict=True):
        out = scaled(base, width)
        for block in range(blocks):
            stride = first_stride if block == 0 else 1
            layers.append(InvertedResidual(Shape(channels, channels * expansion, out, 3, stride), nn.ReLU6))
            channels = out
    last = scaled(_LAST, max(1.0, width))
    layers.append(convolution(channels, last, 1, activation=nn.ReLU6))
    return ImageNetwork(nn.Sequential(*layers), nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes)))
