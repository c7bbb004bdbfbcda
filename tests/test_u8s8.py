"""What all int8 recipes ask of a source."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import ingredients, product_graph

from variants.data import Samples
from variants.recipes import RECIPES
from variants.recipes.recipe import RecipeRejected


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-dynamic-per-tensor", "int8-static"])
def test_a_source_in_half_precision_is_rejected_by_its_name(tmp_path: Path, name: str) -> None:
    """ONNX Runtime hides 16-bit weights behind casts; the reason says what they are and what to give."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(64))
    model = onnx.load(graph)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.eye(64, dtype=np.float16), "w"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.save(model, graph)
    recipe, samples = RECIPES[name], Samples({"x": np.ones((2, 64), np.float16)})
    with pytest.raises(RecipeRejected, match=r"16-bit weights.*give the fp32 model"):
        recipe.make(ingredients(graph, tmp_path, samples), recipe.parameters())


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-static"])
def test_a_constant_in_half_precision_is_seen(tmp_path: Path, name: str) -> None:
    """A weight in a Constant node is a weight."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(64))
    model = onnx.load(graph)
    del model.graph.initializer[:]
    half = numpy_helper.from_array(np.eye(64, dtype=np.float16), "half")
    model.graph.node.insert(0, helper.make_node("Constant", [], ["half"], value=half))
    model.graph.node.insert(1, helper.make_node("Cast", ["half"], ["w"], to=TensorProto.FLOAT))
    onnx.save(model, graph)
    recipe, samples = RECIPES[name], Samples({"x": np.ones((2, 64), np.float32)})
    with pytest.raises(RecipeRejected, match="16-bit weights"):
        recipe.make(ingredients(graph, tmp_path, samples), recipe.parameters())


def test_a_small_constant_in_half_precision_is_no_weight(tmp_path: Path) -> None:
    """A row that an fp32 model keeps in 16 bits says nothing about its weights."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(256))
    model = onnx.load(graph)
    model.graph.node[0].output[0] = "product"
    half = numpy_helper.from_array(np.ones((1, 256), np.float16), "half")
    model.graph.node.append(helper.make_node("Constant", [], ["half"], value=half))
    model.graph.node.append(helper.make_node("Cast", ["half"], ["row"], to=TensorProto.FLOAT))
    model.graph.node.append(helper.make_node("Add", ["product", "row"], ["y"]))
    onnx.save(model, graph)
    recipe = RECIPES["int8-dynamic"]
    assert recipe.make(ingredients(graph, tmp_path), recipe.parameters()).facts["quantised_layers"] == 1


@pytest.mark.parametrize("name", ["int8-dynamic", "int8-dynamic-per-tensor"])
def test_an_absent_bias_may_have_an_empty_name(tmp_path: Path, name: str) -> None:
    """ONNX lets an optional last input be written as an empty name."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(256), np.zeros(256))
    model = onnx.load(graph)
    model.graph.node[0].input[2] = ""
    onnx.save(model, graph)
    recipe = RECIPES[name]
    assert recipe.make(ingredients(graph, tmp_path), recipe.parameters()).facts["quantised_layers"] == 1
