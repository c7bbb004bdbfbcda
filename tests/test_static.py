"""int8-static: what becomes 8-bit, in which ranges, on really trained models and on small graphs with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static
from quantised_models import (
    IMAGES,
    digits,
    given,
    mlp_weights,
    model_of,
    transformer,
    with_outlier,
    write_mlp,
)  # fmt: skip
from recipe_fixtures import built, ingredients, product_graph

from variants.data import Samples
from variants.recipes import graph as recipe_graph
from variants.recipes.int8.qdq import LAYERS, prepare
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import read_signature


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


@pytest.mark.parametrize(("opset", "ir_version"), [(11, 9), (12, 9), (8, 3)])
def test_static_int8_of_an_old_file(tmp_path: Path, opset: int, ir_version: int) -> None:
    """Scales per channel need opset 13, and weights that are no inputs IR 4: an older file is raised first."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)), opset=opset)
    model = onnx.load(graph)
    if ir_version < 4:
        model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [8, 4]))
    model.ir_version = ir_version
    onnx.save(model, graph)
    samples = Samples({"x": np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)})
    made = quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic())
    assert made.facts["quantised_layers"] == 1
    assert [value.name for value in onnx.load(made.files["model.onnx"]).graph.input] == ["x"]


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


def test_a_quantised_source_is_rejected(tmp_path: Path) -> None:
    """A graph that holds pairs of QuantizeLinear and DequantizeLinear is not quantised a second time."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    samples = Samples({"x": np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)})
    made = quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic()).files["model.onnx"]
    with pytest.raises(RecipeRejected, match="quantised already"):
        quantize_static(ingredients(made, tmp_path, samples), QuantizeStatic())


def test_a_recurrent_network_is_rejected(tmp_path: Path) -> None:
    """An LSTM has no static form, and a model of nothing else says so."""
    weights = {name: np.ones((1, 4 * 3, 16 if name == "w" else 3), np.float32) for name in ("w", "r")}
    nodes = [
        helper.make_node("Reshape", ["x", "shape"], ["steps"]),
        helper.make_node("LSTM", ["steps", "w", "r"], ["y"], hidden_size=3),
    ]
    graph = model_of(tmp_path / "g.onnx", nodes, weights | {"shape": np.array([8, -1, 16])}, [8, 1, "batch", 3])
    with pytest.raises(RecipeRejected, match=r"nothing to quantise statically among LSTM"):
        quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic())


def test_calibration_data_are_needed(tmp_path: Path) -> None:
    """Without them the recipe names the section that is missing."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    with pytest.raises(RecipeRejected, match="add `calibration:`"):
        quantize_static(given(graph, tmp_path, calibration=None), QuantizeStatic())


@pytest.mark.slow
def test_a_transformer_keeps_sums_norms_and_attention_in_floats(tmp_path: Path) -> None:
    """Of a trained transformer the products with constant weights are quantised, and nothing else is."""
    graph = tmp_path / "g.onnx"
    graph.write_bytes(transformer())
    product = quantize_static(given(graph, tmp_path), QuantizeStatic())
    after = onnx.load(product.files["model.onnx"]).graph
    bytes_read = {node.output[0] for node in after.node if node.op_type == "DequantizeLinear"}
    readers = {node.op_type for node in after.node if not bytes_read.isdisjoint(node.input)}
    assert readers <= set(LAYERS)
    assert product.facts["quantised_layers"] == 6
    assert sum(len(tensor.dims) == 2 and tensor.data_type == TensorProto.INT8 for tensor in after.initializer) == 6
    assert sum(n.op_type == "MatMul" and bytes_read.isdisjoint(n.input) for n in after.node) == 2  # attention's own


class Reader:
    """The calibration samples as ONNX Runtime's own quantiser wants them."""

    def __init__(self, samples: Samples) -> None:
        self._batches = [samples.inputs]

    def get_next(self) -> Any:
        """All samples at once, then None."""
        return self._batches.pop() if self._batches else None


@pytest.mark.slow
def test_a_transformer_survives_better_than_by_default(tmp_path: Path) -> None:
    """ONNX Runtime's default operators do twice the damage to the same trained network on the same data."""
    graph, default = tmp_path / "g.onnx", tmp_path / "default.onnx"
    graph.write_bytes(transformer())
    given_here = given(graph, tmp_path)
    ours = quantize_static(given_here, QuantizeStatic(calibrate="minmax"))
    ort_quantize_static(
        prepare(given_here, []).graph,
        default,
        Reader(digits()[1]),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod.MinMax,
    )
    assert given_here.trial is not None
    tried = given_here.trial.judge(ours.files["model.onnx"])
    assert tried.passes
    assert tried.damage < 0.6 * given_here.trial.judge(default).damage


def methods(product: Any) -> dict[str, Any]:
    """The calibration trials of a product by method."""
    return {row["method"]: row for row in product.findings["calibration"]}


def test_the_method_is_chosen_by_damage(tmp_path: Path) -> None:
    """A trained network with one unit far larger than the rest: clipping it does less harm, and is what is taken."""
    graph = write_mlp(tmp_path / "g.onnx", with_outlier(mlp_weights(), 300))
    product = quantize_static(given(graph, tmp_path), QuantizeStatic())
    tried = methods(product)
    assert set(tried) == {"minmax", "percentile", "entropy"}
    chosen = str(product.facts["calibration_method"])
    assert [name for name, row in tried.items() if row["chosen"]] == [chosen] == ["entropy"]
    assert tried["entropy"]["damage"] < 0.5 * tried["minmax"]["damage"]
    trial = given(graph, tmp_path).trial
    assert trial is not None
    assert trial.judge(product.files["model.onnx"]).damage == pytest.approx(tried[chosen]["damage"], abs=1e-6)


def test_a_healthy_network_keeps_its_full_range(tmp_path: Path) -> None:
    """Without outliers, clipping only does harm: `minmax` has the least damage, and all methods pass."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    tried = methods(quantize_static(given(graph, tmp_path), QuantizeStatic()))
    assert tried["minmax"]["chosen"]
    assert all(row["passes"] for row in tried.values())
    assert tried["minmax"]["damage"] == min(row["damage"] for row in tried.values())


def test_without_tuning_data_the_full_range_is_taken_untried(tmp_path: Path) -> None:
    """There is nothing to choose by, and the card says so."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path, trial=None), QuantizeStatic())
    assert methods(product) == {
        "minmax": dict.fromkeys(("drop", "agreement", "damage", "passes")) | {"method": "minmax", "chosen": True}
    }
    assert "no tuning data" in str(product.facts["calibration_choice"])


def test_a_method_can_be_asked_for(tmp_path: Path) -> None:
    """Then it is the only one that is tried."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path), QuantizeStatic(calibrate="percentile"))
    assert list(methods(product)) == [product.facts["calibration_method"]] == ["percentile"]


def test_a_quick_build_tries_one_method_on_fewer_samples(tmp_path: Path) -> None:
    """`quick` is less of the same: the full range, of 64 samples."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path, quick=True), QuantizeStatic())
    assert list(methods(product)) == ["minmax"]
    assert product.facts["calibration_samples"] == 64
