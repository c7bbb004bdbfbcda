"""Larger architectures with random weights: for speed only, since there is no accuracy in them to lose."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.families.networks import CLASSES, Block
from benchmarks.models import Block as Residual


def resnet() -> nn.Module:
    """ResNet-18's widths for [batch, 3, 64, 64]: about 1.1 GFLOP."""
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    blocks = (
        Residual(before, after, 1 + (after != before)) for before, after in zip([64, *widths], widths, strict=False)
    )
    stem = (nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, CLASSES))


def encoder() -> nn.Module:
    """Six transformer layers of width 384 for [batch, 128, 384]: about 2.8 GFLOP."""
    return nn.Sequential(*(Block(384, 6) for _ in range(6)), nn.LayerNorm(384), nn.Linear(384, CLASSES))


class Recurrent(nn.Module):
    """Two LSTM layers of 256 for [batch, 64, 64] -> [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.LSTM(64, 256, num_layers=2, batch_first=True), nn.Linear(256, CLASSES)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - as the Sequential ones call theirs
        """One logit per class, from the last step's state."""
        states, _ = self.layers(input)
        logits: Tensor = self.head(states[:, -1])
        return logits


def recurrent() -> nn.Module:
    """See `Recurrent`."""
    return Recurrent()
