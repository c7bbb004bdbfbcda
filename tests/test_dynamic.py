"""int8-dynamic on a really trained model and on small graphs whose answers are known."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from factory_fixtures import Built, train
from onnx import TensorProto, helper, numpy_helper
from onnx_files import needs_openvino
from recipe_fixtures import HIDING_NODES, Array, built, hide_weight, images, ingredients, product_graph, run
from sklearn.datasets import load_digits
from torch import nn

from variants.data import Samples
from variants.export import export_graph
from variants.hardware import Hardware
from variants.recipes.int8 import dynamic
from variants.recipes.int8.dynamic import QuantizeDynamic, quantize_dynamic, quantize_per_tensor
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.openvino_runtime import OpenVino
from variants.source import Source


def fused(graph: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a graph when it loads it."""
    options = onnxruntime.SessionOptions()
    with TemporaryDirectory() as folder:
        options.optimized_model_filepath, options.log_severity_level = f"{folder}/fused.onnx", 4
        onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def products(path: Path, *layers: tuple[str, str, Array], opset: int = 18) -> Path:
    """A graph of products of `x` [batch, 1st layer's k]: from which tensor, to which, and the weights [k, n]."""
    inner = {source for source, _, _ in layers}
    values = [("x", layers[0][2].shape[0]), *((name, w.shape[1]) for _, name, w in layers if name not in inner)]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name, width in values]
    nodes = [helper.make_node("MatMul", [source, f"w_{name}"], [name], name) for source, name, _ in layers]
    constants = [numpy_helper.from_array(weight.astype(np.float32), f"w_{name}") for _, name, weight in layers]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9), path)
    return path


def test_dynamic_int8_is_bit_equal_alone_and_in_company(built_digits: Built) -> None:
    """Every real image gets the same logits to the bit, alone or among 60 others."""
    graph, x = built(built_digits, "int8-dynamic"), images(built_digits)
    together = run(graph, input=x)
    assert all(np.array_equal(run(graph, input=x[i : i + 1])[0], together[i]) for i in range(len(x)))
    assert not np.array_equal(together, run(built(built_digits, "fp32"), input=x))  # it really is another arithmetic


def test_dynamic_int8_leaves_convolutions_alone(built_digits: Built) -> None:
    """ONNX Runtime computes both linear layers in integers, and both convolutions in floating point."""
    operators = fused(built(built_digits, "int8-dynamic"))
    assert operators.count("MatMulIntegerToFloat") == 2
    assert sum("Conv" in operator for operator in operators) == 2
    assert not {"ConvInteger", "QLinearConv", "MatMul", "Gemm"} & set(operators)


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
    """An all-zero row has no scale: it gives the bias, and no step on the way there divides by zero."""
    graph = product_graph(tmp_path / "g.onnx", np.ones((4, 2)), np.array([1.0, -2.0]))
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    assert run(made, x=np.zeros((1, 4), np.float32)).tolist() == [[1.0, -2.0]]
    model = onnx.load(made)
    (quotient,) = [node.output[0] for node in model.graph.node if node.op_type == "Div"]
    model.graph.output.insert(0, onnx.ValueInfoProto(name=quotient))
    onnx.save(model, made)
    assert run(made, x=np.zeros((1, 4), np.float32)).tolist() == [[0.0] * 4]


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
    model.graph.node.append(helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0))
    model.graph.node.append(helper.make_node("Cast", ["sum"], ["go"], to=TensorProto.BOOL))
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


@needs_openvino
def test_openvino_gives_the_same_answers_alone_and_in_company(built_digits: Built) -> None:
    """The second runtime reads the same file: its logits are near ONNX Runtime's, and no batch-mate changes them."""
    graph, x = built(built_digits, "int8-dynamic"), images(built_digits, 20)
    session = OpenVino().load(graph, precision="int8", threads=1, device="cpu")
    (together,) = session.run({"input": x})
    alone = np.concatenate([session.run({"input": x[i : i + 1]})[0] for i in range(len(x))])
    assert np.array_equal(together, alone)
    np.testing.assert_allclose(together, run(graph, input=x), atol=0.2)


class Attention(nn.Module):
    """One transformer block over the eight rows of a digit."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, width), nn.Parameter(torch.zeros(8, width))
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.mix = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.norm, self.classify = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.place
        rows = self.norm(x)
        weights = torch.softmax(self.query(rows) @ self.key(rows).transpose(1, 2) / 6, -1)
        x = x + weights @ self.value(rows)
        logits: torch.Tensor = self.classify((x + self.mix(x)).mean(1))
        return logits


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Array]:
    """A transformer trained on real digits as ONNX, and images that it has not seen."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    x, labels = (data.images / 16).astype(np.float32), data.target.astype(np.int64)
    module = Attention()
    train(module, torch.from_numpy(x[:1200]), torch.from_numpy(labels[:1200]), 4)
    graph = tmp_path_factory.mktemp("attention") / "g.onnx"
    export_graph(module, {"x": x[:9]}, graph, batched=True)
    return graph, x[1200:]


def test_a_trained_transformer_keeps_its_answers_whoever_shares_the_batch(
    attention: tuple[Path, Array], tmp_path: Path
) -> None:
    """In int8 it agrees with itself in fp32, and batch-mates change no more than they do there."""
    graph, x = attention
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())
    assert made.facts["quantised_layers"] == 7
    int8 = made.files["model.onnx"]
    wanted, together = run(graph, x=x), run(int8, x=x)
    assert np.mean(wanted.argmax(1) == together.argmax(1)) > 0.97
    alone = np.concatenate([run(int8, x=x[i : i + 1]) for i in range(20)])
    np.testing.assert_allclose(alone, together[:20], rtol=0, atol=1e-5)  # attention itself stays in floating point


def test_one_scale_per_tensor_is_marked_and_lets_batch_mates_matter(
    attention: tuple[Path, Array], tmp_path: Path
) -> None:
    """ONNX Runtime's own arithmetic agrees with fp32 too, but an image's logits depend on who shares its batch."""
    graph, x = attention
    made = quantize_per_tensor(ingredients(graph, tmp_path), QuantizeDynamic())
    assert made.facts == {"quantised_layers": 7, "batch_invariant": False, "reduce_range": False}
    together = run(made.files["model.onnx"], x=x)
    assert np.mean(run(graph, x=x).argmax(1) == together.argmax(1)) > 0.97
    alone = np.concatenate([run(made.files["model.onnx"], x=x[i : i + 1]) for i in range(20)])
    assert np.abs(alone - together[:20]).max() > 0.01


def test_one_scale_per_tensor_never_means_a_convolution(built_digits: Built, tmp_path: Path) -> None:
    """Convolutions stay in floating point, and a graph with nothing else is rejected."""
    made = quantize_per_tensor(ingredients(built(built_digits, "fp32"), tmp_path), QuantizeDynamic())
    operators = [node.op_type for node in onnx.load(made.files["model.onnx"]).graph.node]
    assert (operators.count("MatMulInteger"), operators.count("Conv"), operators.count("ConvInteger")) == (2, 2, 0)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 1, 4, 4]) for name in "xy"]
    weight = numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w")
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"])], "g", info[:1], info[1:], [weight])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "c.onnx")
    with pytest.raises(RecipeRejected, match="nothing to quantise"):
        quantize_per_tensor(ingredients(tmp_path / "c.onnx", tmp_path), QuantizeDynamic())


def test_a_tensor_is_quantised_once_for_all_that_read_it(tmp_path: Path) -> None:
    """Query, key and value read the same tensor: one QuantizeLinear serves the three, and each is near its product."""
    weights = np.random.default_rng(0).normal(size=(3, 16, 8))
    graph = products(tmp_path / "g.onnx", *(("x", name, w) for name, w in zip("qkv", weights, strict=True)))
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    assert [node.op_type for node in onnx.load(made).graph.node].count("QuantizeLinear") == 1
    assert fused(made).count("MatMulIntegerToFloat") == 3
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    answers = onnxruntime.InferenceSession(made, providers=["CPUExecutionProvider"]).run(None, {"x": x})
    for answer, weight in zip(answers, weights, strict=True):
        np.testing.assert_allclose(answer, x @ weight, atol=0.3)


def test_a_source_that_lets_batch_mates_matter_is_not_called_invariant(tmp_path: Path) -> None:
    """One scale per tensor that the source brings along stays, and so does what it does to answers."""
    graph = products(tmp_path / "g.onnx", ("x", "y", np.random.default_rng(0).normal(size=(8, 4))))
    model = onnx.load(graph)
    model.graph.node.insert(0, helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "scale", "zero"]))
    model.graph.node.insert(1, helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]))
    model.graph.node[2].input[0] = "d"
    onnx.save(model, graph)
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())
    assert made.facts["batch_invariant"] is False


def test_a_graph_made_by_the_recipe_can_be_quantised_further(tmp_path: Path) -> None:
    """The layer that the first time left in floating point is quantised the second time, under names of its own."""
    rng = np.random.default_rng(0)
    graph = products(
        tmp_path / "g.onnx", ("x", "h", rng.normal(size=(256, 256))), ("h", "y", rng.normal(size=(256, 4)))
    )
    x = rng.normal(size=(3, 256)).astype(np.float32)
    (tmp_path / "again").mkdir()
    once = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic()).files["model.onnx"]
    twice = quantize_dynamic(ingredients(once, tmp_path / "again"), QuantizeDynamic())
    assert twice.facts["quantised_layers"] == 1
    expected, found = run(graph, x=x), run(twice.files["model.onnx"], x=x)
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_products_too_small_to_gain_stay_beside_larger_ones(tmp_path: Path) -> None:
    """A narrow head after a wide layer stays in floating point, and the reason is told; alone, it is quantised."""
    wide, head = np.ones((256, 256)), np.ones((256, 10))
    graph = products(tmp_path / "g.onnx", ("x", "h", wide), ("h", "y", head))
    made = quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())
    assert (made.facts["quantised_layers"], made.facts["float_layers"]) == (1, 1)
    assert made.findings["float_layers"] == {"y": "too small to gain"}
    alone = products(tmp_path / "alone.onnx", ("x", "y", head))
    assert quantize_dynamic(ingredients(alone, tmp_path), QuantizeDynamic()).facts["quantised_layers"] == 1


def test_what_is_no_product_with_a_constant_matrix_is_left_alone(tmp_path: Path) -> None:
    """A product of two activations is nobody's layer; one whose activations are transposed is told with the reason."""
    path = product_graph(tmp_path / "g.onnx", np.ones((4, 4)))
    model = onnx.load(path)
    model.graph.node[0].output[0] = "h"
    model.graph.node.append(helper.make_node("Transpose", ["h"], ["t"], perm=[1, 0]))
    model.graph.node.append(helper.make_node("MatMul", ["h", "t"], ["square"]))
    model.graph.node.append(helper.make_node("Gemm", ["t", "w2"], ["turned"], transA=1))
    model.graph.node.append(helper.make_node("MatMul", ["square", "turned"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(np.ones((4, 4), np.float32), "w2"))
    onnx.save(model, path)
    made = quantize_dynamic(ingredients(path, tmp_path), QuantizeDynamic())
    assert (made.facts["quantised_layers"], made.facts["float_layers"]) == (1, 1)
    assert made.findings["float_layers"] == {"turned": "its activations are transposed"}
    x = np.ones((2, 4), np.float32)
    np.testing.assert_allclose(run(made.files["model.onnx"], x=x), run(path, x=x), rtol=0.02)


def test_a_quantised_graph_that_does_not_run_is_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a rewrite breaks is found on the spot, not by the first client: here the product's output is lost."""

    def lose_a_node(graph: onnx.GraphProto) -> None:
        del graph.node[-1]

    monkeypatch.setattr(dynamic, "_drop_unused", lose_a_node)
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    with pytest.raises(RecipeRejected, match="the changed graph is not sound"):
        quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())


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
