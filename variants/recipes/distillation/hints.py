"""Which inner layers of a teacher and a student are compared, and how their answers become comparable maps.

Rules of this file: a layer is known by its path in the module; what it answers is listened to with forward hooks, which
are gone afterwards. Where nobody names layers, it is the last map before the head: of a convolutional network its last
feature map, of a transformer its last tokens, of fully connected layers the last but one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from variants.data import Array
from variants.export import example_tensors
from variants.model_config import nearest
from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import tensors_of

if TYPE_CHECKING:
    import torch
    from torch import nn


_CHANNELS_SECOND = (
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d",
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm",
    "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d", "GroupNorm", "PReLU",
)  # fmt: skip
_WIDTHS = (
    "out_channels", "out_features", "num_features", "num_channels", "num_parameters", "embedding_dim", "embed_dim",
)  # fmt: skip
"""What torch's layers call the number of channels of their answers."""


@dataclass(frozen=True, slots=True)
class InnerLayer:
    """A layer by its path, and what the dimensions of its answers mean."""

    path: str
    batch_axis: int
    channel_axis: int
    channels: int
    dimensions: int

    def as_map(self, answer: torch.Tensor) -> torch.Tensor:
        """Its answer as [samples, channels, *positions]."""
        return answer.movedim((self.batch_axis, self.channel_axis), (0, 1))


@dataclass(frozen=True, slots=True)
class Pair:
    """A layer of the teacher and the layer of the student that follows it."""

    teacher: InnerLayer
    student: InnerLayer


def pair_layers(
    teacher: nn.Module, student: nn.Module, example: Mapping[str, Array], named: Mapping[str, str]
) -> list[Pair]:
    """The named pairs (the teacher's layer -> the student's), or the last maps before the heads.

    Raises RecipeRejected for a layer that is not there, or whose answers cannot be compared.
    """
    theirs, ours = _inner_layers(teacher, example), _inner_layers(student, example)
    if named:
        pairs = [Pair(_found(theirs, t, "teacher"), _found(ours, s, "student")) for t, s in named.items()]
    else:
        pairs = [Pair(_last_map(teacher, theirs, example), _last_map(student, ours, example))]
    for pair in pairs:
        if pair.teacher.dimensions != pair.student.dimensions:
            raise RecipeRejected(
                f"{pair.teacher.path!r} of the teacher answers in {pair.teacher.dimensions} dimensions and "
                f"{pair.student.path!r} of the student in {pair.student.dimensions}; name comparable `hint_layers`"
            )
    return pairs


@contextmanager
def listening(module: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Within it, every run of `module` leaves the last answers of its inner layers in what is yielded, in their order.

    Of a layer that answers with several tensors it is the first; a copy, for what follows may change it in place.
    """
    import torch

    heard: dict[str, torch.Tensor] = {}

    def listener(path: str) -> Any:
        def keep(_layer: nn.Module, _inputs: Any, answer: Any) -> None:
            first: Any = next(iter(tensors_of(answer)), None)
            heard.pop(path, None)
            if isinstance(first, torch.Tensor) and first.ndim >= 2 and first.is_floating_point():
                heard[path] = first.clone()

        return keep

    handles = [module.get_submodule(path).register_forward_hook(listener(path)) for path in paths]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


def _inner_layers(module: nn.Module, example: Mapping[str, Array]) -> dict[str, InnerLayer]:
    """The layers that answer once per sample, in the order in which they do.

    Two and three samples tell the batch's dimension from the others.
    """
    import torch

    paths = [path for path, _ in module.named_modules() if path]
    heard = []
    for samples in (2, 3):
        with listening(module, paths) as answers, torch.no_grad():
            module(**example_tensors(module, example, samples, batched=True))
        heard.append({path: tuple(answer.shape) for path, answer in answers.items()})
    found: dict[str, InnerLayer] = {}
    before: InnerLayer | None = None
    for path, shape in heard[0].items():
        differing = [axis for axis, sizes in enumerate(zip(shape, heard[1][path], strict=True)) if len(set(sizes)) > 1]
        if len(differing) == 1 and shape[differing[0]] == 2:
            channel = _channel_axis(module.get_submodule(path), shape, differing[0], before)
            if channel != differing[0]:
                found[path] = before = InnerLayer(path, differing[0], channel, shape[channel], len(shape))
    return found


def _channel_axis(layer: nn.Module, shape: Sequence[int], batch_axis: int, before: InnerLayer | None) -> int:
    """The dimension as long as its last weighted layer has channels; one without such is like what answered before it.

    Where several dimensions are that long, or none, convolutions and what follows them have channels second, recurrent
    layers and transformers last.
    """
    from torch import nn

    weighted = [(inner, width) for inner in layer.modules() if (width := _width(inner)) is not None]
    dimensions = len(shape)
    if weighted:
        last, channels = weighted[-1]
        is_second = isinstance(last, tuple(getattr(nn, name) for name in _CHANNELS_SECOND))
    else:
        channels = before.channels if before else 0
        alike = before if before and before.dimensions == dimensions else None
        is_second = alike.channel_axis == 1 if alike else dimensions > 3
    fitting = [axis for axis, size in enumerate(shape) if size == channels and axis != batch_axis]
    if len(fitting) == 1:
        return fitting[0]
    return 1 if is_second else dimensions - 1


def _width(layer: nn.Module) -> int | None:
    """How many channels a layer of its own weights answers with; None for others, and where it does not say."""
    from torch import nn

    if next(layer.parameters(recurse=False), None) is None:
        return None
    if isinstance(layer, nn.RNNBase):
        return (layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    if isinstance(layer, nn.PReLU) and layer.num_parameters == 1:
        return None
    normalised = getattr(layer, "normalized_shape", None)
    if isinstance(normalised, Sequence) and len(normalised) == 1:
        return int(normalised[0])
    return next((width for name in _WIDTHS if isinstance(width := getattr(layer, name, None), int)), None)


def _last_map(module: nn.Module, layers: Mapping[str, InnerLayer], example: Mapping[str, Array]) -> InnerLayer:
    """The last layer with weights and positions before what makes the answer; without such, the last with weights."""
    import torch

    with torch.no_grad():
        answer = tensors_of(module(**example_tensors(module, example, 2, batched=True)))[0]
    weighted = [
        layer
        for path, layer in layers.items()
        if next(module.get_submodule(path).parameters(recurse=False), None) is not None
    ]
    if weighted and _answers(weighted[-1], answer):
        weighted.pop()
    maps = [layer for layer in weighted if layer.dimensions > 2]
    if not weighted:
        raise RecipeRejected(f"{type(module).__name__} has no layer before its head to take hints from")
    return (maps or weighted)[-1]


def _answers(layer: InnerLayer, answer: torch.Tensor) -> bool:
    """Whether a layer's answers look like the module's own."""
    return layer.dimensions == answer.ndim and layer.channels == answer.shape[layer.channel_axis]


def _found(layers: Mapping[str, InnerLayer], path: str, whose: str) -> InnerLayer:
    if path not in layers:
        raise RecipeRejected(
            f"hint_layers: the {whose} has no layer {path!r} that answers per sample; {nearest(path, layers)}"
        )
    return layers[path]
