"""Which nodes of a graph become bytes, and what the others go on reading."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from quantised_models import (
    IMAGES,
    KERNEL,
    classifier,
    given,
    mlp_weights,
    model_of,
    write_mlp,
)  # fmt: skip
from recipe_fixtures import ingredients, product_graph, run

from variants.data import Samples
from variants.recipes.int8.qdq import prepare
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import RecipeRejected


def test_a_mistyped_node_is_not_excluded_in_silence(tmp_path: Path) -> None:
    """`exclude` of a node that is not there is rejected, and the nearest is named."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4), name="dense_1")
    samples = Samples({"x": np.ones((4, 4), np.float32)}, None)
    with pytest.raises(RecipeRejected, match="no node 'dens_1'; did you mean 'dense_1'"):
        quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic(exclude=["dens_1"]))


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


def test_what_a_branch_reads_is_not_clipped(tmp_path: Path) -> None:
    """A branch of If sees the tensor before a ReLU as it was, and the one after it by its name."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    model = onnx.load(graph)
    model.graph.node[0].output[0] = "before"
    model.graph.node.append(helper.make_node("Relu", ["before"], ["after"]))
    model.graph.node.append(helper.make_node("MatMul", ["after", "w"], ["twice"]))
    model.graph.node.append(helper.make_node("ReduceMax", ["x"], ["most"], keepdims=0))
    model.graph.node.append(helper.make_node("Greater", ["most", "zero"], ["go"]))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "zero"))
    branches = [
        helper.make_graph(
            [helper.make_node("Add", ["twice", name], [f"{name}_sum"])],
            name,
            [],
            [helper.make_tensor_value_info(f"{name}_sum", TensorProto.FLOAT, ["batch", 4])],
        )
        for name in ("before", "after")
    ]
    model.graph.node.append(helper.make_node("If", ["go"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    onnx.save(model, graph)
    x = np.array([[-1, 0.5, 1, -0.5], [-0.25, 1, -1, 0.75]], np.float32)
    made = quantize_static(ingredients(graph, tmp_path, Samples({"x": x})), QuantizeStatic()).files["model.onnx"]
    assert np.abs(run(made, x=x) - run(graph, x=x)).max() < 0.03
