"""The digits network: a plain convolutional network, large enough that choosing a variant matters.

`gearshift build` calls `build` and loads the trained weights into what it returns. The convolutions are what static
int8 and channel pruning make fast; the wide fully connected layer is what dynamic int8 makes small and fast.
"""

from __future__ import annotations

from torch import Tensor, nn

CLASSES = 10
IMAGE_SIZE = 32


class DigitsNetwork(nn.Module):
    """Grey images [batch, 1, 32, 32] with values in [0, 1] -> one logit per digit [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, 32),
            convolution(32, 64, stride=2),  # 16 x 16
            convolution(64, 64),
            convolution(64, 64),
            convolution(64, 128, stride=2),  # 8 x 8
            convolution(128, 128),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Linear(128 * (IMAGE_SIZE // 4) ** 2, 768),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(768, CLASSES),
        )

    def forward(self, image: Tensor) -> Tensor:
        """One logit per digit."""
        logits: Tensor = self.classifier(self.features(image))
        return logits


def convolution(channels: int, features: int, stride: int = 1) -> nn.Sequential:
    """A 3x3 convolution with batch normalisation, which the ONNX export folds into its weights."""
    return nn.Sequential(
        nn.Conv2d(channels, features, kernel_size=3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(features),
        nn.ReLU(),
    )


def build() -> nn.Module:
    """The network with fresh weights."""
    return DigitsNetwork()
