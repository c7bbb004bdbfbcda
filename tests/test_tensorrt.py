"""The file for TensorRT: its structure, as NVIDIA asks for it, and its answers on ONNX Runtime. TensorRT never ran."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
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
from recipe_fixtures import ingredients, run

from variants.recipes.int8.mixed import QuantizeMixed, quantize_mixed
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.int8.tensorrt import TENSORRT_FILE

LAYERS = ("Conv", "ConvTranspose", "MatMul", "Gemm")


def refuse_what_tensorrt_refuses(path: Path) -> Counter[str]:
    """Assert the rules of explicit quantisation over a whole graph; returns how many layers of each kind are in it."""
    graph = onnx.load(path).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    layers: Counter[str] = Counter()
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert constants[node.input[2]].dtype == np.int8
            assert not constants[node.input[2]].any()
        pairs = [makers[name] for name in node.input if name in makers and makers[name].op_type == "DequantizeLinear"]
        if pairs and node.op_type != "QuantizeLinear":
            assert node.op_type in LAYERS
            assert [pair.output[0] for pair in pairs] == list(node.input[:2])  # and never the bias
            layers[node.op_type] += 1
        for pair in pairs:
            assert makers[pair.input[0]].op_type == "QuantizeLinear"
            assert readers[pair.output[0]] == readers[pair.input[0]] == 1
    assert not {tensor.data_type for tensor in graph.initializer} & {TensorProto.UINT8, TensorProto.INT32}
    return layers


def test_a_trained_network_is_symmetric_and_in_pairs(tmp_path: Path) -> None:
    """Zero points are 0 in int8, each layer reads input and weight through a pair of its own, and answers agree."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path), QuantizeStatic())
    assert list(product.files) == ["model.onnx", TENSORRT_FILE]
    assert refuse_what_tensorrt_refuses(product.files[TENSORRT_FILE]) == {"Gemm": 3}
    x = digits()[2].inputs["x"]
    expected, found = run(graph, x=x), run(product.files[TENSORRT_FILE], x=x)
    assert np.mean(found.argmax(axis=1) == expected.argmax(axis=1)) > 0.98
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.03


def test_weights_have_a_scale_per_output_channel(tmp_path: Path) -> None:
    """One scale per output of the transposed weights, which are themselves untouched floats."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    made = onnx.load(quantize_static(given(graph, tmp_path), QuantizeStatic()).files[TENSORRT_FILE]).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in made.initializer}
    first = next(node for node in made.node if "0.weight" in node.input)
    np.testing.assert_array_equal(constants["0.weight"], mlp_weights()["0.weight"])
    np.testing.assert_allclose(
        constants[first.input[1]], np.abs(mlp_weights()["0.weight"]).max(axis=1) / 127, rtol=1e-6
    )
    assert onnx.helper.get_node_attr_value(first, "axis") == 0


def test_what_lies_between_layers_reads_floats(tmp_path: Path) -> None:
    """Sums and pools of a convolutional network are left to TensorRT, and so is the last layer's bias."""
    graph = classifier(tmp_path / "g.onnx")
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files[TENSORRT_FILE]
    assert refuse_what_tensorrt_refuses(made) == {"Conv": 1, "Gemm": 1}
    np.testing.assert_allclose(run(made, x=IMAGES.inputs["x"]), run(graph, x=IMAGES.inputs["x"]), atol=0.03)


def test_two_readers_have_two_pairs(tmp_path: Path) -> None:
    """TensorRT shares no pair between layers, so a tensor that two convolutions read is quantised for each."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["a"], "one", pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["x", "k2"], ["b"], "other", pads=[1, 1, 1, 1]),
        helper.make_node("Sub", ["a", "b"], ["d"], "difference"),
        helper.make_node("ConvTranspose", ["d", "k"], ["e"], "up"),
        helper.make_node("Add", ["e", "e"], ["y"], "twice"),
    ]
    graph = model_of(tmp_path / "g.onnx", nodes, {"k": KERNEL, "k2": KERNEL[::-1].copy()}, ["batch", 2, 10, 10])
    made = quantize_static(ingredients(graph, tmp_path, IMAGES), QuantizeStatic()).files[TENSORRT_FILE]
    assert refuse_what_tensorrt_refuses(made) == {"Conv": 2, "ConvTranspose": 1}
    expected, found = (run(each, x=IMAGES.inputs["x"]) for each in (graph, made))
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.03


@pytest.mark.slow
def test_a_transformer_shares_no_pair(tmp_path: Path) -> None:
    """What a residual sum reads too stays a float there, and attention's own products have no pairs."""
    graph = tmp_path / "g.onnx"
    graph.write_bytes(transformer())
    made = quantize_static(given(graph, tmp_path), QuantizeStatic()).files[TENSORRT_FILE]
    assert refuse_what_tensorrt_refuses(made) == {"MatMul": 4, "Gemm": 2}
    x = digits()[2].inputs["x"]
    expected, found = run(graph, x=x), run(made, x=x)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < 0.05


def test_layers_that_are_kept_are_kept_here_too(tmp_path: Path) -> None:
    """The mixed variant's file leaves the same layer in floating point."""
    graph = write_mlp(tmp_path / "g.onnx", with_outlier(mlp_weights(), 300))
    product = quantize_mixed(given(graph, tmp_path), QuantizeMixed())
    assert product.facts["kept_layers"] == ["second"]
    assert refuse_what_tensorrt_refuses(product.files[TENSORRT_FILE]) == {"Gemm": 2}
