"""The recipes on a really trained model and on small graphs whose answers are known, and what they cost."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper

from variants.cost import cost_of, count_flops
from variants.data import Samples
from variants.hardware import CudaDevice, Hardware
from variants.model_config import ModelConfig
from variants.recipes import quantize
from variants.recipes.precision import make_amp
from variants.recipes.prune import PruneChannels, PruneUnstructured, prune_channels, prune_unstructured
from variants.recipes.quantize import QuantizeDynamic, QuantizeStatic, quantize_dynamic, quantize_static
from variants.recipes.recipe import Ingredients, NoParameters, RecipeRejected
from variants.repository import ModelFolder, RepositoryError
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.torch_runtime import TorchRuntime
from variants.source import Source, export_graph, load_module, open_source

Array = np.ndarray[Any, Any]
CPU = Hardware(cores=1, cpu="test")


def run(graph: Path, **inputs: Array) -> Array:
    """The first output of an ONNX file on ONNX Runtime."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def ingredients(graph: Path, work: Path, samples: Samples | None = None, **more: Any) -> Ingredients:
    """What a recipe gets for an ONNX source with a variable batch."""
    source = more.pop("source", None) or Source(graph, read_signature(graph), 32)
    given: dict[str, Any] = {"calibration": samples, "training": None, "hardware": CPU, "config": ModelConfig()}
    return Ingredients(source=source, example=samples, work=work, **(given | more))


def product_graph(path: Path, weight: Array, bias: Array | None = None, **attributes: Any) -> Path:
    """A graph of one Gemm (with bias) or MatMul: x [batch, k] -> y [batch, n]."""
    names = ["x", "w"] + (["b"] if bias is not None else [])
    node = helper.make_node("Gemm" if bias is not None else "MatMul", names, ["y"], **attributes)
    constants = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    constants += [numpy_helper.from_array(bias.astype(np.float32), "b")] if bias is not None else []
    k, n = weight.shape[::-1] if attributes.get("transB") else weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n])
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 17)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


def built(digits: Built, variant: str, file: str = "model.onnx") -> Path:
    """An artefact of the built digits repository."""
    return digits.root / "digits/1/variants" / variant / file


def images(digits: Built, count: int = 60) -> Array:
    """Real evaluation images."""
    with np.load(digits.root / "digits/1/data/evaluation.npz") as data:
        return np.asarray(data["input"][:count])


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

    monkeypatch.setattr(quantize, "_drop_unused_weights", lose_a_node)
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    with pytest.raises(RecipeRejected, match="the quantised graph cannot be loaded"):
        quantize_dynamic(ingredients(graph, tmp_path), QuantizeDynamic())


def test_a_mistyped_node_is_not_excluded_in_silence(tmp_path: Path) -> None:
    """`exclude` of a node that is not there is rejected, and the nearest is named."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4), name="dense_1")
    samples = Samples({"x": np.ones((4, 4), np.float32)}, None)
    with pytest.raises(RecipeRejected, match="no node 'dens_1'; did you mean 'dense_1'"):
        quantize_static(ingredients(graph, tmp_path, samples), QuantizeStatic(exclude=["dens_1"]))


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


def test_amp_keeps_the_tensors_a_client_sends(built_digits: Built) -> None:
    """The bf16 archive takes and gives fp32 with the same names, for any batch, near fp32's answers."""
    session = TorchRuntime().load(built(built_digits, "amp", "model.pt2"), precision="bf16", threads=1, device="cpu")
    signature = read_signature(built(built_digits, "fp32"))
    assert (session.inputs, session.outputs) == (signature.inputs, signature.outputs)
    for batch in (1, 3, 9):
        x = images(built_digits, batch)
        want, got = run(built(built_digits, "fp32"), input=x), session.run({"input": x})[0]
        assert got.dtype == np.float32
        assert 0 < np.abs(want - got).max() < 0.05 * np.abs(want).max()


def test_amp_on_a_cuda_host_is_fp16_between_fp32_edges(built_digits: Built, tmp_path: Path) -> None:
    """With a GPU the graph itself holds fp16 weights, and its inputs and outputs stay fp32."""
    graph = built(built_digits, "fp32")
    hardware = Hardware(cores=1, cpu="test", cuda=(CudaDevice("a GPU"),))
    made = make_amp(ingredients(graph, tmp_path, hardware=hardware), NoParameters())
    assert made.precision == "fp16"
    assert read_signature(made.files["model.onnx"]) == read_signature(graph)
    assert cost_of(made.files["model.onnx"]).size_bytes < 0.6 * cost_of(graph).size_bytes


def test_flops_by_hand(built_digits: Built) -> None:
    """Two convolutions and two linear layers, two FLOPs per multiply-accumulate; int8 counts alike."""
    by_hand = 2 * (16 * 9 * 64 + 32 * 16 * 9 * 16 + 512 * 64 + 64 * 10)
    for variant in ("fp32", "int8-dynamic", "int8-static"):
        assert cost_of(built(built_digits, variant)).flops == by_hand


def test_flops_of_a_recurrent_layer_by_hand() -> None:
    """An LSTM costs 4·h·(in+h) multiply-accumulates per step and direction."""
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=16, direction="bidirectional")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [12, "batch", 8])]
    weights = [
        numpy_helper.from_array(np.zeros((2, 64, 8), np.float32), "w"),
        numpy_helper.from_array(np.zeros((2, 64, 16), np.float32), "r"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [12, 2, "batch", 16])
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [y], weights))
    assert count_flops(model) == 2 * 2 * 12 * 4 * 16 * (8 + 16)


class Two(torch.nn.Module):
    """Two inputs, two named outputs, one of them named like an operator inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(10, 4), torch.nn.Linear(3, 4)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.table(ids) + self.linear(x), "linear": self.linear(x)}


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    """The graph's tensors are named as `forward` and its dictionary say, whatever order the data come in."""
    example: Mapping[str, Array] = {"x": np.ones((4, 3), np.float32), "ids": np.arange(4)}
    export_graph(Two().eval(), example, tmp_path / "g.onnx", batched=True)
    signature = read_signature(tmp_path / "g.onnx")
    assert [(spec.name, spec.datatype) for spec in signature.inputs] == [("ids", "INT64"), ("x", "FP32")]
    assert [spec.name for spec in signature.outputs] == ["embedding", "linear"]
    assert signature.batch_axis


def test_data_must_be_named_as_the_modules_inputs(tmp_path: Path) -> None:
    """A misnamed array is an error that shows the names `forward` has."""
    with pytest.raises(
        RepositoryError, match=r"arrays \(image\) must be named as the inputs of Two.forward \(ids, x\)"
    ):
        export_graph(Two(), {"image": np.ones((2, 3))}, tmp_path / "g.onnx", batched=True)


class Unfaithful(torch.nn.Module):
    """A module that behaves otherwise with a batch of nine, which no trace can know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.onnx.is_in_onnx_export() or len(x) != 9 else x * 3


def test_an_unfaithful_export_is_refused(tmp_path: Path) -> None:
    """The graph is compared with the module at batch sizes 1, 3 and 9 before anything is made from it."""
    with pytest.raises(RepositoryError, match=r"differs from it at batch 9|cannot be exported"):
        export_graph(Unfaithful(), {"x": np.ones((9, 2), np.float32)}, tmp_path / "g.onnx", batched=True)


class NotANumber(torch.nn.Module):
    """A module whose export answers NaN, which no comparison with a tolerance calls too large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan") if torch.onnx.is_in_onnx_export() else x * 2


def test_an_export_that_answers_nan_is_refused(tmp_path: Path) -> None:
    """NaN is a difference."""
    with pytest.raises(RepositoryError, match="differs from it at batch 1"):
        export_graph(NotANumber(), {"x": np.ones((9, 2), np.float32)}, tmp_path / "g.onnx", batched=True)


def test_two_models_may_both_have_a_module_of_the_same_name(tmp_path: Path) -> None:
    """Each model's `network` is its own, although Python caches modules by name."""
    widths = {}
    for name, width in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.py").write_text(f"from torch import nn\ndef make(): return nn.Linear(2, {width})\n")
        safetensors.torch.save_model(torch.nn.Linear(2, width), str(tmp_path / name / "w.safetensors"))
        module = load_module("network:make", tmp_path / name / "w.safetensors", tmp_path / name)
        widths[name] = module(torch.ones(1, 2)).shape[1]
    assert widths == {"a": 3, "b": 5}


def test_weights_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    """Missing and surplus tensors are named; so is a factory that fails."""
    (tmp_path / "network.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 3)\n")
    safetensors.torch.save_file({"other": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(RepositoryError, match=r"does not fit source.module 'network:make'.*other") as caught:
        load_module("network:make", tmp_path / "w.safetensors", tmp_path)
    assert "\n" not in str(caught.value)
    with pytest.raises(RepositoryError, match=r"source.module 'network:made' failed: AttributeError"):
        load_module("network:made", tmp_path / "w.safetensors", tmp_path)


def onnx_model(folder: Path, graph: onnx.ModelProto) -> ModelFolder:
    """A model folder with this graph as its bare source."""
    (folder / "m/1").mkdir(parents=True)
    onnx.save(graph, folder / "m/1/model.onnx")
    return ModelFolder(folder / "m")


def test_a_custom_operator_is_refused(tmp_path: Path) -> None:
    """A graph that needs foreign native code is no source."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([helper.make_node("Evil", ["x"], ["y"], domain="my.ops")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)])
    with pytest.raises(RepositoryError, match="custom operator"):
        open_source(onnx_model(tmp_path, model).newest(), None, tmp_path)


@pytest.mark.parametrize(("first", "max_batch"), [(1, 1), ("batch", 32)])
def test_the_batch_comes_from_the_graph(tmp_path: Path, first: int | str, max_batch: int) -> None:
    """A fixed batch of one is served one by one; a variable one up to the configured size."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [first, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    source = open_source(onnx_model(tmp_path, model).newest(), None, tmp_path)
    assert source.max_batch == max_batch
    assert source.sample_specs[0].shape == (2,)


def test_a_fixed_batch_of_many_needs_a_word(tmp_path: Path) -> None:
    """A graph fixed to eight rows cannot be batched, and the error says what to write."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder = onnx_model(tmp_path, model)
    with pytest.raises(RepositoryError, match="max_batch_size: 0"):
        open_source(folder.newest(), None, tmp_path)
    (folder.path / "model.yaml").write_text("batching: {max_batch_size: 0}")
    assert open_source(ModelFolder(folder.path).newest(), None, tmp_path).sample_specs[0].shape == (8, 2)
