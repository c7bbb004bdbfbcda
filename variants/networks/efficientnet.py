"""EfficientNet: inverted residuals with squeeze-and-excite and SiLU, scaled in width and depth at once.

Tan and Le, "EfficientNet", 2019, table 1. Without the stochastic depth of the authors' training code: it is no part
of the network, and a short distillation gains nothing from it.
"""

from __future__ import annotations

import math

from torch import nn

from variants.networks.blocks import HALVINGS, ImageNetwork, InvertedResidual, Shape, convolution, scaled, thinned

# expansion, kernel, stride of the first block, channels, blocks
_STAGES = (
    (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)  # fmt: skip
_STEM, _LAST_EXPANSION, _SQUEEZE = 32, 4, 4


def efficientnet(
    in_channels: int = 3,
    classes: int = 1000,
    *,
    width: float = 1.0,
    depth: float = 1.0,
    halvings: int = HALVINGS,
    dropout: float = 0.2,
) -> nn.Module:
    """B0 at width and depth 1; B1 is (1.0, 1.1), B2 (1.1, 1.2), B3 (1.2, 1.4), B4 (1.4, 1.8).

    `halvings` below 5 keeps the resolution of small images for longer (see `halvings_for`).
    """
    first, *strides = thinned([2, *(stage[2] for stage in _STAGES)], halvings)
    channels = scaled(_STEM, width)
    layers: list[nn.Module] = [convolution(in_channels, channels, 3, stride=first, activation=nn.SiLU)]
    for (expansion, kernel, _, base, blocks), first_stride in zip(_STAGES, strides, strict=True):
        out = scaled(base, width)
        for block in range(math.ceil(blocks * depth)):
            stride = first_stride if block == 0 else 1
            shape = Shape(channels, scaled(channels * expansion), out, kernel, stride, max(1, channels // _SQUEEZE))
            layers.append(InvertedResidual(shape, nn.SiLU, (nn.SiLU, nn.Sigmoid)))
            channels = out
    last = _LAST_EXPANSION * channels
    layers.append(convolution(channels, last, 1, activation=nn.SiLU))
    return ImageNetwork(nn.Sequential(*layers), nn.Sequential(nn.Dropout(dropout), nn.Linear(last, classes)))
