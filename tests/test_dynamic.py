"""int8-dynamic on a really trained model and on small graphs whose answers are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import HIDING_NODES, built, hide_weight, images, ingredients, product_graph, run

from variants.cost import cost_of
from variants.data import Samples
from variants.hardware import Hardware
from variants.recipes import dynamic
from variants.recipes.dynamic import QuantizeDynamic, quantize_dynamic
from variants.recipes.recipe import RecipeRejected
from variants.recipes.static import QuantizeStatic, quantize_static
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source, export_graph


def test_dynamic_int8_is_bit_equal_alone_and_in_company(built_digits: Built) -> None:
    """Every real image gets the same logits to the bit, alone or among 60 others."""
    graph, x = built(built_digits, "int8-dynamic"), images(built_digits)
    together = run(graph, input=x)
    assert all(np.array_equal(run(graph, input=x[i : i + 1])[0], together[i]) for i in range(len(x)))
    assert not np.array_equal(together, run(built(built_digits, "fp32"), input=x))  # it really is another arithmetic


def test_dynamic_int8_leaves_convolutions_alone(built_digits: Built) -> None:
    """Both linear layers become MatMulInteger, both convolutions stay in floating point."""
    operators = [node.op_type for node in onnx.load(built(built_digits, "int8-dynamic")).graph.node]
    assert operators.count("MatMulInteger") == 2
    assert operators.count("Conv") == 2
    assert "ConvInteger" not in operators
    assert "Gemm" not in operators


@pytest.mark.parametrize("attributes", [{}, {"transB": 1}, {"alpha": 0.5, "beta": 2.0}, {"transB": 1, "alpha": -3.0}])
def test_dynamic_int8_of_a_gemm_is_near_the_gemm(tmp_path: Path, attributes: dict[str, Any]) -> None:
    """Transposition, alpha, beta and bias are honoured: the error is that of 8 bits, about 1 %."""
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(24, 64) if attributes.get("transB") else (64, 24))
    graph = product_graph(tmp_path / "g.onnx", weight, generator.normal(size=24), **attributes)
    x = generator.normal(size=(7, 64)).astype(np.float32)
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    want, got = run(graph, x=x), run(made, x=x)
    assert 0 < np.abs(want - got).max() < 0.03 * np.abs(want).max()


def test_dynamic_int8_survives_a_row_of_zeros(tmp_path: Path) -> None:
    """An all-zero row has no scale; it must give the bias, not NaN."""
    graph = product_graph(tmp_path / "g.onnx", np.ones((4, 2)), np.array([1.0, -2.0]))
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    assert run(made, x=np.zeros((1, 4), np.float32)).tolist() == [[1.0, -2.0]]


def test_dynamic_int8_of_products_in_many_dimensions(tmp_path: Path) -> None:
    """A token's row has its own scale in [batch, tokens, k] too: a huge token leaves its neighbours' answers alone."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    model = onnx.load(graph)
    for value, last in ((model.graph.input[0], 8), (model.graph.output[0], 4)):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, ["batch", "tokens", last]))
    onnx.save(model, graph)
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    x = np.random.default_rng(1).normal(size=(1, 3, 8)).astype(np.float32)
    loud = x.copy()
    loud[0, 2] *= 1e6
    assert np.array_equal(run(made, x=x)[0, :2], run(made, x=loud)[0, :2])


@pytest.mark.parametrize(("isa", "largest"), [({"AVX2"}, 63), ({"AVX2", "AVX512_VNNI"}, 127), (set(), 127)])
def test_weights_keep_to_seven_bits_where_sums_would_saturate(tmp_path: Path, isa: set[str], largest: int) -> None:
    """An x86 CPU without VNNI gets 7-bit weights by itself; others, and whoever says so, get 8."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    hardware = Hardware(cores=1, cpu="test", isa=frozenset(isa))
    for parameters, expected in ((QuantizeDynamic(), largest), (QuantizeDynamic(reduce_range=False), 127)):
        made = quantize_dynamic(ingredients(graph, tmp_path, hardware=hardware), parameters).files["model.onnx"]
        constants = [numpy_helper.to_array(tensor) for tensor in onnx.load(made).graph.initializer]
        assert max(int(np.abs(c.astype(int)).max()) for c in constants if c.dtype == np.int8) == expected


def test_dynamic_int8_keeps_what_only_a_branch_reads(tmp_path: Path) -> None:
    """A weight that a product and the branches of an If read stays, and the graph still runs."""
    weight = np.random.default_rng(0).normal(size=(4, 4))
    path = product_graph(tmp_path / "g.onnx", weight)
    model = onnx.load(path)
    branches = [
        helper.make_graph(
            [helper.make_node(operator, ["product", "w"], [f"{operator}_y"])], operator, [],
            [helper.make_tensor_value_info(f"{operator}_y", TensorProto.FLOAT, ["batch", 4])],
        )
        for operator in ("MatMul", "Gemm")
    ]  # fmt: skip
    model.graph.node[0].output[0] = "product"
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "go"))
    model.graph.node.append(helper.make_node("If", ["go"], ["y"], then_branch=branches[0], else_branch=branches[1]))
    onnx.save(model, path)
    made = quantize_dynamic(ingredients(path, tmp_path), QuantizeDynamic()).files["model.onnx"]
    x = np.random.default_rng(1).normal(size=(3, 4)).astype(np.float32)
    np.testing.assert_allclose(run(made, x=x), run(path, x=x), atol=0.5)


def test_dynamic_int8_leaves_no_weight_behind_as_an_input(tmp_path: Path) -> None:
    """Old files list their weights among the inputs: a replaced one must not become a tensor that clients owe."""
    path = product_graph(tmp_path / "g.onnx", np.eye(4))
    model = onnx.load(path)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4, 4]))
    onnx.save(model, path)
    made = quantize_dynamic(ingredients(path, tmp_path), QuantizeDynamic()).files["model.onnx"]
    assert read_signature(made) == read_signature(path)
    assert run(made, x=np.ones((1, 4), np.float32)).shape == (1, 4)


def test_a_quantised_graph_that_does_not_run_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a rewrite breaks is found on the spot, not by the first client: here the product's output is lost."""

    def lose_a_node(graph: onnx.GraphProto) -> None:
        del graph.node[-1]

    monkeypatch.setattr(dynamic, "_drop_unused_weights", lose_a_node)
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    with pytest.raises(RecipeRejected, match="the changed graph cannot be loaded"):
        quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())


class Recurrent(torch.nn.Module):
    """One LSTM layer, all its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LSTM(8, 32, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        steps: torch.Tensor = self.layer(x)[0]
        return steps


def test_an_lstm_is_quantised_and_said_to_depend_on_its_batch(tmp_path: Path) -> None:
    """LSTM weights shrink to bytes, and the card says that batch-mates matter, since its scale is per tensor."""
    torch.manual_seed(0)
    x = np.random.default_rng(0).normal(size=(9, 6, 8)).astype(np.float32)
    export_graph(Recurrent().eval(), {"x": x}, tmp_path / "g.onnx", batched=True)
    made = quantize_dynamic(ingredients(tmp_path / "g.onnx", tmp_path), QuantizeDynamic())
    assert made.facts["batch_invariant"] is False
    assert cost_of(made.files["model.onnx"]).size_bytes < 0.5 * cost_of(tmp_path / "g.onnx").size_bytes


def test_nothing_to_quantise_is_a_reason(tmp_path: Path) -> None:
    """A graph without products is rejected, and so is static quantisation without calibration data."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "g.onnx")
    with pytest.raises(RecipeRejected, match="nothing to quantise"):
        quantize_dynamic(ingredients(tmp_path / "g.onnx", tmp_path), QuantizeDynamic())
    with pytest.raises(RecipeRejected, match="needs calibration data"):
        quantize_static(ingredients(tmp_path / "g.onnx", tmp_path), QuantizeStatic())


@pytest.mark.parametrize("node", HIDING_NODES)
def test_dynamic_int8_finds_weights_behind_other_nodes(tmp_path: Path, node: str) -> None:
    """A weight that an exporter left behind a Constant, Identity or Transpose node is quantised like any other."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(8, 4)))
    hide_weight(graph, node)
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())
    assert made.facts["quantised_layers"] == 1
    x = np.random.default_rng(1).normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_allclose(run(made.files["model.onnx"], x=x), run(graph, x=x), atol=0.2)


@pytest.mark.parametrize("recipe", ["static", "dynamic"])
def test_int8_of_a_graph_with_a_scalar_input(tmp_path: Path, recipe: str) -> None:
    """Without a batch, a sample's input may have no dimension at all; runtimes take it as an array, not as a number."""
    graph = product_graph(tmp_path / "g.onnx", np.random.default_rng(0).normal(size=(4, 4)))
    model = onnx.load(graph)
    model.graph.node[0].output[0] = "product"
    model.graph.node.append(helper.make_node("Mul", ["product", "s"], ["y"]))
    for value in (model.graph.input[0], model.graph.output[0]):
        value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [2, 4]))
    model.graph.input.append(helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
    onnx.save(model, graph)
    generator = np.random.default_rng(1)
    x, s = generator.normal(size=(8, 2, 4)).astype(np.float32), np.arange(8, dtype=np.float32)
    given = ingredients(graph, tmp_path, Samples({"x": x, "s": s}), source=Source(graph, read_signature(graph), 0))
    if recipe == "static":
        assert quantize_static(given, QuantizeStatic()).facts["calibration_samples"] == 8
    else:
        assert quantize_dynamic(given, QuantizeDynamic()).facts["quantised_layers"] == 1
