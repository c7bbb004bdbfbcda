"""int8-qat: what training rounds is what is served, and it repairs what rounding breaks in a really trained model."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_fixtures import ingredients, product_graph
from torch import nn
from trained_cnn import Trained, dequantised_weights, load_trained

from variants.export import export_graph
from variants.recipes import RECIPES
from variants.recipes.chain import Step, run_chain
from variants.recipes.int8.fake_quantize import InputRounding, WeightRounding, fake_quantized
from variants.recipes.int8.qat import WEIGHT_LIMIT, QuantizeAware, quantize_aware
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import RecipeRejected
from variants.runtimes.onnx_signature import read_signature

BRIEF = QuantizeAware(epochs=1, calibrate="minmax", reduce_range=False)


@pytest.fixture(scope="module")
def trained(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The trained CNN."""
    return load_trained(trained_digits, tmp_path_factory.mktemp("cnn"))


@pytest.mark.slow
def test_training_repairs_what_rounding_breaks(trained: Trained, tmp_path: Path) -> None:
    """With channels up to 2^14 apart, and the same fp32 answers, int8-static loses a tenth of them, int8-qat few.

    Ranges apart are what batch normalisation leaves in real networks (Nagel et al., ICCV 2019).
    """
    module = copy.deepcopy(trained.module)
    factors = 2 ** (14 * torch.rand(16, generator=torch.Generator().manual_seed(1)) - 7)
    with torch.no_grad():
        module[1].weight *= factors
        module[1].bias *= factors
        module[4].weight /= factors[:, None, None]
    graph = tmp_path / "apart.onnx"
    export_graph(module, trained.evaluation.inputs, graph, batched=True)
    wide = {"reduce_range": False, "calibrate": "minmax"}
    right = {"fp32": trained.right(graph)}
    for name in ("int8-static", "int8-qat"):
        recipe, known = RECIPES[name], trained.given(tmp_path / name, module, graph)
        made = recipe.make(known, recipe.parameters.model_validate(wide))
        right[name] = trained.right(made.files["model.onnx"])
    assert right["int8-static"] < right["fp32"] - 0.08
    assert right["int8-qat"] > right["int8-static"] + 0.08
    assert right["int8-qat"] > right["fp32"] - 0.03


@pytest.mark.parametrize("reduce_range", [False, True])
def test_training_rounds_weights_as_the_file_has_them(trained: Trained, tmp_path: Path, reduce_range: bool) -> None:
    """Rounded before batch normalisation is folded in or after, in 8 bits or 7, the weights are the same."""
    module, limit = trained.module, WEIGHT_LIMIT[reduce_range]
    made = quantize_static(trained.given(tmp_path), QuantizeStatic(reduce_range=reduce_range, calibrate="minmax"))
    served = {weight.shape: weight for weight in dequantised_weights(made.files["model.onnx"])}
    norm = module[1]
    folded = {0: norm.weight / torch.sqrt(norm.running_var + norm.eps)}
    for index in (0, 4, 7, 9):
        weight = module[index].weight.detach()
        factor = folded.get(index, torch.ones(len(weight))).detach()
        rounded = WeightRounding(weight, limit)(weight) * factor.reshape(-1, *[1] * (weight.ndim - 1))
        step = float(np.abs(served[rounded.shape]).max()) / limit
        assert np.abs(rounded.numpy() - served[rounded.shape]).max() < 0.01 * step, index
        assert len(np.unique(np.rint(rounded[0].numpy() / rounded[0].abs().max().item() * limit))) > 5


def given(rounding: InputRounding, layer: nn.Module, *inputs: Any) -> tuple[Any, ...]:
    """What a layer gets in the place of these inputs."""
    changed = rounding(layer, inputs, {})
    assert changed is not None
    return changed[0]


def test_inputs_given_by_name_are_rounded_too() -> None:
    """A module that calls its layers with keywords trains like any other, in its own type of floats."""

    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 1, dtype=torch.float64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            answer: torch.Tensor = self.layer(input=x)
            return answer

    module, value = Keywords().eval(), torch.tensor([[0.0, 0.3, 1.0, 255.0]], dtype=torch.float64)
    nn.init.ones_(module.layer.weight)  # which bytes say exactly
    nn.init.zeros_(module.layer.bias)
    with fake_quantized(module, 127, lambda: module(value)):
        rounded = module(value)
    assert rounded.dtype == torch.float64
    assert rounded.item() == pytest.approx(256.0)
    assert module(value).item() == pytest.approx(256.3)


def test_inputs_are_rounded_to_bytes_and_learn_where_they_are_not_clipped() -> None:
    """A range of -1 to 2 has steps of 3/255, whole ones from zero; beyond it values are clipped and gradients stop."""
    rounding, layer = InputRounding(), nn.Linear(4, 1).eval()
    assert rounding(layer, (torch.tensor([[-1.0, 0.0, 0.3, 2.0]]),), {}) is None
    rounding.calibrating = False
    value = torch.tensor([[-1.5, 0.0, 0.3, 5.0]], requires_grad=True)
    rounded, more = given(rounding, layer, value, "more")
    step = 3 / 255
    assert rounded.tolist()[0] == pytest.approx([-1.0, 0.0, round(0.3 / step) * step, 2.0], abs=1e-6)
    assert more == "more"
    rounded.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [[0.0, 1.0, 1.0, 0.0]]


def test_input_ranges_follow_training_slowly() -> None:
    """In training a range moves by a hundredth of the way to what a batch holds; in evaluation it stays."""
    rounding, layer = InputRounding(), nn.Linear(1, 1).eval()
    rounding(layer, (torch.tensor([[2.55]]),), {})
    rounding.calibrating = False
    batch = torch.tensor([[102.55]])
    assert given(rounding, layer, batch)[0].item() == pytest.approx(2.55)
    assert given(rounding, layer.train(), batch)[0].item() == pytest.approx(3.55)


def test_attention_reads_its_three_inputs_rounded_alike() -> None:
    """Query, key and value that are one tensor stay one, which attention looks for; others share the range."""
    rounding, layer = InputRounding(), nn.MultiheadAttention(2, 1).eval()
    query, other = torch.tensor([[[0.0, 2.55]]]), torch.tensor([[[0.014, 1.0]]])
    rounding(layer, (query, query, query), {})
    rounding.calibrating = False
    same = given(rounding, layer, query, query, query, "mask")
    assert same[0] is same[1] is same[2] is not query
    mixed = given(rounding, layer, query, other, other)
    assert mixed[1] is mixed[2]
    assert mixed[1].tolist() == [[[pytest.approx(0.01), pytest.approx(1.0)]]]


class Attending(nn.Module):
    """A transformer layer over the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's own name
        answer: torch.Tensor = self.head(self.encoder(input[:, 0]).flatten(1))
        return answer


def test_attention_is_trained_with_its_projections(trained: Trained, tmp_path: Path) -> None:
    """Both projections of attention and the layers around it are rounded and learn, through calibration too."""
    torch.manual_seed(0)
    module = Attending().eval()
    names = set(module.state_dict())
    example = torch.rand(4, 1, 8, 8)
    before = module(example).detach()
    with fake_quantized(copy.deepcopy(module), 127, lambda: None) as count:
        assert count == 5
    coarse = copy.deepcopy(module)

    def calibrate() -> None:
        with torch.no_grad():
            coarse(example)

    with fake_quantized(coarse, 3, calibrate):
        attention = coarse.encoder.self_attn
        for weight in (attention.in_proj_weight, attention.out_proj.weight, coarse.encoder.linear1.weight):
            assert all(len(channel.unique()) <= 7 for channel in weight)
        hooks = [hook for layer in coarse.modules() for hook in layer._forward_pre_hooks.values()]
        roundings = [hook for hook in hooks if isinstance(hook, InputRounding)]
        assert len(roundings) == 4, "attention, both layers after it and the head; no one calls its output projection"
        assert all(rounding._range is not None for rounding in roundings)
        coarse(example).sum().backward()
    assert attention.in_proj_weight.grad is not None
    assert attention.out_proj.weight.grad is not None
    assert set(coarse.state_dict()) == names
    assert torch.equal(coarse(example), before), "nothing was learnt, and no rounding is left"
    made = quantize_aware(trained.given(tmp_path, module), BRIEF)
    assert made.facts["trained_layers"] == 5
    assert len(dequantised_weights(made.files["model.onnx"])) == 5


def test_nothing_of_the_training_is_left(trained: Trained, tmp_path: Path) -> None:
    """The source is untouched, statistics of batch normalisation stay as they were, and the facts say what was done."""
    module = trained.module
    before = {name: value.clone() for name, value in module.state_dict().items()}
    known = trained.given(tmp_path)
    shares: list[float] = []
    made = quantize_aware(replace(known, progress=shares.append), BRIEF)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert made.precision == "int8"
    assert (made.facts["trained_layers"], made.facts["epochs"], made.facts["learning_rate"]) == (4, 1, 0.001)
    assert made.facts["quantised_layers"] == 4
    assert read_signature(made.files["model.onnx"]) == known.source.signature
    assert shares == sorted(shares)
    learner = copy.deepcopy(module)
    with fake_quantized(learner, 127, lambda: None):
        learner.train()(torch.rand(32, 1, 8, 8))
    assert torch.equal(learner[1].running_mean, before["1.running_mean"])
    learner.train()(torch.rand(32, 1, 8, 8))
    assert not torch.equal(learner[1].running_mean, before["1.running_mean"]), "the module may learn them again"


def test_pruned_weights_stay_zero_in_training(trained: Trained, tmp_path: Path) -> None:
    """After `prune-unstructured` the weights that were set to zero are still zero bytes in the file."""
    known = trained.given(tmp_path)
    said = {"prune-unstructured": {"sparsity": 0.6}, "int8-qat": BRIEF.model_dump(exclude_unset=True)}
    steps = [Step(name, RECIPES[name], RECIPES[name].parameters.model_validate(each)) for name, each in said.items()]
    made = run_chain(steps, known, {})
    weights = dequantised_weights(made.files["model.onnx"])
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    assert zeros >= 0.6 * sum(weight.size for weight in weights) - 4


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("training", "needs training data; add `training:`"),
        ("calibration", "needs calibration data; add `calibration:`"),
    ],
)
def test_missing_data_is_rejected(trained: Trained, tmp_path: Path, missing: str, message: str) -> None:
    """Without data to train or to calibrate on, the person is told which section to add, before any training."""
    without: dict[str, Any] = {missing: None}
    known = replace(trained.given(tmp_path), **without)
    with pytest.raises(RecipeRejected, match=message):
        quantize_aware(known, BRIEF)


def test_an_onnx_source_is_rejected(tmp_path: Path) -> None:
    """There is nothing to train in a graph, and the reason names what can be done."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    with pytest.raises(RecipeRejected, match=r"needs a torch source.*int8-static"):
        quantize_aware(ingredients(graph, tmp_path), BRIEF)


class Recurrent(nn.Module):
    """An LSTM over the eight rows of a digit."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(8, 16, batch_first=True), nn.Linear(16, 10)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's own name
        answer: torch.Tensor = self.head(self.lstm(input[:, 0])[0][:, -1])
        return answer


@pytest.mark.parametrize(
    ("module", "message"),
    [(Recurrent(), "weights are recurrent.*int8-dynamic"), (nn.Sequential(nn.Flatten(), nn.ReLU()), "no linear layer")],
)
def test_a_module_without_much_to_quantise_is_rejected(
    trained: Trained, tmp_path: Path, module: nn.Module, message: str
) -> None:
    """Where static int8 kernels would take on little or nothing, no time is spent on training."""
    with pytest.raises(RecipeRejected, match=message):
        quantize_aware(trained.given(tmp_path, module.eval()), BRIEF)
