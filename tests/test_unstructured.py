"""prune-unstructured on a really trained model: what it claims is what it does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from factory_fixtures import Built
from onnx import numpy_helper
from recipe_fixtures import HIDING_NODES, built, hide_weight, ingredients, product_graph

from variants.cost import cost_of
from variants.recipes.unstructured import PruneUnstructured, prune_unstructured
from variants.runtimes.onnx_signature import read_signature


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
