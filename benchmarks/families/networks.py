"""The four families: a CNN, an MLP, an LSTM over rows and a transformer over patches, each in two sizes.

The plain factories are for measuring, large enough that their arithmetic and not the call decides the time; those named
`small_` train in seconds, for tests. This file is copied into a model's folder, where `build` imports it, so it imports
nothing but torch. No forward pass knows a width: a pruned copy runs with what its layers have left.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

CLASSES = 10


class Cnn(nn.Sequential):
    """Grey images [batch, 1, size, size] -> logits [batch, 10]: 3x3 convolutions, two of which halve the image."""

    def __init__(self, size: int, width: int, hidden: int) -> None:
        super().__init__(
            _convolution(1, width // 2),
            _convolution(width // 2, width, stride=2),
            _convolution(width, width),
            _convolution(width, width),
            _convolution(width, 2 * width, stride=2),
            _convolution(2 * width, 2 * width),
            nn.Flatten(),
            nn.Linear(2 * width * (size // 4) ** 2, hidden),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(hidden, CLASSES),
        )

    def forward(self, image: Tensor) -> Tensor:
        """One logit per digit."""
        logits: Tensor = super().forward(image)  # type: ignore[no-untyped-call]
        return logits


def _convolution(channels: int, features: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, features, 3, stride, 1, bias=False), nn.BatchNorm2d(features), nn.ReLU())


class Mlp(nn.Sequential):
    """Grey images [batch, 1, size, size] -> logits [batch, 10] through two hidden layers."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(size * size, width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Linear(width, CLASSES),
        )

    def forward(self, image: Tensor) -> Tensor:
        """One logit per digit."""
        logits: Tensor = super().forward(image)  # type: ignore[no-untyped-call]
        return logits


class Lstm(nn.Module):
    """Grey images [batch, 1, size, size], read row by row -> logits [batch, 10] from the last row's state."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(size, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """One logit per digit."""
        states, _ = self.recurrent(image.flatten(1, 2))
        logits: Tensor = self.head(states[:, -1])
        return logits


class Attention(nn.Module):
    """Self-attention [batch, tokens, width] with projections of their own for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Tensor) -> Tensor:
        """The same shape again; heads are as wide as the projections leave them."""
        query, key, value = (
            layer(tokens).unflatten(-1, (self.heads, layer.out_features // self.heads)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(query, key, value)
        answer: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return answer


class Block(nn.Module):
    """Attention and a feed-forward network four times as wide, each normalised before and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention, self.before_feed_forward = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, width] -> the same shape."""
        tokens = tokens + self.attention(self.before_attention(tokens))
        answer: Tensor = tokens + self.feed_forward(self.before_feed_forward(tokens))
        return answer


class Transformer(nn.Module):
    """Grey images [batch, 1, size, size] as square patches -> logits [batch, 10] from the mean over patches.

    Patches are embedded by convolutions, because a plain projection needs many more examples to learn from (Xiao et
    al., Early Convolutions Help Transformers See Better, NeurIPS 2021).
    """

    def __init__(self, size: int, patch: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        widths = [1, *(width * 2**step // patch for step in range(patch.bit_length() - 1))]
        halving = (_convolution(before, after, stride=2) for before, after in pairwise(widths))
        self.patches = nn.Sequential(*halving, nn.Conv2d(widths[-1], width, 1))
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """One logit per digit."""
        tokens = self.patches(image).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(dim=1))
        return logits


def cnn() -> nn.Module:
    """For 32x32 pixels: 44 million multiply-accumulates, six million of them in the first fully connected layer."""
    return Cnn(32, 64, 768)


def mlp() -> nn.Module:
    """For 32x32 pixels: two million weights."""
    return Mlp(32, 1024)


def lstm() -> nn.Module:
    """For 32x32 pixels: two layers of 256."""
    return Lstm(32, 256)


def transformer() -> nn.Module:
    """For 32x32 pixels: four layers of width 256 over 16 patches."""
    return Transformer(32, 8, 256, 8, 4)


def small_cnn() -> nn.Module:
    """For 8x8 pixels."""
    return Cnn(8, 16, 512)


def small_mlp() -> nn.Module:
    """For 8x8 pixels."""
    return Mlp(8, 256)


def small_lstm() -> nn.Module:
    """For 8x8 pixels."""
    return Lstm(8, 128)


def small_transformer() -> nn.Module:
    """For 16x16 pixels: one layer over 16 patches."""
    return Transformer(16, 4, 128, 4, 1)
