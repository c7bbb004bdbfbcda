"""prune-channels on a really trained model: what gets smaller and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from factory_fixtures import Built
from recipe_fixtures import built, images, ingredients, run

from variants.cost import cost_of
from variants.data import Samples
from variants.recipes.channels import PruneChannels, prune_channels
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
