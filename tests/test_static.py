"""int8-static: what becomes 8-bit, in which ranges, on really trained models and on small graphs with known answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization import quantize_static as ort_quantize_static
from quantised_models import (
    IMAGES,
    KERNEL,
    classifier,
    digits,
    given,
    mlp_weights,
    model_of,
    transformer,
    with_outlier,
    write_mlp,
)  # fmt: skip
from recipe_fixtures import built, ingredients, product_graph, run

from variants.data import Samples
from variants.recipes import graph as recipe_graph
from variants.recipes.qdq import LAYERS, prepare
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


def floats_read_by(path: Path, operator: str) -> set[str]:
    """The inputs of all nodes of a kind that are not dequantised bytes."""
    graph = onnx.load(path).graph
    dequantised = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return {name for node in graph.node if node.op_type == operator for name in node.input} - dequantised


def test_a_classifier_that_ends_in_softmax_is_no_transformer(tmp_path: Path) -> None:
    """Its convolutions, sums and pools are quantised, nodes without names included, and the softmax is not."""
    graph = classifier(tmp_path / "g.onnx")
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files["model.onnx"]
    for operator in ("Conv", "Add", "GlobalAveragePool", "Gemm"):
        assert floats_read_by(made, operator) == set(), operator
    assert floats_read_by(made, "Softmax") == {"z"}
    np.testing.assert_allclose(run(made, x=IMAGES.inputs["x"]), run(graph, x=IMAGES.inputs["x"]), atol=0.03)


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 1.0), (1.0, 0.5), (0.5, 2.0)])
def test_a_product_keeps_its_factors(tmp_path: Path, alpha: float, beta: float) -> None:
    """A Gemm's alpha and beta mean in 8 bits what they meant before, in both files; the quantiser itself drops beta."""
    rng = np.random.default_rng(0)
    bias, x = np.array([3, -3, 2, 1]), rng.normal(size=(64, 8)).astype(np.float32)
    graph = product_graph(tmp_path / "g.onnx", rng.normal(size=(8, 4)), bias, alpha=alpha, beta=beta)
    files = quantize_static(ingredients(graph, tmp_path, Samples({"x": x})), QuantizeStatic()).files
    for file in files.values():
        np.testing.assert_allclose(run(file, x=x), run(graph, x=x), atol=0.3)


def test_what_follows_no_layer_stays_in_floating_point(tmp_path: Path) -> None:
    """A sum that neither reads nor feeds an 8-bit layer would only lose accuracy, not time."""
    nodes = [
        helper.make_node("Add", ["x", "x"], ["a"], "alone"),
        helper.make_node("Sigmoid", ["a"], ["s"], "squash"),
        helper.make_node("Conv", ["s", "k"], ["y"], "layer", pads=[1, 1, 1, 1]),
    ]
    graph = model_of(tmp_path / "g.onnx", nodes, {"k": KERNEL}, ["batch", 2, 8, 8])
    assert prepare(ingredients(graph, tmp_path, IMAGES), []).nodes(["layer"]) == ["layer"]


def test_an_excluded_node_keeps_its_weights_and_reads_floats(tmp_path: Path) -> None:
    """`exclude` leaves a layer as it was, and the layer before hands it floats rather than bytes."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path), QuantizeStatic(exclude=["second"]))
    nodes = {node.name: node for node in onnx.load(product.files["model.onnx"]).graph.node}
    assert product.facts["quantised_layers"] == 2
    assert list(nodes["second"].input) == list(onnx.load(graph).graph.node[2].input)
    assert nodes["relu_0"].input[0] == nodes["first"].output[0]


def test_a_relu_that_bytes_replaced_is_not_lost(tmp_path: Path) -> None:
    """Its bytes cannot be negative, so the node is gone, and what reads floats must not read what came before it."""
    nodes = [
        helper.make_node("Flatten", ["x"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w"], ["g"], "first"),
        helper.make_node("Relu", ["g"], ["r"], "relu"),
        helper.make_node("Gemm", ["r", "v"], ["a"], "second"),
        helper.make_node("Sub", ["a", "r"], ["y"], "difference"),
    ]
    rng = np.random.default_rng(6)
    constants = {name: rng.normal(size=size).astype(np.float32) for name, size in (("w", (128, 4)), ("v", (4, 4)))}
    graph = model_of(tmp_path / "g.onnx", nodes, constants, ["batch", 4])
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files["model.onnx"]
    assert "relu" not in {node.name for node in onnx.load(made).graph.node}
    expected, found = (run(each, x=IMAGES.inputs["x"]) for each in (graph, made))
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.03


CLIPPED = [
    helper.make_node("Conv", ["x", "k"], ["c"], "first", pads=[1] * 4),
    helper.make_node("Clip", ["c", "low", "high"], ["r"], "clip"),
    helper.make_node("Conv", ["r", "k"], ["y"], "second", pads=[1] * 4),
]


@pytest.mark.parametrize(("low", "high", "goes"), [(0, 6, True), (1, 6, False), (-6, -0.5, False)])
def test_only_a_clip_whose_range_holds_zero_goes(tmp_path: Path, low: float, high: float, goes: bool) -> None:
    """Bytes always reach over zero, so they cannot stand for other bounds."""
    bounds = {"low": np.float32(low), "high": np.float32(high)}
    graph = model_of(tmp_path / "g.onnx", CLIPPED, {"k": KERNEL, **bounds}, ["batch", 2, 8, 8])
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files["model.onnx"]
    assert ("clip" not in {node.name for node in onnx.load(made).graph.node}) == goes
    expected, found = (run(each, x=IMAGES.inputs["x"]) for each in (graph, made))
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


@pytest.mark.parametrize("operator", ["Relu", "Clip"])
def test_an_output_before_an_activation_is_not_clipped(tmp_path: Path, operator: str) -> None:
    """A caller who reads a convolution's results gets the negative ones too, whatever follows inside the graph."""
    nodes = [CLIPPED[0], helper.make_node(operator, ["c"], ["r"], "act"), CLIPPED[2]]
    nodes[1].input.extend(["low"] if operator == "Clip" else [])
    constants = {"k": KERNEL, "low": np.float32(0)}
    graph = model_of(tmp_path / "g.onnx", nodes, constants, ["batch", 2, 8, 8])
    model = onnx.load(graph)
    model.graph.output.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, ["batch", 2, 8, 8]))
    onnx.save(model, graph)
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files["model.onnx"]
    expected, found = (onnxruntime.InferenceSession(each).run(["c"], IMAGES.inputs)[0] for each in (graph, made))
    assert np.abs(found - expected).max() < 0.03 * np.abs(expected).max()


def test_a_quantised_source_is_rejected(tmp_path: Path) -> None:
    """A graph that holds pairs of QuantizeLinear and DequantizeLinear is not quantised a second time."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    samples = Samples({"x": np.random.default_rng(1).normal(size=(32, 8)).astype(np.float32)})
    made = quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic()).files["model.onnx"]
    with pytest.raises(RecipeRejected, match="quantised already"):
        quantize_static(ingredients(made, tmp_path, samples), QuantizeStatic())


@pytest.mark.parametrize("shape", [(), (1,), (1, 4), (1, 1)])
def test_a_bias_may_be_broadcast(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """A Gemm's bias in any shape that means one row is quantised with its layer, its beta included."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(64, 8)).astype(np.float32)
    graph = product_graph(tmp_path / "g.onnx", rng.normal(size=(8, 4)), rng.normal(size=shape) + 3, beta=2.0)
    made = quantize_static(ingredients(graph, tmp_path, Samples({"x": x})), QuantizeStatic())
    np.testing.assert_allclose(run(made.files["model.onnx"], x=x), run(graph, x=x), atol=0.2)


def test_layers_that_share_a_weight_part(tmp_path: Path) -> None:
    """One of two layers with the same weight can stay in floating point, with the floats that it had."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["h"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["h", "k"], ["y"], "other", pads=[1, 1, 1, 1]),
    ]
    graph = model_of(tmp_path / "g.onnx", nodes, {"k": KERNEL}, ["batch", 2, 8, 8])
    product = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic(exclude=["other"]))
    made = onnx.load(product.files["model.onnx"]).graph
    other = next(node for node in made.node if node.name == "other")
    weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    np.testing.assert_array_equal(weights[other.input[1]], KERNEL)
    assert product.facts["quantised_layers"] == 1


def test_a_relu_at_the_end_is_left_to_floats(tmp_path: Path) -> None:
    """After the last product nothing needs bytes, although a convolution before it writes some."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "between"),
        helper.make_node("Flatten", ["r"], ["f"], "flat"),
        helper.make_node("Gemm", ["f", "w"], ["g"], "last"),
        helper.make_node("Relu", ["g"], ["y"], "end"),
    ]
    constants = {"k": KERNEL, "w": np.ones((128, 3), np.float32)}
    graph = model_of(tmp_path / "g.onnx", nodes, constants, ["batch", 3])
    assert prepare(ingredients(graph, tmp_path, IMAGES), []).nodes(["first", "last"]) == ["first", "between", "last"]


def test_the_answers_are_floats_to_the_end(tmp_path: Path) -> None:
    """The last product writes floats: rounding logits, values or embeddings to a byte would gain nothing."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    made = onnx.load(quantize_static(given(graph, tmp_path), QuantizeStatic()).files["model.onnx"]).graph
    assert next(node.op_type for node in made.node if "y" in node.output) == "Gemm"


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
