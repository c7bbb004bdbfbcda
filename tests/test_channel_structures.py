"""What goes with a channel: networks without their dead channels answer as before, however their layers depend."""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import pytest
import torch
from channel_networks import CASES, Transformer, encoder_layer
from torch import Tensor, nn

from variants.recipes.pruning.channels import narrower
from variants.recipes.pruning.importance import norms
from variants.recipes.pruning.removal import remove
from variants.recipes.pruning.trace import Tracer
from variants.recipes.pruning.units import find_groups, find_structure

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def kill(module: nn.Module, name: str, channels: list[int]) -> None:
    """Set the weights of some of a layer's channels to zero; those of a recurrent layer are numbered as its states."""
    layer = module.get_submodule(name)
    with torch.no_grad():
        if not isinstance(layer, nn.RNNBase):
            for key, value in layer.named_parameters():
                dim = int(isinstance(layer, (nn.ConvTranspose2d, nn.Embedding)) and key == "weight")
                value.index_fill_(dim, torch.tensor(channels), 0.0)
            return
        for block, suffix in enumerate(("l0", "l0_reverse", "l1", "l1_reverse")[: 1 + 3 * (layer.num_layers > 1)]):
            units = [c - block * layer.hidden_size for c in channels if c // layer.hidden_size == block]
            for key in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                gates = getattr(layer, f"{key}_{suffix}").unflatten(0, (-1, layer.hidden_size))
                gates[:, units] = 0.0


def width(layer: nn.Module) -> int:
    """How many channels a layer has."""
    names = ("out_features", "out_channels", "num_features", "num_parameters", "hidden_size", "embedding_dim")
    return next(int(getattr(layer, name)) for name in names if hasattr(layer, name))


def alive(make: nn.Module) -> nn.Module:
    """The module in eval mode with weights that are far from zero and normalisation that does something."""
    generator = torch.Generator().manual_seed(0)
    for layer in make.modules():
        if isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d)) and layer.running_var is not None:
            layer.running_var.uniform_(0.5, 2.0, generator=generator)
    with torch.no_grad():
        for value in make.parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.02)
    return make.eval()


@pytest.mark.parametrize("name", CASES)
def test_without_its_dead_channels_a_network_answers_as_before(name: str) -> None:
    """The units that hold the dead channels hold no others, and without them every answer stays."""
    case = CASES[name]
    torch.manual_seed(0)
    module = alive(case.make())
    for layer, channels in case.dead.items():
        kill(module, layer, list(channels))
    pruned = copy.deepcopy(module)
    structure = find_structure(pruned, [IMAGES])
    dead = {structure.first[layer] + channel for layer, channels in case.dead.items() for channel in channels}
    for group in find_groups(structure, [norms(structure, 1)]):
        going = [position for position, unit in enumerate(group.units) if dead.intersection(unit.tolist())]
        if going:
            remove(pruned, structure, group, going, [IMAGES])
    assert {layer: width(pruned.get_submodule(layer)) for layer in case.left} == case.left
    unseen = torch.randn(3, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(pruned(unseen), module(unseen), atol=1e-5, rtol=1e-5)
        assert pruned(unseen).std() > 1e-3  # it still says something


@pytest.mark.parametrize("name", [name for name in CASES if "deep" not in name])
def test_units_are_those_of_following_channels_one_by_one(name: str) -> None:
    """Following many channels at once, told apart by the digits of their numbers, joins no more than it must."""
    torch.manual_seed(0)
    module = alive(CASES[name].make())
    structure, tracer = find_structure(module, [IMAGES]), Tracer(module, [IMAGES])
    unit = {slot: {slot} for slot in range(tracer.total)}
    pairs = [
        (structure.first[n] + a, structure.first[n] + b) for n, each in tracer.layers.items() for a, b in each.ties
    ]
    for layer in set(tracer.layers) - set(structure.reasons):
        for channel in range(tracer.layers[layer].outs):
            seen, _ = tracer.follow({layer: np.array([channel])})
            pairs += [(tracer.first[layer] + channel, column) for column in np.flatnonzero(seen).tolist()]
    for a, b in pairs:
        if unit[a] is not unit[b]:
            unit[a] |= unit[b]
            unit |= dict.fromkeys(unit[b], unit[a])
    for group in find_groups(structure, [norms(structure, 1)]):
        assert [unit[int(found[0])] for found in group.units] == [set(found.tolist()) for found in group.units]


def test_torchs_own_attention_loses_whole_heads() -> None:
    """A TransformerEncoderLayer without its dead heads answers as before, though torch's attention cannot be narrow."""
    torch.manual_seed(0)
    module = alive(Transformer(encoder_layer))
    dead = {"blocks.0": [0, 3], "blocks.1": [1, 2]}
    with torch.no_grad():
        for name, heads in dead.items():
            attention = module.get_submodule(f"{name}.self_attn")
            for value in (attention.get_parameter("in_proj_weight"), attention.get_parameter("in_proj_bias")):
                value.view(3, 4, 8, -1)[:, heads] = 0.0
            kill(module, f"{name}.linear1", list(range(32)))
    pruned = narrower(module, {"x": IMAGES}, 0.5)
    layers = ("self_attn.query", "self_attn.out", "linear1")
    widths = [[width(pruned.get_submodule(f"{name}.{layer}")) for layer in layers] for name in dead]
    assert widths == [[16, 32, 32]] * 2
    with torch.no_grad():
        torch.testing.assert_close(pruned(IMAGES), module(IMAGES), atol=1e-5, rtol=1e-5)


class Between(nn.Module):
    """Two convolutions with something between them, which takes the eight channels of the first."""

    def __init__(self, between: nn.Module, *, spatial: int = 2) -> None:
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[spatial]
        self.first, self.between, self.last = kind(1, 8, 3), between, kind(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.last(self.between(self.first(x)))
        return answer


def test_one_slope_for_all_channels_ties_none() -> None:
    """A PReLU with a single value is an activation like any other."""
    pruned = narrower(Between(nn.PReLU()).eval(), {"x": IMAGES}, 0.5)
    assert (width(pruned.get_submodule("first")), width(pruned.get_submodule("between"))) == (4, 1)


@pytest.mark.parametrize(
    ("between", "spatial"),
    [
        (nn.InstanceNorm3d(8, affine=True), 3),
        (nn.InstanceNorm3d(8, affine=True, track_running_stats=True), 3),
        (nn.InstanceNorm2d(8), 2),
        (nn.BatchNorm2d(8, affine=False, track_running_stats=False), 2),
    ],
)
def test_normalisation_follows_its_channels(between: nn.Module, spatial: int) -> None:
    """In three dimensions, and where it has no weights, it knows how many channels are left: torch does not warn."""
    pruned = narrower(Between(between, spatial=spatial).eval(), {"x": torch.randn(4, 1, *[6] * spatial)}, 0.5)
    assert (width(pruned.get_submodule("first")), width(pruned.get_submodule("between"))) == (4, 4)
    assert pruned(torch.randn(1, 1, *[7] * spatial)).shape[1] == 2


class Answer(NamedTuple):
    """What a layer with weights may answer."""

    values: Tensor
    weights: Tensor


class Named(nn.Module):
    """A layer of a kind that is not known, whose answers have names."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Answer:
        return Answer(x * self.scale, self.scale)


def test_answers_by_name_keep_their_names() -> None:
    """What reads them by name still can while channels are followed."""

    class Reading(Between):
        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.last(self.between(x.expand(-1, 8, -1, -1).movedim(1, -1)).values.movedim(-1, 1))
            return answer

    structure = find_structure(Reading(Named()).eval(), [IMAGES])
    assert structure.reasons["last"] == "its channels reach an output"


def test_one_unit_takes_no_more_pairs_than_slots() -> None:
    """Channels that all depend on one another are joined once, not each with each."""
    module = nn.Sequential(nn.Linear(8, 64), nn.Softmax(-1), nn.Linear(64, 2)).eval()
    structure = find_structure(module, [torch.randn(2, 8)])
    assert len(structure.pairs) <= 2 * 64
    (group,) = find_groups(structure, [norms(structure, 1)])
    assert [len(unit) for unit in group.units] == [64 + 64]
