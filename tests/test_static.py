"""int8-static on a really trained model and on small graphs whose answers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import built, ingredients, product_graph

from variants.data import Samples
from variants.recipes import graph as recipe_graph
from variants.recipes.recipe import RecipeRejected
from variants.recipes.static import QuantizeStatic, quantize_static
from variants.runtimes.onnx_signature import read_signature


def test_a_mistyped_node_is_not_excluded_in_silence(tmp_path: Path) -> None:
    """`exclude` of a node that is not there is rejected, and the nearest is named."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4), name="dense_1")
    samples = Samples({"x": np.ones((4, 4), np.float32)}, None)
    with pytest.raises(RecipeRejected, match="no node 'dens_1'; did you mean 'dense_1'"):
        quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic(exclude=["dens_1"]))


def test_static_int8_is_u8s8_per_channel(built_digits: Built) -> None:
    """Weights are signed with a scale per channel, activations unsigned with constant scales: the fast form on x86."""
    graph = onnx.load(built(built_digits, "int8-static")).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    kernels = [constants[node.input[0]] for node in weights if len(constants[node.input[0]].dims) > 1]
    assert len(kernels) == 4
    assert {tensor.data_type for tensor in kernels} == {TensorProto.INT8}
    assert all(
        np.prod(constants[n.input[1]].dims, dtype=int) > 1 for n in weights if len(constants[n.input[0]].dims) > 1
    )
    activations = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert activations
    assert {constants[node.input[2]].data_type for node in activations} == {TensorProto.UINT8}


@pytest.mark.parametrize("opset", [11, 12])
def test_static_int8_of_an_old_opset(tmp_path: Path, opset: int) -> None:
    """Scales per channel need opset 13, so an older graph is raised to it first."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)), opset=opset)
    samples = Samples({"x": np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)})
    made = quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic())
    assert made.facts["quantised_layers"] == 1


def resizing_graph(path: Path) -> Path:
    """A convolution and an upsampling, as in a U-Net: x [batch, 3, 8, 8] -> y [batch, 4, 16, 16]."""
    kernel = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    constants = [numpy_helper.from_array(kernel, "w")]
    constants.append(numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Resize", ["c", "", "scales"], ["y"], "up", mode="nearest"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4, 16, 16])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=opsets, ir_version=9), path
    )
    return path


def test_static_int8_keeps_the_batch_of_a_graph_that_resizes(tmp_path: Path) -> None:
    """Shape inference calls an upsampled batch `floor(1.0*batch)`; the variant still batches like its source."""
    graph = resizing_graph(tmp_path / "g.onnx")
    samples = Samples({"x": np.random.default_rng(1).normal(size=(16, 3, 8, 8)).astype(np.float32)})
    made = quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic())
    assert made.facts["quantised_layers"] == 1
    assert read_signature(made.files["model.onnx"]) == read_signature(graph)
    assert read_signature(graph).batch_axis


def test_a_changed_graph_that_lost_its_batch_is_rejected(tmp_path: Path) -> None:
    """Two names for dimension 0 make no batch, whatever tool gave the second one."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    model = onnx.load(graph)
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "floor(1.0*batch)"
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(RecipeRejected, match="other tensors than the source"):
        recipe_graph._prove_sound(ingredients(graph, tmp_path), tmp_path / "changed.onnx")
