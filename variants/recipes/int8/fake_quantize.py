"""Fake quantisation: a torch module computes with what int8 kernels will read, and still learns in floating point.

Rules of this file: it imports torch, so recipes import it only when they run. Rounding passes gradients straight
through, except where a value is clipped (Jacob et al., CVPR 2018). When the context ends nothing of it is left in the
module but what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

_AVERAGING = 0.01
_TINY = 1e-12
_LEVELS = 255
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Weight = tuple[nn.Module, str]
"""A layer and the name of one of its weights, [output channels, ...]."""


def quantizable_weights(module: nn.Module) -> list[Weight]:
    """The weights of linear layers, convolutions and attention projections that are plain parameters."""
    return [
        (layer, name)
        for layer in module.modules()
        for name, _ in layer.named_parameters(recurse=False)
        if (isinstance(layer, _LAYERS) and name == "weight")
        or (isinstance(layer, nn.MultiheadAttention) and name.endswith("proj_weight"))
    ]


@contextmanager
def fake_quantized(module: nn.Module, limit: int, calibrate: Callable[[], None]) -> Iterator[int]:
    """While open, `quantizable_weights` act as whole multiples in [-limit, limit] and their layers' inputs as bytes.

    `calibrate` runs the module on calibration data, where input ranges start; in training they follow by a moving
    average. Batch normalisation keeps its statistics throughout: they are folded into the weights that are served, and
    a scale per output channel makes rounding before the folding the same as after it. Gives the number of weights.

    The inputs of attention's output projection stay as they are: attention reads its weight and never calls it.
    """
    weights = quantizable_weights(module)
    never_called = {layer.out_proj for layer in module.modules() if isinstance(layer, nn.MultiheadAttention)}
    layers = [layer for layer in dict.fromkeys(layer for layer, _ in weights) if layer not in never_called]
    roundings = [InputRounding() for _ in layers]
    pairs = zip(layers, roundings, strict=True)
    handles = [layer.register_forward_pre_hook(each, with_kwargs=True) for layer, each in pairs]
    norms = [layer for layer in module.modules() if isinstance(layer, _NORMS)]
    try:
        calibrate()
        for each in roundings:
            each.calibrating = False
        handles += [norm.register_forward_pre_hook(_keep_statistics) for norm in norms]
        for layer, name in weights:
            parametrize.register_parametrization(layer, name, WeightRounding(getattr(layer, name), limit))
        yield len(weights)
    finally:
        for handle in handles:
            handle.remove()
        for layer, name in weights:
            if parametrize.is_parametrized(layer, name):
                parametrize.remove_parametrizations(layer, name, leave_parametrized=False)


def _keep_statistics(norm: nn.Module, _inputs: Any) -> None:
    norm.eval()


class WeightRounding(nn.Module):
    """A weight as signed bytes with a scale per output channel (dimension 0); what was zero at first stays zero."""

    kept: torch.Tensor

    def __init__(self, weight: torch.Tensor, limit: int) -> None:
        super().__init__()
        self.limit = limit
        self.register_buffer("kept", weight.detach() != 0)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Round to multiples of the largest magnitude of each channel over `limit`."""
        dtype, weight = weight.dtype, (weight * self.kept).float()
        scale = weight.detach().abs().flatten(1).amax(1).clamp_min(_TINY) / self.limit
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        rounded = torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -self.limit, self.limit)
        return rounded.to(dtype)


class InputRounding:
    """A forward pre-hook: a layer's inputs as unsigned bytes with one scale and zero point per tensor.

    Attention's query, key and value share one range, and stay one tensor where they are one.
    """

    def __init__(self) -> None:
        self.calibrating = True
        self._range: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(
        self, layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """What the layer is given instead of its inputs; None, which is no change, while calibrating."""
        names = ("query", "key", "value") if isinstance(layer, nn.MultiheadAttention) else ("input",)
        given = [*inputs[: len(names)], *(named[name] for name in names if name in named)]
        read = {id(value): value for value in given if isinstance(value, torch.Tensor)}
        if not read:
            return None
        if self.calibrating or layer.training:
            self._observe([value.detach() for value in read.values()])
        if self.calibrating or self._range is None:
            return None
        low, high = self._range
        scale = ((high - low) / _LEVELS).clamp_min(_TINY)
        zero_point = torch.round(-low / scale).to(torch.int32)
        rounded = {
            key: torch.fake_quantize_per_tensor_affine(value.float(), scale, zero_point, 0, _LEVELS).to(value.dtype)
            for key, value in read.items()
        }
        return (
            tuple(rounded.get(id(value), value) for value in inputs),
            {name: rounded.get(id(value), value) for name, value in named.items()},
        )

    def _observe(self, values: list[torch.Tensor]) -> None:
        low = torch.stack([value.amin() for value in values]).amin().float().clamp_max(0)
        high = torch.stack([value.amax() for value in values]).amax().float().clamp_min(0)
        if self._range is None:
            self._range = (low, high)
            return
        lowest, highest = (bound.to(low.device) for bound in self._range)
        if self.calibrating:
            self._range = (torch.minimum(lowest, low), torch.maximum(highest, high))
        else:
            self._range = (torch.lerp(lowest, low, _AVERAGING), torch.lerp(highest, high, _AVERAGING))
