"""What keeps its width, and why: a removal that would change more than the channels it takes is undone."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from channel_networks import Block, Transformer, encoder_layer
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from variants.recipes.pruning.channels import narrower
from variants.recipes.pruning.importance import norms
from variants.recipes.pruning.pruning import Pruning
from variants.recipes.pruning.removal import UnsoundRemoval, difference, remove
from variants.recipes.pruning.units import Structure, Values, find_groups, find_structure, rank
from variants.recipes.recipe import RecipeRejected

ROWS = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Hidden(nn.Module):
    """[batch, 8] -> 16 hidden channels, something in between -> [batch, 10]."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        self.between, self.hidden, self.head = between, nn.Linear(8, 16), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.between(self.hidden(x)))
        return answer


def by_l1(module: nn.Module, structure: Structure) -> list[Values]:
    """Values as `Pruning` takes them."""
    del module
    return [norms(structure, 1)]


@pytest.mark.parametrize(
    ("between", "width", "why"),
    [
        (lambda x: x / x.shape[-1] ** 0.5, 16, "the answers depend on how many channels there are"),
        (lambda x: x.view(-1, 16), 16, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (lambda x: x.view(-1, 2, 8).sum(2), 2, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    ],
)
def test_a_count_in_the_code_is_a_reason(between: Callable[[Tensor], Tensor], width: int, why: str) -> None:
    """What a module does with the number of its channels is seen when it runs without some of them."""
    with pytest.raises(RecipeRejected, match=f"no channel can be removed soundly .*hidden: {why}"):
        narrower(Hidden(between, width).eval(), {"x": ROWS}, 0.5)


@pytest.mark.parametrize("between", [lambda x: x.softmax(-1), lambda x: nn.functional.layer_norm(x, x.shape[-1:])])
def test_channels_that_all_depend_on_one_another_stay(between: Callable[[Tensor], Tensor]) -> None:
    """A softmax or a normalisation over the channels makes them one unit, and the last unit never goes."""
    module = Hidden(between).eval()
    structure = find_structure(module, [ROWS])
    (group,) = find_groups(structure, [norms(structure, 1)])
    assert len(group.units) == 1
    with pytest.raises(RecipeRejected, match="no channel can be removed soundly"):
        narrower(module, {"x": ROWS}, 0.5)


def test_an_unsound_removal_changes_nothing() -> None:
    """Weights, sizes, attributes and answers are those from before, also after attempts with other attributes."""
    module = Transformer(lambda: Block("width")).eval()
    before, kept = copy.deepcopy(module), dict(module.named_parameters())
    structure = find_structure(module, [IMAGES])
    groups = {group.layers: group for group in find_groups(structure, [norms(structure, 1)])}
    with pytest.raises(UnsoundRemoval):
        remove(module, structure, groups["blocks.0.qkv",], [0, 2], [IMAGES])
    assert all(value is kept[name] for name, value in module.named_parameters())
    assert str(module) == str(before)
    for name, block in module.blocks.named_children():
        same = {key: value for key, value in vars(block).items() if isinstance(value, int)}
        assert same == {key: vars(before.get_submodule(f"blocks.{name}"))[key] for key in same}
    assert torch.equal(module(IMAGES), before(IMAGES))
    assert not structure.gone.any()


@pytest.mark.parametrize("block", [lambda: Block("attribute"), encoder_layer])
def test_what_a_normalisation_over_all_channels_takes_stays(block: Callable[[], nn.Module]) -> None:
    """A transformer's residual stream keeps its width, and the findings name the LayerNorm."""
    pruning = Pruning(Transformer(block).eval(), [IMAGES], by_l1, 1)
    pruning.to(0.5)
    assert pruning.module.get_submodule("embed").out_features == 32
    reasons = pruning.findings()["kept_channels"]
    assert isinstance(reasons, dict)
    assert "LayerNorm" in reasons["embed"]


def test_outputs_and_shared_weights_keep_their_width() -> None:
    """An embedding that is also the last layer's weight stays, and so does whatever feeds it."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.up, self.down = nn.Embedding(20, 8), nn.Linear(8, 32), nn.Linear(32, 8)
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.head(self.down(self.up(self.embedding(x)).relu()))
            return answer

    pruned = narrower(Tied().eval(), {"x": torch.arange(6).reshape(2, 3)}, 0.5)
    assert [list(value.shape) for value in pruned.parameters()] == [[20, 8], [16, 8], [16], [8, 16], [8]]
    assert pruned.get_parameter("head.weight") is pruned.get_parameter("embedding.weight")


def test_a_computed_weight_keeps_its_width() -> None:
    """A layer under weight normalisation has no weight of its own to take channels from; the next one has."""
    layers = [
        parametrizations.weight_norm(nn.Linear(8, 16)),
        nn.ReLU(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 10),
    ]
    pruned = narrower(nn.Sequential(*layers).eval(), {"x": ROWS}, 0.5)
    widths = [layer.out_features for layer in pruned.children() if isinstance(layer, nn.Linear)]
    assert widths == [16, 6, 10]


def test_code_that_looks_into_torchs_attention_keeps_it() -> None:
    """Heads stay where the plain layers would be missed; everything else still goes."""

    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = encoder_layer(), nn.Linear(32, 10)

        def forward(self, x: Tensor) -> Tensor:
            answer: Tensor = self.head(self.block(x)) * self.block.get_submodule("self_attn").num_heads
            return answer

    pruned = narrower(Looking().eval(), {"x": torch.randn(2, 5, 32)}, 0.5)
    assert isinstance(pruned.get_submodule("block.self_attn"), nn.MultiheadAttention)
    assert pruned.get_parameter("block.linear1.weight").shape == (32, 32)


def test_the_given_module_stays_as_it_is() -> None:
    """What is pruned is a copy, attention included."""
    module = Transformer(encoder_layer).eval()
    before = copy.deepcopy(module)
    narrower(module, {"x": IMAGES}, 0.5)
    assert str(module) == str(before)
    assert all(map(torch.equal, module.parameters(), before.parameters()))
    assert not any("forward" in vars(part) for part in module.modules())


def test_a_forward_that_a_module_set_itself_is_kept() -> None:
    """Some modules choose their forward when they are made; following channels puts it back."""

    class Chosen(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 16)
            self.forward = self.doubled  # type: ignore[method-assign]

        def doubled(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
            return 2 * nn.functional.linear(input, self.weight, self.bias)

    module = nn.Sequential(Chosen(), nn.ReLU(), nn.Linear(16, 10)).eval()
    before = module(ROWS)
    find_structure(module, [ROWS])
    assert torch.equal(module(ROWS), before)


def test_rounds_lead_to_the_same_widths() -> None:
    """Half in two rounds leaves what half in one leaves, and the share is that of the first widths."""
    module = Transformer(lambda: Block("attribute")).eval()
    widths = []
    for sparsities in ([0.5], [0.25, 0.5]):
        pruning = Pruning(module, [IMAGES], by_l1, 1)
        for sparsity in sparsities:
            pruning.to(sparsity)
        widths.append([list(value.shape) for value in pruning.module.parameters()])
    assert widths[0] == widths[1]


class Heads(nn.Module):
    """Attention that knows its heads, their width and other numbers by attributes; layers are made in any order."""

    def __init__(self, order: str = "qkvo", heads: int = 4, head_width: int = 8, **more: int) -> None:
        super().__init__()
        self.heads, self.head_width, self.all_heads, self.far = heads, head_width, heads * head_width, 99
        vars(self).update(more)
        self.embed, self.norm, self.head = nn.Linear(8, 32), nn.LayerNorm(32), nn.Linear(32, 3)
        for name in order:
            setattr(self, name, nn.Linear(*((self.all_heads, 32) if name == "o" else (32, self.all_heads))))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x))
        q, k, v = (
            self.get_submodule(name)(x).view(*x.shape[:2], self.heads, self.head_width).transpose(1, 2)
            for name in "qkv"
        )
        steps = torch.arange(x.shape[1])
        near = (steps[:, None] - steps).abs() < self.far
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, near).transpose(1, 2)
        mixed = mixed.reshape(*x.shape[:2], self.all_heads)
        answer: Tensor = self.head(x + self.get_submodule("o")(mixed))
        return answer


def without_half_its_heads(module: nn.Module, length: int) -> nn.Module:
    """The module pruned, which is proven at one length and then here at another."""
    torch.manual_seed(0)
    pruning = Pruning(module.eval(), [torch.randn(4, length, 8)], by_l1, 1)
    structure, zeroed = find_structure(pruning.module, [torch.randn(4, length, 8)]), copy.deepcopy(pruning.module)
    values = [norms(structure, 1)]
    (group,) = (each for each in find_groups(structure, values) if "q" in each.layers)
    going = np.argsort(rank(values, group.units))[: len(group.units) // 2]
    gone = np.isin(np.arange(len(structure.gone)), np.concatenate([group.units[position] for position in going]))
    for name in structure.layers:
        replace(structure.layers[name], module=zeroed.get_submodule(name)).zero(gone[structure.share(name)])
    pruning.to(0.5)
    x = torch.randn(3, 9, 8)
    torch.testing.assert_close(pruning.module(x), zeroed(x), atol=1e-5, rtol=1e-5)
    return pruning.module


@pytest.mark.parametrize("length", [2, 6])
def test_a_number_that_happens_to_be_equal_stays(length: int) -> None:
    """Four heads and a window of four: the heads become two, the window stays, though short samples do not show it."""
    left = vars(without_half_its_heads(Heads(far=4), length))
    assert (left["heads"], left["head_width"], left["all_heads"], left["far"]) == (2, 8, 16, 4)


@pytest.mark.parametrize("order", ["qkvo", "oqkv"])
def test_widths_that_stay_hide_none_that_change(order: str) -> None:
    """Every projection is 32 wide, and one side of each stays so, whichever is made first."""
    left = vars(without_half_its_heads(Heads(order), 5))
    assert (left["heads"], left["head_width"], left["all_heads"]) == (2, 8, 16)


def test_as_many_heads_as_they_are_wide_are_told_apart() -> None:
    """Heads and their width are the same number, and only one of the two leaves the answers."""
    left = vars(without_half_its_heads(Heads(heads=8, head_width=8), 5))
    assert (left["heads"], left["head_width"], left["all_heads"]) == (4, 8, 32)


def test_many_numbers_that_say_one_width_change_together() -> None:
    """Heads that are known by the widths of queries, keys and values besides."""

    class Spelt(Heads):
        def forward(self, x: Tensor) -> Tensor:
            for name in "qkv":
                layer = self.get_submodule(name)
                assert vars(self)[f"{name}_width"] == layer.out_features
            return super().forward(x)

    left = vars(without_half_its_heads(Spelt(q_width=32, k_width=32, v_width=32), 5))
    assert [left[name] for name in ("heads", "all_heads", "q_width", "k_width", "v_width")] == [2, 16, 16, 16, 16]


def test_where_several_numbers_might_change_nothing_does() -> None:
    """One step alone is attended to whole by heads of any width: the samples cannot say which number is meant."""
    module = Heads(heads=8, head_width=8).eval()
    pruning = Pruning(module, [torch.randn(4, 1, 8)], by_l1, 1)
    pruning.to(0.5)
    left, reasons = vars(pruning.module), pruning.findings()["kept_channels"]
    assert (left["heads"], left["head_width"], left["all_heads"]) == (8, 8, 64)
    assert isinstance(reasons, dict)
    assert "ambiguous which number of the code has to change: heads = 4, all_heads = 32 or head_width" in reasons["q"]


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_small_answers_are_compared_as_closely_as_large_ones(scale: float) -> None:
    """A division by the number of channels is seen in answers of any size."""

    class Scaled(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * scale

    with pytest.raises(RecipeRejected, match="the answers depend on how many channels there are"):
        narrower(Scaled(lambda x: x / x.shape[-1] ** 0.5).eval(), {"x": ROWS}, 0.5)
    assert narrower(Scaled(torch.relu).eval(), {"x": ROWS}, 0.5).get_parameter("hidden.weight").shape == (8, 8)


def test_answers_that_are_numbers_of_classes_must_stay_exactly() -> None:
    """A share of the largest class number is no distance between two classes."""
    module = nn.Identity()
    assert difference(module, [torch.tensor([29999, 3])], [torch.tensor([29999, 4])]) is not None
    assert difference(module, [torch.tensor([29999, 3])], [torch.tensor([29999, 3])]) is None


def test_frozen_layers_stay_frozen() -> None:
    """What a pruned layer does not learn it does not learn afterwards."""
    module = Hidden(torch.relu).eval()
    module.hidden.requires_grad_(False)
    pruned = narrower(module, {"x": ROWS}, 0.5)
    assert {n: v.requires_grad for n, v in pruned.named_parameters()} == {
        n: v.requires_grad for n, v in module.named_parameters()
    }


def test_a_group_that_stays_whole_says_why() -> None:
    """Widths too small for the rounding, and channels that all depend on one another, are reasons like any other."""
    for module, why in (
        (Hidden(torch.relu), "16 units .*round to 16"),
        (Hidden(lambda x: x.softmax(-1)), "all depend"),
    ):
        pruning = Pruning(module.eval(), [ROWS], by_l1, 16)
        pruning.to(0.5)
        reasons = pruning.findings()["kept_channels"]
        assert isinstance(reasons, dict)
        assert re.search(why, reasons["hidden"])


def test_rounding_counts_channels_not_heads() -> None:
    """Half of four heads are two: `round_to` speaks of widths, and a head is eight channels wide."""
    pruning = Pruning(Heads().eval(), [torch.randn(4, 5, 8)], by_l1, 4)
    pruning.to(0.5)
    assert vars(pruning.module)["heads"] == 2


def test_what_nothing_takes_is_said_as_seen() -> None:
    """Channels may go where values do not show it, as the place of the largest: no more is claimed."""

    class Largest(Hidden):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).argmax(-1)

    structure = find_structure(Largest(torch.relu).eval(), [ROWS])
    assert structure.reasons == {"head": "no layer was seen to take its channels"}
