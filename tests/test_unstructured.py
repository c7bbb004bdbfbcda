"""prune-unstructured on a really trained model: what it claims is what it does."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import Built
from onnx import helper, numpy_helper
from recipe_fixtures import HIDING_NODES, built, hide_weight, ingredients, product_graph
from torch import nn
from torch.nn.utils import parametrizations
from trained_cnn import Trained, dequantised_weights, load_trained

from variants.cost import cost_of
from variants.data import Samples
from variants.export import export_graph
from variants.recipes import RECIPES
from variants.recipes.chain import Step, run_chain
from variants.recipes.pruning.unstructured import PruneUnstructured, prunable, prune_unstructured
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source

WEIGHTS = ("0.weight", "4.weight", "7.weight", "9.weight")


@pytest.fixture(scope="module")
def trained(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The trained CNN."""
    return load_trained(trained_digits, tmp_path_factory.mktemp("cnn"))


def parameters_of(module: Any) -> dict[str, torch.Tensor]:
    """The parameters of a module by name."""
    return {name: value.detach() for name, value in module.named_parameters()}


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


def test_global_pruning_of_a_module_and_of_its_graph_is_the_same(tmp_path: Path) -> None:
    """Torch's global L1 pruning and ours without torch choose the same weights, which are the smallest of all."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    samples, graph = Samples({"input": np.ones((4, 8), np.float32)}), tmp_path / "g.onnx"
    export_graph(module, samples.inputs, graph, batched=True)
    signature = read_signature(graph)
    made = []
    for name, own in (("torch", module), ("onnx", None)):
        (tmp_path / name).mkdir()
        known = ingredients(graph, tmp_path / name, samples, source=Source(graph, signature, 32, own))
        made.append(prune_unstructured(known, PruneUnstructured(sparsity=0.4)))
    left, right = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load(each.files["model.onnx"]).graph.initializer}
        for each in made
    )
    given = np.concatenate([parameters_of(module)[name].numpy().reshape(-1) for name in ("0.weight", "2.weight")])
    threshold = np.sort(np.abs(given))[round(0.4 * len(given))]
    for name in ("0.weight", "2.weight"):
        assert np.array_equal(left[name], right[name])
        assert np.array_equal(left[name] == 0, np.abs(parameters_of(module)[name].numpy()) < threshold)
    assert made[0].facts == made[1].facts


@pytest.mark.parametrize("from_graph", [False, True])
@pytest.mark.parametrize("method", ["l1", "random"])
def test_pruning_by_layer_takes_the_same_share_everywhere(
    trained: Trained, tmp_path: Path, method: str, from_graph: bool
) -> None:
    """The smallest of each layer, or any of each layer: the shares in the findings are those of the file."""
    known = trained.given(tmp_path)
    if from_graph:
        known = replace(known, source=replace(known.source, module=None))
    made = prune_unstructured(known, PruneUnstructured.model_validate({"sparsity": 0.3, "method": method}))
    by_layer = made.findings["zero_share_by_layer"]
    assert isinstance(by_layer, dict)
    assert by_layer == dict.fromkeys(WEIGHTS, pytest.approx(0.3, abs=0.005))
    file = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.files["model.onnx"]).graph.initializer}
    assert {name: round(float((file[name] == 0).mean()), 4) for name in WEIGHTS} == by_layer
    magnitudes = np.abs(trained.module[7].weight.detach().numpy())
    zeros = file["7.weight"] == 0
    assert (magnitudes[zeros].max() < magnitudes[~zeros].min()) == (method == "l1")


class Tied(nn.Module):
    """An embedding that is the last layer's weight too, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden, self.out = nn.Embedding(8, 4), nn.Linear(4, 4), nn.Linear(4, 8, bias=False)
        self.out.weight = self.table.weight

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        """Tokens [batch] -> logits [batch, 8]."""
        answer: torch.Tensor = self.out(self.hidden(self.table(token)).relu())
        return answer


def test_a_weight_that_is_an_embedding_too_stays_whole(tmp_path: Path) -> None:
    """Zeros would change what words mean; only what is read as weights alone is pruned."""
    module, samples, graph = Tied().eval(), Samples({"token": np.arange(4)}), tmp_path / "g.onnx"
    export_graph(module, samples.inputs, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, module)
    made = prune_unstructured(ingredients(graph, tmp_path, samples, source=source), PruneUnstructured())
    assert made.findings["zero_share_by_layer"] == {"hidden.weight": 0.5}


def test_a_graphs_weight_that_something_else_reads_stays_whole(tmp_path: Path) -> None:
    """A matrix that a product and a Gather read is no weight alone."""
    graph = product_graph(tmp_path / "g.onnx", np.ones((8, 8)))
    model = onnx.load(graph)
    model.graph.node[0].output[0] = "product"
    model.graph.node.append(helper.make_node("ArgMax", ["x"], ["largest"], axis=1, keepdims=0))
    model.graph.node.append(helper.make_node("Gather", ["w", "largest"], ["row"]))
    model.graph.node.append(helper.make_node("Add", ["product", "row"], ["y"]))
    onnx.save(model, graph)
    with pytest.raises(RecipeRejected, match="no constant weights"):
        prune_unstructured(ingredients(graph, tmp_path), PruneUnstructured())


def test_global_pruning_spares_the_layers_with_large_weights(trained: Trained, tmp_path: Path) -> None:
    """Over the whole model the share is what was asked for, and layers differ."""
    made = prune_unstructured(trained.given(tmp_path), PruneUnstructured(sparsity=0.7))
    by_layer = made.findings["zero_share_by_layer"]
    assert isinstance(by_layer, dict)
    assert made.facts["zero_share"] == pytest.approx(0.7, abs=0.001)
    assert by_layer["7.weight"] > 0.7 > by_layer["0.weight"] + 0.2


def test_random_pruning_is_repeatable(trained: Trained, tmp_path: Path) -> None:
    """The same weights go every time."""
    torch.manual_seed(1)
    asked = PruneUnstructured(sparsity=0.5, method="random")
    first = prune_unstructured(trained.given(tmp_path / "a"), asked)
    again = prune_unstructured(trained.given(tmp_path / "b"), asked)
    assert first.files["model.onnx"].read_bytes() == again.files["model.onnx"].read_bytes()


def test_equal_weights_are_pruned_to_the_share(tmp_path: Path) -> None:
    """Where all weights are as large, as many go as were asked for, not none and not all."""
    graph = product_graph(tmp_path / "g.onnx", np.ones((8, 5)))
    made = prune_unstructured(ingredients(graph, tmp_path), PruneUnstructured(sparsity=0.3))
    assert made.facts["zero_share"] == 0.3


@pytest.mark.slow
@pytest.mark.parametrize("recover", ["finetune", "distill"])
def test_recovery_brings_accuracy_back_and_leaves_the_zeros(trained: Trained, tmp_path: Path, recover: str) -> None:
    """With 95 % zeros the trained model loses a third of its answers and more, and regains them with the same zeros."""
    known = trained.given(tmp_path / "bare")
    bare = prune_unstructured(known, PruneUnstructured(sparsity=0.95))
    asked = PruneUnstructured.model_validate({"sparsity": 0.95, "recover": recover})
    made = prune_unstructured(trained.given(tmp_path / "recovered"), asked)
    assert trained.right(bare.files["model.onnx"]) < 0.7
    assert trained.right(made.files["model.onnx"]) > 0.88
    assert made.facts["epochs"] == 4
    before, after = parameters_of(bare.module), parameters_of(made.module)
    for name in WEIGHTS:
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert not torch.equal(before[name], after[name]), name
    assert known.source.module is not None
    assert not any(
        bool((value == 0).any()) for name, value in parameters_of(known.source.module).items() if name in WEIGHTS
    )


class Sequence(nn.Module):
    """Attention, then an LSTM, over the eight rows of a digit; one weight serves two layers."""

    shares: ClassVar[list[float]] = []
    """The least share of zeros in any weight, for each forward pass of training."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.first, self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 10)
        self.second.weight = self.first.weight

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's own name
        if self.training:
            weights = [value for name, value in self.named_parameters() if "weight" in name]
            Sequence.shares.append(min(float((weight == 0).float().mean()) for weight in weights))
        rows = input[:, 0]
        seen = self.lstm(self.attention(rows, rows, rows, need_weights=False)[0])[0][:, -1]
        answer: torch.Tensor = self.head(self.second(torch.relu(self.first(seen))))
        return answer


def test_recurrent_attention_and_shared_weights_hold_their_zeros(trained: Trained, tmp_path: Path) -> None:
    """Weights of layers that nobody calls, or that two layers share, are zero throughout recovery and in the end."""
    torch.manual_seed(0)
    module = Sequence().eval()
    asked = PruneUnstructured(sparsity=0.5, method="l1", recover="distill")
    made = prune_unstructured(trained.given(tmp_path, module), asked)
    assert Sequence.shares
    assert min(Sequence.shares) == 0.5
    learnt, given = parameters_of(made.module), parameters_of(module)
    assert set(learnt) == set(given), "torch's masks are gone"
    weights = [name for name in given if "weight" in name]
    assert made.findings["zero_share_by_layer"] == dict.fromkeys(weights, 0.5)
    assert all(not torch.equal(learnt[name][learnt[name] != 0], given[name][learnt[name] != 0]) for name in weights)
    assert isinstance(made.module, Sequence)
    assert made.module.second.weight is made.module.first.weight


def test_the_weights_of_a_recurrent_graph_are_pruned(tmp_path: Path) -> None:
    """Without torch, an LSTM's weights for inputs and for its state lose the smallest half each."""
    generator = np.random.default_rng(0)
    shapes = {"w": (1, 16, 3), "r": (1, 16, 4)}
    constants = [numpy_helper.from_array(generator.normal(size=s).astype(np.float32), n) for n, s in shapes.items()]
    node = helper.make_node("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=4)
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [5, "batch", 3])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1, "batch", 4])
    graph = helper.make_graph([node], "g", [x], [y], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "g.onnx")
    source = Source(tmp_path / "g.onnx", read_signature(tmp_path / "g.onnx"), 0)
    known = ingredients(tmp_path / "g.onnx", tmp_path, source=source)
    made = prune_unstructured(known, PruneUnstructured(sparsity=0.5, method="l1"))
    assert made.findings["zero_share_by_layer"] == {"w": 0.5, "r": 0.5}


def test_zeros_survive_static_quantisation(trained: Trained, tmp_path: Path) -> None:
    """In the chain [prune-unstructured, int8-static] what was zero is the byte zero: weights are symmetric."""
    said = {"prune-unstructured": {"sparsity": 0.8}, "int8-static": {"calibrate": "minmax"}}
    steps = [Step(name, RECIPES[name], RECIPES[name].parameters.model_validate(each)) for name, each in said.items()]
    made = run_chain(steps, trained.given(tmp_path), {})
    weights = dequantised_weights(made.files["model.onnx"])
    pruned = onnx.load(tmp_path / "0-prune-unstructured/masked.onnx").graph.initializer
    zeros = {tuple(t.dims): numpy_helper.to_array(t) == 0 for t in pruned if len(t.dims) > 1}
    assert len(weights) == 4
    assert all((weight[zeros[weight.shape]] == 0).all() for weight in weights)
    assert sum(int((weight == 0).sum()) for weight in weights) >= 0.799 * sum(weight.size for weight in weights)
    assert "zero_share_by_layer" in made.findings


def test_recovery_needs_a_module_and_data(trained: Trained, tmp_path: Path) -> None:
    """A graph cannot be trained, and a module not without data: each is told what to say instead."""
    known, asked = trained.given(tmp_path), PruneUnstructured(recover="finetune")
    with pytest.raises(RecipeRejected, match=r"needs training data; add `training:` or say `recover: none`"):
        prune_unstructured(replace(known, training=None), asked)
    with pytest.raises(RecipeRejected, match=r"need a torch source.*with `recover: none`"):
        prune_unstructured(replace(known, source=replace(known.source, module=None)), asked)


def test_nothing_to_prune_is_rejected(trained: Trained, tmp_path: Path) -> None:
    """A module without weights, or with embeddings and norms only, has nothing that zeros would compress."""
    module = nn.Sequential(nn.Flatten(), nn.LayerNorm(64)).eval()
    with pytest.raises(RecipeRejected, match="no layer of a known type with weights to mask"):
        prune_unstructured(trained.given(tmp_path, module), PruneUnstructured())


def computed(how: Any, *more: nn.Module) -> nn.Module:
    """A layer whose weight is computed from others, and more layers, over the 64 pixels of a digit."""
    layers = [nn.Flatten(), how(nn.Linear(64, 16)), nn.ReLU(), *more]
    module = nn.Sequential(*layers).eval()
    with torch.no_grad():
        module(torch.zeros(1, 1, 8, 8))
    return module


@pytest.mark.parametrize("how", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_weights_that_are_computed_stay_and_are_named(trained: Trained, tmp_path: Path, how: Any) -> None:
    """Zeros in what a weight is computed from would be none in it: the plain weights go, the findings name the rest."""
    module = computed(how, nn.Linear(16, 10))
    made = prune_unstructured(trained.given(tmp_path, module), PruneUnstructured(method="l1"))
    assert made.findings["zero_share_by_layer"] == {"3.weight": 0.5}
    assert made.findings["computed_weights_kept"] == ["1"]
    with pytest.raises(RecipeRejected, match=r"the weights of 1 are computed from others.*remove_parametrizations"):
        prune_unstructured(trained.given(tmp_path, computed(how)), PruneUnstructured())


def test_the_parts_of_a_computed_weight_are_no_weights() -> None:
    """The older weight_norm keeps direction and size as parameters of the layer itself, named as weights nearly are."""
    module = nn.ModuleDict({"plain": nn.GRU(4, 4), "normed": nn.Linear(4, 4)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated
        nn.utils.weight_norm(module["normed"])
    assert [name for _, name in prunable(module)] == ["weight_ih_l0", "weight_hh_l0"]
