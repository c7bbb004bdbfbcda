"""MobileNetV3, small and large: inverted residuals with squeeze-and-excite and hardswish (Howard et al., 2019)."""

from __future__ import annotations

from typing import Literal

from torch import nn

from variants.networks.blocks import HALVINGS, ImageNetwork, InvertedResidual, Shape, convolution, scaled, thinned

_R, _H = nn.ReLU, nn.Hardswish
# kernel, expanded, out, squeeze-and-excite, activation, stride: tables 1 and 2
_SMALL = (
    (3, 16, 16, True, _R, 2), (3, 72, 24, False, _R, 2), (3, 88, 24, False, _R, 1), (5, 96, 40, True, _H, 2),
    (5, 240, 40, True, _H, 1), (5, 240, 40, True, _H, 1), (5, 120, 48, True, _H, 1), (5, 144, 48, True, _H, 1),
    (5, 288, 96, True, _H, 2), (5, 576, 96, True, _H, 1), (5, 576, 96, True, _H, 1),
)  # fmt: skip
_LARGE = (
    (3, 16, 16, False, _R, 1), (3, 64, 24, False, _R, 2), (3, 72, 24, False, _R, 1), (5, 72, 40, True, _R, 2),
    (5, 120, 40, True, _R, 1), (5, 120, 40, True, _R, 1), (3, 240, 80, False, _H, 2), (3, 200, 80, False, _H, 1),
    (3, 184, 80, False, _H, 1), (3, 184, 80, False, _H, 1), (3, 480, 112, True, _H, 1), (3, 672, 112, True, _H, 1),
    (5, 672, 160, True, _H, 2), (5, 960, 160, True, _H, 1), (5, 960, 160, True, _H, 1),
)  # fmt: skip
_TABLES = {"small": (_SMALL, 1024), "large": (_LARGE, 1280)}
_STEM, _LAST_EXPANSION, _SQUEEZE = 16, 6, 4


def mobilenet_v3(
    in_channels: int = 3,
    classes: int = 1000,
    *,
    size: Literal["small", "large"] = "small",
    width: float = 1.0,
    halvings: int = HALVINGS,
    dropout: float = 0.2,
) -> nn.Module:
    """A network of `width` times the paper's channels, its hidden layer before the classes included.

    `halvings` below 5 keeps the resolution of small images for longer (see `halvings_for`).
    """
    table, hidden = _TABLES[size]
    first, *strides = thinned([2, *(block[-1] for block in table)], halvings)
    channels = scaled(_STEM, width)
    layers: list[nn.Module] = [convolution(in_channels, channels, 3, stride=first, activation=nn.Hardswish)]
    for (kernel, expanded, out, squeezes, activation, _), stride in zip(table, strides, strict=True):
        wide = scaled(expanded, width)
        squeezed = scaled(wide // _SQUEEZE) if squeezes else 0
        shape = Shape(channels, wide, scaled(out, width), kernel, stride, squeezed)
        layers.append(InvertedResidual(shape, activation, (nn.ReLU, nn.Hardsigmoid)))
        channels = shape.out
    last = _LAST_EXPANSION * channels
    layers.append(convolution(channels, last, 1, activation=nn.Hardswish))
    hidden = scaled(hidden, width)
    head = (nn.Linear(last, hidden), nn.Hardswish(), nn.Dropout(dropout), nn.Linear(hidden, classes))
    return ImageNetwork(nn.Sequential(*layers), nn.Sequential(*head))
