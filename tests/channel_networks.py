"""Small untrained networks, one for each way that layers depend on one another, with channels that are dead in them.

A dead channel's weights are zero, so a network without it must give the same answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

torch.set_num_threads(1)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.first, self.norm = nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.second(functional.relu(self.norm(self.first(x)), inplace=True))
        answer: Tensor = self.head(x.relu().mean((2, 3)))
        return answer


class Concatenation(nn.Module):
    """Two branches and the input itself, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.both = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(1, 6, 1), nn.Conv2d(15, 8, 3)
        self.head = nn.Linear(8 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x).relu(), x, functional.elu(self.right(x))], dim=1)
        answer: Tensor = self.head(self.both(x).relu().flatten(1))
        return answer


class ChannelsLast(nn.Module):
    """Flattened with the channels innermost."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes, self.head = nn.Conv2d(1, 8, 3, padding=1), nn.PReLU(8), nn.Linear(8 * 64, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.slopes(self.first(x)).permute(0, 2, 3, 1).flatten(1))
        return answer


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excite and projection, as in MobileNetV3."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand, self.project = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 24, 1), nn.Conv2d(24, 8, 1)
        self.depthwise, self.norm = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24)
        self.squeeze, self.excite, self.head = nn.Linear(24, 6), nn.Linear(6, 24), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.hardswish(self.stem(x))
        y = functional.hardswish(self.norm(self.depthwise(functional.hardswish(self.expand(x)))))
        gate = torch.sigmoid(self.excite(self.squeeze(y.mean((2, 3))).relu()))[..., None, None]
        answer: Tensor = self.head((x + self.project(y * gate)).mean((2, 3)))
        return answer


class GroupedConvolution(nn.Module):
    """Also a depthwise layer that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.grouped = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 32, 3, groups=4)
        self.doubled, self.norm, self.head = (
            nn.Conv2d(32, 64, 1, groups=32),
            nn.InstanceNorm2d(64, affine=True),
            nn.Linear(64, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.doubled(self.grouped(self.first(x).relu()).relu()))
        answer: Tensor = self.head(x.relu().mean((2, 3)))
        return answer


class Transposed(nn.Module):
    """An autoencoder: the outputs are as wide as the inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Conv2d(1, 8, 2, stride=2), nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.last = nn.ConvTranspose2d(12, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.decode(self.encode(x).relu()).relu())
        return answer


class GatedLinear(nn.Module):
    """One layer for values and gates, taken apart."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Linear(64, 32), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x.flatten(1)).chunk(2, dim=-1)
        answer: Tensor = self.head(value * gate.sigmoid())
        return answer


class CalledTwice(nn.Module):
    """A layer whose outputs are its inputs the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(64, 16), nn.Linear(16, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.flatten(1)).relu()
        answer: Tensor = self.head(self.again(self.again(x).relu()).relu())
        return answer


class ConvolutionThenLstm(nn.Module):
    """Rows of features as steps; the answer is read off the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.lstm, self.head = (
            nn.Conv2d(1, 8, 3, padding=1),
            nn.LSTM(64, 12, batch_first=True),
            nn.Linear(12, 10),
        )

    def forward(self, x: Tensor) -> Tensor:
        steps = self.first(x).relu().permute(0, 2, 1, 3).flatten(2)
        answer: Tensor = self.head(self.lstm(steps)[0][:, -1])
        return answer


class DeepRecurrent(nn.Module):
    """Two bidirectional layers, read from outputs and last states, steps first."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.recurrent = kind(8, 12, 2, bidirectional=True)
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(36, 10)

    def forward(self, x: Tensor) -> Tensor:
        outputs, states = self.recurrent(x[:, 0].transpose(0, 1))
        last = states[0] if isinstance(states, tuple) else states
        answer: Tensor = self.head(torch.cat([self.norm(outputs.mean(0)), last[0]], dim=1))
        return answer


class Words(nn.Module):
    """Token numbers, an embedding and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(20, 8), nn.GRU(8, 12, batch_first=True), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = (x[:, 0, 0].abs() * 9).long() % 20
        answer: Tensor = self.head(self.gru(self.embedding(tokens))[1][-1])
        return answer


class Block(nn.Module):
    """A transformer's block by hand; `form` is how it knows its heads."""

    def __init__(self, form: str, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.form, self.heads, self.head_width, self.all_heads = form, heads, width // heads, width
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, steps, width = x.shape
        projected = self.qkv(self.before(x))
        if self.form == "width":  # keeps its heads: the widths are taken from what comes in
            q, k, v = projected.view(batch, steps, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        elif self.form == "inferred":
            q, k, v = projected.unflatten(-1, (3, -1, self.head_width)).permute(2, 0, 3, 1, 4)
        else:
            q, k, v = projected.view(batch, steps, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        mixed = mixed.flatten(2) if self.form == "inferred" else mixed.reshape(batch, steps, self.all_heads)
        x = x + self.out(mixed)
        answer: Tensor = x + self.down(functional.gelu(self.up(self.between(x))))
        return answer


class Transformer(nn.Module):
    """Rows as tokens, positions added, two blocks, the mean over tokens."""

    def __init__(self, block: Callable[[], nn.Module], width: int = 32) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(8, width), nn.Sequential(block(), block())
        self.positions = nn.Parameter(torch.randn(1, 8, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.norm(self.blocks(self.embed(x[:, 0]) + self.positions)).mean(1))
        return answer


def encoder_layer() -> nn.Module:
    """Torch's own block."""
    return nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True, activation="gelu")


@dataclass(frozen=True)
class Case:
    """A network, its dead channels by layer, and the number of channels that a layer keeps of half of them."""

    make: Callable[[], nn.Module]
    dead: Mapping[str, Sequence[int]]
    left: Mapping[str, int]


DEAD_UNITS = [*range(6), *range(15, 21), *range(24, 36, 2), *range(37, 48, 2)]
"""Other units in each layer and direction of 12."""
DEAD_OUTPUTS = [*range(0, 12, 2), *range(13, 24, 2)]
"""Where the last layer's dead units are in the outputs."""
DEAD_HEADS = {
    "blocks.0.qkv": [row + part for part in (0, 32, 64) for row in range(8, 24)],
    "blocks.1.qkv": [row + part for part in (0, 32, 64) for row in range(16, 32)],
    "blocks.0.up": range(0, 64, 2),
    "blocks.1.up": range(32),
}
"""The second and third head, and the last two, of four of width 8; the rows of queries, keys and values."""
LEFT_HEADS = {"blocks.0.qkv": 48, "blocks.0.out": 32, "blocks.0.up": 32, "blocks.1.qkv": 48, "blocks.1.up": 32}

CASES: Mapping[str, Case] = {
    "residual": Case(
        Residual,
        {"stem": [0, 3, 4, 7], "second": [0, 3, 4, 7], "first": [1, 2, 5], "norm": [1, 2, 5]},
        {"stem": 4, "second": 4, "first": 3, "norm": 3},
    ),
    "concatenation": Case(
        Concatenation,
        {"left": [0, 1, 6, 7], "right": [1, 3, 5], "both": [2, 3, 4, 5]},
        {"left": 4, "right": 3, "both": 4},
    ),
    "channels last": Case(ChannelsLast, {"first": [1, 4, 5, 6]}, {"first": 4, "slopes": 4}),
    "inverted residual": Case(
        InvertedResidual,
        {
            "stem": [2, 3, 4, 7],
            "project": [2, 3, 4, 7],
            "expand": range(0, 24, 2),
            "depthwise": range(0, 24, 2),
            "norm": range(0, 24, 2),
            "squeeze": [0, 1, 5],
        },
        {"stem": 4, "project": 4, "expand": 12, "depthwise": 12, "norm": 12, "squeeze": 3, "excite": 12},
    ),
    "groups": Case(
        GroupedConvolution,
        {
            "first": [0, 3, 4, 7, 8, 11, 12, 15],
            "grouped": [p + 8 * g for g in range(4) for p in (1, 2, 5, 6)],
            "doubled": [2 * (p + 8 * g) + k for g in range(4) for p in (1, 2, 5, 6) for k in (0, 1)],
            "norm": [2 * (p + 8 * g) + k for g in range(4) for p in (1, 2, 5, 6) for k in (0, 1)],
        },
        {"first": 8, "grouped": 16, "doubled": 32, "norm": 32},
    ),
    "transposed": Case(
        Transposed, {"encode": [0, 1, 2, 7], "decode": [0, 2, 4, 6, 8, 10]}, {"encode": 4, "decode": 6, "last": 1}
    ),
    "gated linear": Case(GatedLinear, {"both": [*range(8), *range(16, 24)]}, {"both": 16}),
    "called twice": Case(CalledTwice, {"first": range(8), "again": range(8)}, {"first": 8, "again": 8}),
    "convolution, then LSTM": Case(
        ConvolutionThenLstm, {"first": [0, 2, 4, 6], "lstm": range(3, 9)}, {"first": 4, "lstm": 6}
    ),
    "deep LSTM": Case(
        lambda: DeepRecurrent(nn.LSTM), {"recurrent": DEAD_UNITS, "norm": DEAD_OUTPUTS}, {"recurrent": 6, "norm": 12}
    ),
    "deep GRU": Case(
        lambda: DeepRecurrent(nn.GRU), {"recurrent": DEAD_UNITS, "norm": DEAD_OUTPUTS}, {"recurrent": 6, "norm": 12}
    ),
    "words": Case(Words, {"embedding": [0, 3, 5, 6], "gru": [1, 2, 3, 8, 9, 11]}, {"embedding": 4, "gru": 6}),
    "heads by attribute": Case(lambda: Transformer(lambda: Block("attribute")), DEAD_HEADS, LEFT_HEADS),
    "heads inferred": Case(lambda: Transformer(lambda: Block("inferred")), DEAD_HEADS, LEFT_HEADS),
    "heads of width 12": Case(
        lambda: Transformer(lambda: Block("attribute", 48), 48),
        {"blocks.0.qkv": [row + part for part in (0, 48, 96) for row in range(12, 36)]},
        {"blocks.0.qkv": 72, "blocks.1.qkv": 144},
    ),
    "heads by width": Case(
        lambda: Transformer(lambda: Block("width")),
        {"blocks.0.up": range(32), "blocks.1.up": range(32)},
        {"blocks.0.qkv": 96, "blocks.0.up": 32, "blocks.1.qkv": 96, "blocks.1.up": 32},
    ),
}
