"""Pruning on a really trained model: what gets smaller, what is refused, and how accuracy comes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import Built
from onnx import numpy_helper
from recipe_fixtures import HIDING_NODES, built, hide_weight, images, ingredients, product_graph, run

from variants.cost import cost_of
from variants.data import Samples
from variants.recipes.prune import PruneChannels, PruneUnstructured, prune_channels, prune_unstructured
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source, export_graph


def test_pruned_is_really_smaller_and_keeps_its_outputs(built_digits: Built) -> None:
    """Half the channels leave about a quarter of the weights and operations, and still ten classes."""
    fp32, pruned = (cost_of(built(built_digits, name)) for name in ("fp32", "pruned"))
    assert 0.2 < pruned.weights / fp32.weights < 0.35
    assert 0.2 < pruned.flops / fp32.flops < 0.35
    assert pruned.size_bytes < fp32.size_bytes / 2
    assert run(built(built_digits, "pruned"), input=images(built_digits, 3)).shape == (3, 10)


def test_pruning_channels_needs_a_module(built_digits: Built, tmp_path: Path) -> None:
    """An ONNX source cannot lose channels, and the reason names what can be done instead."""
    with pytest.raises(RecipeRejected, match=r"needs a torch source.*pruned-unstructured"):
        prune_channels(ingredients(built(built_digits, "fp32"), tmp_path), PruneChannels())


class HardCoded(torch.nn.Module):
    """A module that knows its own width by heart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 8), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.second(self.first(x).reshape(-1, 2, 4).sum(1))
        return answer


def test_a_module_that_cannot_lose_channels_is_rejected(tmp_path: Path) -> None:
    """A hard-coded width is a reason on the card, never a crash or a broken artefact."""
    samples = Samples({"x": np.ones((4, 4), np.float32)})
    graph = tmp_path / "g.onnx"
    export_graph(HardCoded().eval(), samples.inputs, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, HardCoded().eval())
    with pytest.raises(RecipeRejected):
        prune_channels(ingredients(graph, tmp_path, samples, source=source), PruneChannels(recover="none"))


def test_unstructured_pruning_claims_only_what_it_does(built_digits: Built, tmp_path: Path) -> None:
    """70 % of the weights are zero, the file compresses better, and its size and operations stay."""
    graph = built(built_digits, "fp32")
    made = prune_unstructured(ingredients(graph, tmp_path), PruneUnstructured(sparsity=0.7))
    before, after = cost_of(graph), cost_of(made.files["model.onnx"])
    weights = [
        numpy_helper.to_array(t) for t in onnx.load(made.files["model.onnx"]).graph.initializer if len(t.dims) > 1
    ]
    zero_share = sum(int((w == 0).sum()) for w in weights if w.dtype == np.float32) / sum(
        w.size for w in weights if w.dtype == np.float32
    )
    assert zero_share == pytest.approx(0.7, abs=0.001)
    assert made.facts["zero_share"] == pytest.approx(0.7, abs=0.001)
    assert after.flops == before.flops
    assert after.size_bytes == pytest.approx(before.size_bytes, rel=0.01)
    assert after.compressed_bytes < 0.6 * before.compressed_bytes


@pytest.mark.parametrize("node", HIDING_NODES)
def test_unstructured_pruning_finds_weights_behind_other_nodes(tmp_path: Path, node: str) -> None:
    """A weight that an exporter left behind a Constant, Identity or Transpose node is pruned like any other."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    hide_weight(graph, node)
    made = prune_unstructured(ingredients(graph, tmp_path), PruneUnstructured(sparsity=0.5))
    assert made.facts["zero_share"] == 0.5
    assert read_signature(made.files["model.onnx"]) == read_signature(graph)
