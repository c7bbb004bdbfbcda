"""prune-channels on a really trained model: what gets smaller, how it recovers, what is searched and what refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from channel_networks import DeepRecurrent, Transformer, encoder_layer
from factory_fixtures import NETWORK, Built
from pydantic import ValidationError
from recipe_fixtures import CPU, built, images, ingredients, run

from variants.cost import cost_of
from variants.data import DataSets, Samples
from variants.export import export_graph
from variants.model_config import ModelConfig
from variants.recipes.pruning.channels import narrower, prune_channels
from variants.recipes.pruning.parameters import PruneChannels
from variants.recipes.pruning.pruning import kept
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.runtimes.onnx_signature import Signature, read_signature
from variants.source import Source
from variants.trial import Trial, Tried
from variants.variant import Interval


def trained(built_digits: Built, work: Path, *, gate: dict[str, float] | None = None, **more: Any) -> Ingredients:
    """The digits model as a recipe gets it, with training and tuning samples."""
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - our own text
    module = scope["convolutional"]()
    version = built_digits.root / "digits/1"
    safetensors.torch.load_model(module, version / "source/model.safetensors")
    graph = built(built_digits, "fp32")
    sets = DataSets(training=samples(version, "training")).with_tuning()
    said = {"task": "classification", "gate": gate or {"max_accuracy_drop": 0.05, "min_agreement": 0.9}}
    said["training"] = {"data": "t.npz", "target": "label", "epochs": 4, "learning_rate": 0.003}
    config = ModelConfig.model_validate(said)
    assert sets.tuning is not None
    given = {"training": sets.training, "config": config, "trial": Trial(graph, sets.tuning, config, 16, 400, 1)}
    source = Source(graph, read_signature(graph), 16, module.eval())
    return ingredients(graph, work, samples(version, "calibration"), source=source, **(given | more))


def samples(version: Path, name: str) -> Samples:
    """One of the digits' sets."""
    with np.load(version / f"data/{name}.npz") as data:
        return Samples({"input": data["input"]}, data["label"])


def test_pruned_is_really_smaller_and_keeps_its_outputs(built_digits: Built) -> None:
    """Half the channels leave about a quarter of the weights and operations, and still ten classes."""
    fp32, pruned = (cost_of(built(built_digits, name)) for name in ("fp32", "pruned"))
    assert 0.2 < pruned.weights / fp32.weights < 0.35
    assert 0.2 < pruned.flops / fp32.flops < 0.35
    assert pruned.size_bytes < fp32.size_bytes / 2
    assert run(built(built_digits, "pruned"), input=images(built_digits, 3)).shape == (3, 10)


@pytest.mark.parametrize("recover", ["distill", "finetune"])
def test_recovery_brings_accuracy_back(built_digits: Built, tmp_path: Path, recover: str) -> None:
    """Four epochs make up for what half the channels knew; the facts and findings say what was done."""
    given = trained(built_digits, tmp_path)
    assert given.source.module is not None
    product = prune_channels(given, PruneChannels.model_validate({"recover": recover}))
    bare = narrower(given.source.module, {"input": torch.from_numpy(images(built_digits, 2))}, 0.5)
    assert right(built_digits, product.module) > max(0.85, right(built_digits, bare))
    facts = {"weights_before": 38314, "weights_after": 9818, "sparsity_reached": 0.5, "epochs": 4}
    assert product.facts == facts
    groups = [{"layers": ["0", "1"], "before": 16, "after": 8}, {"layers": ["4"], "before": 32, "after": 16}]
    assert product.findings["channels"] == [*groups, {"layers": ["7"], "before": 64, "after": 32}]
    assert product.findings["kept_channels"] == {"9": "its channels reach an output"}
    assert run(product.files["model.onnx"], input=images(built_digits, 5)).shape == (5, 10)


def right(digits: Built, module: torch.nn.Module | None) -> float:
    """The share of the evaluation digits that a module recognises."""
    test = samples(digits.root / "digits/1", "evaluation")
    assert module is not None
    with torch.no_grad():
        guesses = module(torch.from_numpy(test.inputs["input"])).argmax(dim=1).numpy()
    return float((guesses == test.target).mean())


def test_steps_share_the_epochs_and_the_progress(built_digits: Built, tmp_path: Path) -> None:
    """Three rounds of pruning and recovery take as many epochs as one, and report one way from nothing to all."""
    seen: list[float] = []
    given = trained(built_digits, tmp_path, progress=seen.append)
    product = prune_channels(given, PruneChannels(steps=3, round_to=1))
    assert product.facts["epochs"] == 4
    assert product.facts["sparsity_reached"] == 0.5
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("units", "sparsity", "round_to", "left"),
    [(64, 0.5, 4, 32), (30, 0.5, 4, 16), (10, 0.75, 4, 4), (10, 0.75, 1, 2), (3, 0.9, 4, 3), (64, 0.99, 8, 8)],
)
def test_widths_that_stay_are_multiples(units: int, sparsity: float, round_to: int, left: int) -> None:
    """The nearest multiple, never none and never more than there were."""
    assert kept(units, sparsity, round_to) == left


def test_auto_takes_the_sparsest_network_that_passes(built_digits: Built, tmp_path: Path) -> None:
    """Everything tried is in the findings; what comes out is the last that passed, and less would have passed too."""
    given = trained(built_digits, tmp_path, quick=True)
    product = prune_channels(given, PruneChannels(sparsity="auto"))
    tried = product.findings["sparsity"]
    assert isinstance(tried, list)
    assert 2 <= len(tried) <= 4
    passing = [row for row in tried if row["passes"]]
    last = next(row for row in reversed(passing) if row["epochs"] == product.facts["epochs"])
    assert last["sparsity"] == max(row["sparsity"] for row in passing)
    assert [row["weights"] for row in passing] == sorted((row["weights"] for row in passing), reverse=True)
    cost = cost_of(product.files["model.onnx"])
    assert (cost.weights, cost.flops) == (last["weights"], last["flops"])
    assert product.facts["epochs"] == last["epochs"]
    assert set(last) == {"sparsity", "epochs", "weights", "flops", "drop", "agreement", "damage", "passes"}
    assert given.trial is not None
    assert given.trial.judge(product.files["model.onnx"]).passes


def test_auto_rejects_when_nothing_passes(built_digits: Built, tmp_path: Path) -> None:
    """A gate that no pruned network can pass leaves nothing, and the reason lists what was tried."""
    given = trained(built_digits, tmp_path, gate={"max_accuracy_drop": 0.0, "min_agreement": 1.0}, quick=True)
    with pytest.raises(RecipeRejected, match=r"no sparsity passes.* without 25% of the channels .*% of accuracy"):
        prune_channels(given, PruneChannels(sparsity="auto", recover="none"))


def test_auto_needs_tuning_samples(built_digits: Built, tmp_path: Path) -> None:
    """Without them there is nothing to choose on, and the reason names the data to add."""
    with pytest.raises(RecipeRejected, match=r"add `tuning:` or more `training:` data"):
        prune_channels(trained(built_digits, tmp_path, trial=None), PruneChannels(sparsity="auto"))


@pytest.mark.parametrize("sparsity", [0, 1, -0.1, 2, "most", None, True])
def test_a_sparsity_is_a_share_or_auto(sparsity: object) -> None:
    """Anything else is one clear sentence."""
    with pytest.raises(ValidationError, match="a share of the channels between 0 and 1, or auto"):
        PruneChannels.model_validate({"sparsity": sparsity})


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (lambda: Transformer(encoder_layer), {(32, 16), (16, 32), (32, 32)}),
        (lambda: DeepRecurrent(torch.nn.LSTM), {(2, 24, 8), (2, 24, 6), (2, 24, 12)}),
    ],
)
def test_pruned_heads_and_units_are_exported(
    tmp_path: Path, make: Callable[[], torch.nn.Module], shapes: set[tuple[int, ...]]
) -> None:
    """The graph of a transformer or a recurrent network has the narrow weights, and answers like the narrow module."""
    inputs = Samples({"x": np.random.default_rng(0).normal(size=(4, 1, 8, 8)).astype(np.float32)})
    source = Source(tmp_path / "none.onnx", Signature((), (), batch_axis=True), 32, make().eval())
    given = Ingredients(source, inputs, ModelConfig(), inputs, None, CPU, tmp_path)
    product = prune_channels(given, PruneChannels(recover="none", round_to=1))
    graph = onnx.load(product.files["model.onnx"]).graph
    assert shapes <= {tuple(tensor.dims) for tensor in graph.initializer}
    assert product.module is not None
    with torch.no_grad():
        wanted = product.module(torch.from_numpy(inputs.inputs["x"])).numpy()
    np.testing.assert_allclose(run(product.files["model.onnx"], x=inputs.inputs["x"]), wanted, atol=1e-5)


def test_pruning_channels_needs_a_module(built_digits: Built, tmp_path: Path) -> None:
    """An ONNX source cannot lose channels, and the reason names what can be done instead."""
    with pytest.raises(RecipeRejected, match=r"needs a torch source.*prune-unstructured"):
        prune_channels(ingredients(built(built_digits, "fp32"), tmp_path), PruneChannels())


def test_recovering_needs_training_data(built_digits: Built, tmp_path: Path) -> None:
    """The reason names both ways out."""
    with pytest.raises(RecipeRejected, match=r"add `training:` or say `recover: none`"):
        prune_channels(trained(built_digits, tmp_path, training=None), PruneChannels())


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
    inputs = Samples({"x": np.ones((4, 4), np.float32)})
    graph = tmp_path / "g.onnx"
    export_graph(HardCoded().eval(), inputs.inputs, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, HardCoded().eval())
    with pytest.raises(RecipeRejected, match="no channel can be removed soundly"):
        prune_channels(ingredients(graph, tmp_path, inputs, source=source), PruneChannels(recover="none"))


class Narrow(torch.nn.Module):
    """[batch, 8] -> some hidden channels -> [batch, 3]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.head = torch.nn.Linear(8, width), torch.nn.Linear(width, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.head(self.hidden(x).relu())
        return answer


class Judge:
    """A trial whose verdicts are said before: what each candidate loses."""

    def __init__(self, *drops: float) -> None:
        self.drops = iter(drops)

    def judge(self, graph: Path) -> Tried:
        assert graph.is_file()
        drop = next(self.drops)
        return Tried(Interval(drop, drop, drop), Interval(1 - drop, 1 - drop, 1 - drop), drop, drop < 0.01)


def narrow(work: Path, width: int, **more: Any) -> Ingredients:
    """What the recipe gets for a small module, with training data of three classes; it does not look at the graph."""
    generator = np.random.default_rng(0)
    inputs = {"x": generator.normal(size=(64, 8)).astype(np.float32)}
    said = {"task": "classification", "training": {"data": "t.npz", "target": "y", "epochs": 2, "learning_rate": 0.003}}
    source = Source(work / "none.onnx", Signature((), (), batch_axis=True), 32, Narrow(width).eval())
    training = Samples(inputs, generator.integers(0, 3, 64))
    given = Ingredients(source, training, ModelConfig.model_validate(said), training, training, CPU, work)
    return replace(given, **more)


def test_auto_tries_only_what_loses_more(tmp_path: Path) -> None:
    """Eight channels in fours can only be halved, whatever is asked for: one candidate, recorded as it is."""
    given = narrow(tmp_path, 8, trial=Judge(0.002, 0.001))
    tried: Any = prune_channels(given, PruneChannels(sparsity="auto")).findings["sparsity"]
    assert [(row["sparsity"], row["weights"]) for row in tried] == [(0.5, 51), (0.5, 51)]


@pytest.mark.parametrize(("last", "epochs"), [(0.001, 3), (0.009, 1)])
def test_auto_keeps_the_better_of_the_last_two(tmp_path: Path, last: float, epochs: int) -> None:
    """All epochs on top are for nothing where more is lost after them, though it would pass."""
    product = prune_channels(narrow(tmp_path, 8, trial=Judge(0.002, last)), PruneChannels(sparsity="auto"))
    assert product.facts["epochs"] == epochs


@pytest.mark.parametrize("sparsity", ["auto", 0.5])
@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_is_trained_where_nothing_goes(tmp_path: Path, sparsity: Any, steps: int) -> None:
    """Four channels in fours stay, and the reason is there at once."""
    seen: list[float] = []
    given = narrow(tmp_path, 4, trial=Judge(), progress=seen.append)
    with pytest.raises(RecipeRejected, match=r"no channel can be removed soundly .*hidden: 4 units .*round to 4"):
        prune_channels(given, PruneChannels(sparsity=sparsity, steps=steps))
    assert seen == []


def test_a_step_that_takes_nothing_leaves_its_epochs_to_later_ones(tmp_path: Path) -> None:
    """A fifth of eight channels is nothing in fours; half of them is, and all epochs are there to recover from it."""
    product = prune_channels(narrow(tmp_path, 8), PruneChannels(sparsity=0.5, steps=3))
    assert (product.facts["sparsity_reached"], product.facts["epochs"]) == (0.5, 2)
