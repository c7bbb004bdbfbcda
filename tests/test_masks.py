"""prune-masks: whole channels are zero, those with the least norm, and the file says that nothing else is gained."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from recipe_fixtures import ingredients, product_graph
from torch import nn
from trained_cnn import Trained, load_trained

from variants.cost import cost_of
from variants.data import Samples
from variants.recipes.pruning.masks import PruneMasks, prune_masks
from variants.recipes.pruning.outputs import output_layers
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source


@pytest.fixture(scope="module")
def trained(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The trained CNN."""
    return load_trained(trained_digits, tmp_path_factory.mktemp("cnn"))


def given(module: nn.Module, work: Path) -> Ingredients:
    """What the recipe gets for a small module of four inputs without training data; it does not look at the graph."""
    graph = product_graph(work / "g.onnx", np.eye(4))
    source = Source(graph, read_signature(graph), 32, module.eval())
    return ingredients(graph, work, Samples({"input": np.ones((4, 4), np.float32)}), source=source)


def zeroed(weight: Any) -> list[int]:
    """The channels of a weight, dimension 0, that are all zero."""
    return [index for index, channel in enumerate(weight) if not channel.any()]


def test_masked_channels_are_zero_and_save_nothing(trained: Trained, tmp_path: Path) -> None:
    """Half of the channels of every layer but the last are zero in the file, which is as large and as much work."""
    made = prune_masks(trained.given(tmp_path), PruneMasks(recover="none"))
    file = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.files["model.onnx"]).graph.initializer}
    assert {name: len(zeroed(file[f"{name}.weight"])) for name in "0479"} == {"0": 8, "4": 16, "7": 32, "9": 0}
    before, after = cost_of(trained.graph), cost_of(made.files["model.onnx"])
    assert (after.flops, after.weights) == (before.flops, before.weights)
    assert after.compressed_bytes < 0.7 * before.compressed_bytes
    assert made.facts["zeroed_channel_share"] == 0.5
    assert made.facts["faster_or_smaller_file"] is False
    assert made.facts["really_smaller_with"] == "prune-channels"
    assert made.findings["zero_share_by_layer"] == {f"{name}.weight": 0.5 for name in "047"}
    assert made.module is not None
    bias = made.module.get_parameter("4.bias")
    assert torch.equal(bias, trained.module[4].bias), "a masked channel still answers with its bias"


@pytest.mark.parametrize(("norm", "gone"), [(1, 0), (2, 1)])
def test_channels_with_the_least_norm_are_masked(tmp_path: Path, norm: int, gone: int) -> None:
    """One large weight (L1 3, L2 3) against four small ones (L1 4, L2 2): the norm decides which channel goes."""
    module = nn.Sequential(nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3))
    with torch.no_grad():
        module[0].get_parameter("weight").copy_(torch.tensor([[3.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    asked = PruneMasks.model_validate({"norm": norm, "recover": "none"})
    made = prune_masks(given(module, tmp_path), asked)
    assert made.module is not None
    assert zeroed(made.module.get_parameter("0.weight")) == [gone]


def test_a_weight_shared_with_the_outputs_or_an_embedding_stays_whole(tmp_path: Path) -> None:
    """What a hidden layer masks, the layer of the outputs or an embedding would lose too."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.read, self.free = nn.Embedding(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.again, self.out = nn.Linear(4, 4), nn.Linear(4, 4)
            self.read.weight, self.again.weight = self.table.weight, self.out.weight

        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - what the data are called
            hidden = self.read(input) + self.table(torch.zeros(1, dtype=torch.long))
            answer: torch.Tensor = self.out(self.again(self.free(hidden).relu()).relu())
            return answer

    made = prune_masks(given(Tied(), tmp_path), PruneMasks(recover="none"))
    assert list(made.findings["zero_share_by_layer"]) == ["free.weight"]  # type: ignore[call-overload]


def test_every_layer_keeps_a_channel(tmp_path: Path) -> None:
    """At 99 % the network still carries something from its inputs to its outputs."""
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU(), nn.Linear(2, 3))
    made = prune_masks(given(module, tmp_path), PruneMasks(sparsity=0.99, recover="none"))
    assert made.module is not None
    left = {name: value for name, value in made.module.named_parameters() if "weight" in name}
    assert [len(zeroed(weight)) for weight in left.values()] == [7, 1, 0]


@pytest.mark.slow
def test_masks_hold_through_recovery(trained: Trained, tmp_path: Path) -> None:
    """Masking 70 % of the channels costs the trained model most answers; it regains them on the channels left."""
    bare = prune_masks(trained.given(tmp_path / "bare"), PruneMasks(sparsity=0.7, recover="none"))
    made = prune_masks(trained.given(tmp_path / "recovered"), PruneMasks(sparsity=0.7))
    assert trained.right(bare.files["model.onnx"]) < 0.6
    assert trained.right(made.files["model.onnx"]) > 0.85
    assert bare.module is not None
    assert made.module is not None
    for name in ("0.weight", "4.weight", "7.weight"):
        before, after = bare.module.get_parameter(name), made.module.get_parameter(name)
        assert zeroed(before) == zeroed(after)
        assert not torch.equal(before, after)


class Branches(nn.Module):
    """Two outputs: a residual sum of two layers, and one behind a softmax; and a transposed convolution before them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose1d(4, 6, 1)
        self.inner, self.left, self.right = nn.Linear(6, 5), nn.Linear(5, 3), nn.Linear(5, 3)
        self.classes = nn.Linear(5, 2)

    def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # noqa: A002 - the data's own name
        inner = torch.relu(self.inner(self.up(input[:, :, None])[:, :, 0]))
        return self.left(inner) + torch.tanh(self.right(inner)), self.classes(inner).softmax(1)


def test_layers_that_make_the_outputs_keep_all_channels(tmp_path: Path) -> None:
    """Both sides of a residual sum and a classifier are outputs; a transposed convolution's channels are columns."""
    torch.manual_seed(0)
    module = Branches()
    outputs = output_layers(module, {"input": torch.ones(2, 4)})
    assert set(outputs) == {module.left, module.right, module.classes}
    made = prune_masks(given(module, tmp_path), PruneMasks(recover="none"))
    left = copy.deepcopy(made.module)
    assert isinstance(left, Branches)
    assert len(zeroed(left.up.weight.transpose(0, 1))) == 3
    assert len(zeroed(left.inner.weight)) == 2
    assert all(zeroed(layer.weight) == [] for layer in (left.left, left.right, left.classes))
    assert made.facts["zeroed_channel_share"] == round(5 / 11, 4)


def test_frozen_layers_may_make_outputs() -> None:
    """A layer that does not learn makes an output like any other, and does not learn afterwards either."""
    module = Branches().requires_grad_(False)
    assert set(output_layers(module, {"input": torch.ones(2, 4)})) == {module.left, module.right, module.classes}
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_an_onnx_source_is_rejected(tmp_path: Path) -> None:
    """A graph's channels are not masked, and the reason names what is."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    with pytest.raises(RecipeRejected, match=r"need a torch source.*prune-unstructured"):
        prune_masks(ingredients(graph, tmp_path), PruneMasks())


def test_a_module_of_outputs_only_is_rejected(tmp_path: Path) -> None:
    """A single layer, whose channels are the outputs, has none to spare."""
    with pytest.raises(RecipeRejected, match="no layer of a known type"):
        prune_masks(given(nn.Sequential(nn.Linear(4, 3)), tmp_path), PruneMasks(recover="none"))


class Pooling(nn.Module):
    """The answer is a weighted mean of `value`'s channels over four steps; `mix` is how weights come about."""

    def __init__(self, mix: str) -> None:
        super().__init__()
        self.mix, self.before = mix, nn.Linear(4, 6)
        self.score, self.value = nn.Linear(6, 1), nn.Linear(6, 8)
        self.weights = nn.Parameter(torch.randn(1, 4))

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's own name
        steps = self.before(input).relu().unsqueeze(1) * torch.arange(1.0, 5.0)[:, None]
        weights = self.score(steps).softmax(1).transpose(1, 2) if self.mix == "scores" else self.weights.softmax(-1)
        answer: torch.Tensor = (weights @ self.value(steps)).squeeze(1)
        return answer


@pytest.mark.parametrize("mix", ["scores", "learnt"])
def test_values_that_attention_pools_are_outputs(tmp_path: Path, mix: str) -> None:
    """A product of two activations, or with weights that are no layer's, leaves channels apart: all must stay."""
    torch.manual_seed(0)
    made = prune_masks(given(Pooling(mix), tmp_path), PruneMasks(recover="none"))
    assert isinstance(made.module, Pooling)
    assert zeroed(made.module.value.weight) == []
    assert len(zeroed(made.module.before.weight)) == 3


class Unknown(nn.Module):
    """Answers with the number of a class, or without gradients."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.hidden, self.head = form, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's own name
        with torch.set_grad_enabled(self.form != "no_grad"):
            answer: torch.Tensor = self.head(self.hidden(input).relu())
        return answer.argmax(-1) if self.form == "argmax" else answer


@pytest.mark.parametrize("form", ["argmax", "no_grad"])
def test_outputs_whose_layers_cannot_be_told_are_rejected(tmp_path: Path, form: str) -> None:
    """Rather than mask classes that a client is answered, nothing is masked."""
    with pytest.raises(RecipeRejected, match="which layers make output 0 cannot be told"):
        prune_masks(given(Unknown(form), tmp_path), PruneMasks(recover="none"))
