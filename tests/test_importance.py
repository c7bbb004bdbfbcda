"""Which channels go first: every importance against values worked out by hand, or by the library that defined it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from channel_networks import CASES, Residual
from recipe_fixtures import CPU
from torch import Tensor, nn

from variants.data import Samples
from variants.model_config import ModelConfig
from variants.recipes.pruning.importance import values_of
from variants.recipes.pruning.parameters import Importance
from variants.recipes.pruning.units import find_groups, find_structure, rank
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.runtimes.onnx_signature import Signature
from variants.source import Source

INPUTS = np.tile(np.array([1, 2], np.float32), (4, 1))


class Tiny(nn.Module):
    """[batch, 2] -> three hidden channels -> [batch, 1], with or without normalisation between."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        self.hidden, self.norm, self.head = (
            nn.Linear(2, 3),
            nn.BatchNorm1d(3) if norm else nn.Identity(),
            nn.Linear(3, 1),
        )
        with torch.no_grad():
            self.hidden.weight.copy_(torch.tensor([[3.0, 0.0], [2.0, -2.0], [-1.0, 1.5]]))
            self.hidden.bias.zero_()
            self.head.weight.copy_(torch.tensor([[0.5, 0.25, 2.0]]))
            self.head.bias.zero_()
            if norm:
                self.norm.get_parameter("weight").copy_(torch.tensor([-0.3, 0.2, 0.1]))

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(self.norm(self.hidden(x)))
        return answer


def given(module: nn.Module) -> Ingredients:
    """What an importance may use: four equal samples."""
    samples, source = Samples({"x": INPUTS}), Source(Path(), Signature((), (), batch_axis=True), 32, module)
    return Ingredients(source, samples, ModelConfig(), samples, None, CPU, Path())


def scores(importance: Importance, module: nn.Module, ingredients: Ingredients) -> list[float]:
    """The score of every hidden channel."""
    structure = find_structure(module.eval(), [torch.from_numpy(INPUTS)])
    values = values_of(importance, ingredients, module, structure)
    (group,) = (group for group in find_groups(structure, values) if "hidden" in group.layers)
    return [float(score) for score in rank(values, group.units)]


@pytest.mark.parametrize(
    ("importance", "by_hand"),
    [
        ("l1", [3 + 0.5, 4 + 0.25, 2.5 + 2]),  # the row and the column of each channel
        ("l2", [9 + 0.25, 8 + 0.0625, 3.25 + 4]),  # their squares
        ("activation", [3, 2, 2]),  # |w x| with x = (1, 2): 3, 2 - 4, -1 + 3
    ],
)
def test_a_score_is_what_one_works_out_by_hand(importance: Importance, by_hand: list[float]) -> None:
    """Three rows and three columns of weights, and one input, are few enough to do it."""
    module = Tiny()
    assert scores(importance, module, given(module)) == pytest.approx(by_hand)


def test_taylor_is_how_the_answers_change_to_first_order() -> None:
    """Gradient times weight, summed over a channel's row and column: each is v (w x), at every sample."""
    module = Tiny()
    found = np.array(scores("taylor", module, given(module)))
    by_hand = np.abs([0.5 * 3, 0.25 * -2, 2 * 2])
    np.testing.assert_allclose(found / found[0], by_hand / by_hand[0], rtol=1e-5)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_batch_normalisation_ranks_by_the_size_of_its_scale() -> None:
    """A negative scale is as important as a positive one."""
    module = Tiny(norm=True)
    assert scores("batchnorm", module, given(module)) == pytest.approx([0.3, 0.2, 0.1])


def test_what_an_importance_says_nothing_about_is_ranked_by_l1() -> None:
    """Hidden channels without a normalisation of their own, in a network that has one elsewhere."""
    module = nn.Sequential(Tiny(), nn.Linear(1, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))
    structure = find_structure(module.eval(), [torch.from_numpy(INPUTS)])
    values = values_of("batchnorm", given(module), module, structure)
    groups = {group.layers[0]: rank(values, group.units).tolist() for group in find_groups(structure, values)}
    assert groups["0.hidden"] == pytest.approx([3.5, 4.25, 4.5])
    assert groups["1"] == [1.0, 1.0]


@pytest.mark.parametrize("importance", ["activation", "taylor"])
def test_the_same_channels_go_every_time(importance: Importance) -> None:
    """Whatever is random is seeded."""
    module = CASES["heads inferred"].make().eval()
    images = torch.randn(20, 1, 8, 8)
    structure = find_structure(module, [images[:2]])
    ingredients = replace(given(module), calibration=Samples({"x": images.numpy()}))
    first, second = (values_of(importance, ingredients, module, structure)[0] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("importance", ["activation", "taylor"])
@pytest.mark.parametrize("name", ["deep LSTM", "deep GRU", "words", "channels last", "heads inferred"])
def test_every_unit_gets_a_score_from_data(name: str, importance: Importance) -> None:
    """In any structure, recurrent units and attention heads included, units differ, and none is without a score."""
    torch.manual_seed(0)
    module = CASES[name].make().eval()
    images = torch.randn(4, 1, 8, 8)
    samples = Samples({"x": images.numpy()})
    ingredients = replace(given(module), calibration=samples)
    structure = find_structure(module, [images])
    values = values_of(importance, ingredients, module, structure)
    for group in find_groups(structure, values):
        found = rank(values[:1], group.units)
        assert (found > 0).all()
        assert len(set(found.tolist())) == len(group.units)


@pytest.mark.parametrize(("importance", "needs"), [("taylor", "samples"), ("batchnorm", "batch normalisation")])
def test_an_importance_that_lacks_what_it_needs_says_so(importance: Importance, needs: str) -> None:
    """The reason names what to add or to take instead."""
    module = Tiny()
    with pytest.raises(RecipeRejected, match=needs):
        scores(importance, module, replace(given(module), example=None, calibration=None))
    if importance == "batchnorm":
        module.norm = nn.BatchNorm1d(3, affine=False)
        with pytest.raises(RecipeRejected, match="with scales"):
            scores(importance, module, given(module))


@pytest.mark.parametrize("importance", ["l1", "l2", "batchnorm"])
def test_scores_are_torch_prunings(importance: Importance) -> None:
    """On a residual network with batch normalisation, as the library sums them up over everything that goes."""
    torch_pruning = pytest.importorskip("torch_pruning")
    kinds = torch_pruning.importance
    theirs = {
        "l1": kinds.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None),
        "l2": kinds.MagnitudeImportance(p=2, group_reduction="sum", normalizer=None),
        "batchnorm": kinds.BNScaleImportance(group_reduction="sum", normalizer=None),
    }[importance]
    torch.manual_seed(0)
    module, images = Residual().eval(), torch.randn(2, 1, 8, 8)
    nn.init.normal_(module.norm.weight)
    structure = find_structure(module, [images])
    values = values_of(importance, given(module), module, structure)
    graph = torch_pruning.DependencyGraph().build_dependency(module, images)
    groups = {name: group for group in find_groups(structure, values) for name in group.layers}
    for name in ("first",) if importance == "batchnorm" else ("first", "stem"):
        layer = module.get_submodule(name)
        remove = graph.get_pruner_of_module(layer).prune_out_channels
        wanted = theirs(graph.get_pruning_group(layer, remove, list(range(len(groups[name].units)))))
        assert rank(values, groups[name].units) == pytest.approx(wanted.tolist())


def test_every_sample_counts_alike() -> None:
    """A last chunk of one sample weighs as one: channels active on 64 of 65 samples, and hard on the last."""
    module = Tiny()
    inputs = np.zeros((65, 2), np.float32)
    inputs[:64, 0], inputs[64, 1] = 1, 20
    found = scores("activation", module, replace(given(module), calibration=Samples({"x": inputs})))
    assert found == pytest.approx([64 * 3 / 65, (64 * 2 + 40) / 65, (64 + 30) / 65])


def test_taylor_measures_frozen_weights_too() -> None:
    """They rank as those that learn, and are frozen afterwards."""
    module = Tiny()
    wanted = scores("taylor", module, given(module))
    module.requires_grad_(False)
    assert scores("taylor", module, given(module)) == pytest.approx(wanted)
    assert not any(value.requires_grad or value.grad is not None for value in module.parameters())


def test_taylor_needs_answers_with_gradients() -> None:
    """A forward without gradients, and answers that are class numbers, are told what to take instead."""

    class Silent(Tiny):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().forward(x)

    module = Silent()
    with pytest.raises(RecipeRejected, match=r"needs answers with gradients.* take `l1`"):
        scores("taylor", module, given(module))
