"""How the layers of torch keep their channels: which positions of which parameter belong to which channel.

Rules of this file: a layer's slots are its outputs (channels) first, then its inputs (columns); they are numbered once
and keep their numbers while others go. A type of layer that is not described here keeps its width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

Slots = npt.NDArray[np.intp]
"""Slot numbers by position."""
Gone = npt.NDArray[np.bool_]
"""By slot number: whether it goes."""
Axes = Mapping[str, tuple[Slots | None, ...]]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_GATES: dict[type[nn.Module], int] = {nn.LSTM: 4, nn.GRU: 3, nn.RNN: 1}


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer and its slots.

    `outs` and `ins` count them as they were numbered, whatever is left. `axes` says for each dimension of a parameter
    or buffer which slot every position belongs to (None: no slots); `sizes` which attribute counts which slots; `ties`
    which slots go together; `blocks` which channels must lose alike many. `axis` is the dimension of inputs and outputs
    that has the channels.
    """

    module: nn.Module
    outs: int
    ins: int
    axis: int
    axes: Axes
    sizes: Mapping[str, Slots]
    ties: Sequence[tuple[int, int]] = ()
    blocks: Sequence[Slots] = ()

    @property
    def columns(self) -> Slots:
        """The inputs that are left, in order."""
        return next((slots for slots in self.sizes.values() if (slots >= self.outs).any()), np.arange(0))

    @property
    def is_channelwise(self) -> bool:
        """Whether every channel comes from one column alone, as in batch normalisation: no weight joins the two."""
        slots = [slots for dims in self.axes.values() for slots in dims if slots is not None]
        return self.ins > 0 and not any((each >= self.outs).any() for each in slots)

    @property
    def weights(self) -> dict[str, nn.Parameter]:
        """The trained values that have slots, by name, biases apart."""
        found = {name: getattr(self.module, name) for name in self.axes if not name.startswith("bias")}
        return {name: value for name, value in found.items() if isinstance(value, nn.Parameter)}

    def sums(self, values: Mapping[str, torch.Tensor]) -> npt.NDArray[np.float64]:
        """By slot: what its positions hold together, in tensors shaped as the parameters of these names."""
        total = np.zeros(self.outs + self.ins)
        for name, value in values.items():
            for dim, slots in enumerate(self.axes[name]):
                if slots is not None:
                    np.add.at(total, slots, value.double().movedim(dim, 0).reshape(len(slots), -1).sum(1).numpy())
        return total

    def zero(self, gone: Gone) -> None:
        """Set the trained values of the slots that go to zero, in place."""
        for name, dims in self.axes.items():
            if name not in dict(self.module.named_parameters(recurse=False)):
                continue
            tensor = getattr(self.module, name).data
            for dim, slots in enumerate(dims):
                if slots is not None:
                    tensor.index_fill_(dim, torch.from_numpy(np.flatnonzero(gone[slots])), 0.0)

    def remove(self, gone: Gone) -> Layer:
        """Take the slots that go out of the module, in place; returns the layer that is left."""
        for name, dims in self.axes.items():
            old = getattr(self.module, name)
            new = old.detach().clone()
            for dim, slots in enumerate(dims):
                if slots is not None:
                    new = new.index_select(dim, torch.from_numpy(np.flatnonzero(~gone[slots])))
            setattr(self.module, name, nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new)
        sizes = {name: slots[~gone[slots]] for name, slots in self.sizes.items()}
        for name, slots in sizes.items():
            setattr(self.module, name, len(slots))
        axes = {
            name: tuple(None if slots is None else slots[~gone[slots]] for slots in dims)
            for name, dims in self.axes.items()
        }
        return replace(self, axes=axes, sizes=sizes, blocks=[block[~gone[block]] for block in self.blocks])


def describe(module: nn.Module) -> Layer | None:
    """A layer and its slots; None for a type, or a form of it, that is not known here."""
    layer = next((slots(module) for types, slots in _KINDS if isinstance(module, types)), None)
    if layer is None:
        return None
    axes = {name: dims for name, dims in layer.axes.items() if getattr(module, name, None) is not None}
    own = dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))
    if not set(axes) <= set(own) or not (axes or layer.is_channelwise):  # parametrised weights are computed
        return None
    return replace(layer, axes=axes)


def _numbered(outs: int, ins: int) -> tuple[Slots, Slots]:
    return np.arange(outs), np.arange(outs, outs + ins)


def _linear(module: nn.Linear) -> Layer:
    outs, ins = _numbered(module.out_features, module.in_features)
    axes: Axes = {"weight": (outs, ins), "bias": (outs,)}
    return Layer(module, len(outs), len(ins), -1, axes, {"out_features": outs, "in_features": ins})


def _convolution(module: Any) -> Layer | None:
    """Weights [out, in / groups, *kernel], transposed [in, out / groups, *kernel]; groups lose the same positions."""
    is_transposed, kernel = isinstance(module, _TRANSPOSED), (None,) * len(module.kernel_size)
    if is_transposed and module.groups > 1:
        return None
    outs, ins = _numbered(module.out_channels, module.in_channels)
    sizes = {"out_channels": outs, "in_channels": ins}
    made, taken = outs.reshape(module.groups, -1), ins.reshape(module.groups, -1)
    weight: tuple[Slots | None, ...] = (ins, outs, *kernel) if is_transposed else (outs, taken[0], *kernel)
    ties = [tie for slots in (made, taken) for group in slots[1:] for tie in zip(slots[0], group, strict=True)]
    if module.groups == module.in_channels > 1:  # depthwise: a group is one column and what is made of it
        weight, sizes = (outs, None, *kernel), sizes | {"groups": ins}
        ties = [(out, column) for group, (column,) in zip(made, taken, strict=True) for out in group]
    return Layer(module, len(outs), len(ins), -1 - len(kernel), {"weight": weight, "bias": (outs,)}, sizes, ties)


def _channelwise(module: nn.Module, size: str, axis: int) -> Layer | None:
    """A value per channel, which goes with its column; a PReLU with one value for all has no channels."""
    outs, ins = _numbered(getattr(module, size), getattr(module, size))
    if isinstance(module, nn.PReLU) and len(outs) == 1:
        return None
    axes = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (outs,))
    return Layer(module, len(outs), len(ins), axis, axes, {size: outs}, list(zip(outs, ins, strict=True)))


def _embedding(module: nn.Embedding) -> Layer:
    outs = np.arange(module.embedding_dim)
    return Layer(module, len(outs), 0, -1, {"weight": (None, outs)}, {"embedding_dim": outs})


def _recurrent(module: Any) -> Layer | None:
    """Each hidden unit is one row per gate of both matrices, a column of its own layer's and of the next layer's.

    Channels are numbered as the states h are: by layer, then direction, then unit. A layer takes the units of both
    directions of the one below; all layers and directions have the same number of units.
    """
    gates = next((gates for kind, gates in _GATES.items() if isinstance(module, kind)), None)
    if gates is None or module.proj_size:
        return None
    directions = 2 if module.bidirectional else 1
    units = np.arange(module.num_layers * directions * module.hidden_size).reshape(-1, directions, module.hidden_size)
    columns = np.arange(units.size, units.size + module.input_size)
    axes: dict[str, tuple[Slots | None, ...]] = {}
    for position, layer in enumerate(units):
        for own, suffix in zip(layer, ("", "_reverse"), strict=False):
            rows, name = np.tile(own, gates), f"l{position}{suffix}"
            axes[f"weight_ih_{name}"] = (rows, columns if position == 0 else units[position - 1].reshape(-1))
            axes |= {f"weight_hh_{name}": (rows, own), f"bias_ih_{name}": (rows,), f"bias_hh_{name}": (rows,)}
    blocks = list(units.reshape(-1, module.hidden_size))
    sizes = {"hidden_size": blocks[0], "input_size": columns}
    return Layer(module, units.size, len(columns), -1, axes, sizes, blocks=blocks)


_KINDS: tuple[tuple[tuple[type[nn.Module], ...], Callable[[Any], Layer | None]], ...] = (
    ((nn.Linear,), _linear),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED), _convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), lambda module: _channelwise(module, "num_features", 1)),
    ((nn.InstanceNorm1d,), lambda module: _channelwise(module, "num_features", -2)),
    ((nn.InstanceNorm2d,), lambda module: _channelwise(module, "num_features", -3)),
    ((nn.InstanceNorm3d,), lambda module: _channelwise(module, "num_features", -4)),
    ((nn.PReLU,), lambda module: _channelwise(module, "num_parameters", 1)),
    ((nn.Embedding,), _embedding),
    ((nn.RNNBase,), _recurrent),
)
