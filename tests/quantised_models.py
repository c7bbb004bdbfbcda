"""What the tests of static and mixed int8 share: networks trained on real digits, as ONNX, and trials of candidates."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from factory_fixtures import train
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import Array, ingredients
from sklearn.datasets import load_digits
from torch import nn

from variants.data import Samples
from variants.export import export_graph
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients
from variants.trial import Trial

OUTLIER = 5
"""The hidden unit that `with_outlier` makes large."""


@cache
def digits() -> tuple[Samples, Samples, Samples]:
    """Digits to train on, to calibrate on and to tune on; inputs `x` [samples, 64] in [0, 1]."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    everything = Samples({"x": (data.data / 16).astype(np.float32)}, data.target.astype(np.int64))
    return everything.take(order[:900]), everything.take(order[900:997]), everything.take(order[997:])


def _train(module: nn.Module, epochs: int) -> nn.Module:
    torch.set_num_threads(1)
    samples = digits()[0]
    assert samples.target is not None
    train(module, torch.from_numpy(samples.inputs["x"]), torch.from_numpy(samples.target), epochs)
    return module


@cache
def mlp_weights() -> dict[str, Array]:
    """Weights [out, in] and biases of a trained network of three layers: `0.weight` … `4.bias`."""
    torch.manual_seed(0)
    layers = (nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    module = _train(nn.Sequential(*layers), 8)
    return {name: tensor.numpy().copy() for name, tensor in module.state_dict().items()}


def with_outlier(weights: dict[str, Array], factor: float) -> dict[str, Array]:
    """The same function of the same inputs, with one hidden unit `factor` times as large as it was."""
    changed = {name: array.copy() for name, array in weights.items()}
    changed["0.weight"][OUTLIER] *= factor
    changed["0.bias"][OUTLIER] *= factor
    changed["2.weight"][:, OUTLIER] /= factor
    return changed


def write_mlp(path: Path, weights: dict[str, Array]) -> Path:
    """The three layers as Gemm and Relu nodes: `first`, `second`, `third`."""
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    nodes = []
    for index, name in ((0, "first"), (2, "second"), (4, "third")):
        given, made = (f"a{index}" if index else "x"), ("y" if index == 4 else f"h{index}")
        names = [given, f"{index}.weight", f"{index}.bias"]
        nodes.append(helper.make_node("Gemm", names, [made], name, transB=1))
        nodes += [] if made == "y" else [helper.make_node("Relu", [made], [f"a{index + 2}"], f"relu_{index}")]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", d]) for n, d in (("x", 64), ("y", 10)))
    graph = helper.make_graph(nodes, "mlp", [x], [y], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def model_of(path: Path, nodes: list[onnx.NodeProto], constants: dict[str, Any], output: list[Any]) -> Path:
    """A graph from x [batch, 2, 8, 8] to y, with the nodes as they are given."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2, 8, 8])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, output)
    weights = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


IMAGES = Samples({"x": np.random.default_rng(3).normal(size=(40, 2, 8, 8)).astype(np.float32)})
KERNEL = np.random.default_rng(4).normal(size=(2, 2, 3, 3)).astype(np.float32)


def classifier(path: Path) -> Path:
    """Convolution, residual sum, mean, product and softmax, none of the nodes with a name."""
    nodes = [
        helper.make_node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("Add", ["r", "x"], ["s"]),
        helper.make_node("GlobalAveragePool", ["s"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w", "b"], ["z"], alpha=2.0, beta=0.5),
        helper.make_node("Softmax", ["z"], ["y"]),
    ]
    weight = np.random.default_rng(5).normal(size=(2, 3)).astype(np.float32)
    constants = {"k": KERNEL, "w": weight, "b": np.array([1, -1, 0.5], np.float32)}
    return model_of(path, nodes, constants, ["batch", 3])


class Transformer(nn.Module):
    """Digits `x` [batch, 64] as 16 patches -> logits [batch, 10], through one layer of attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 24)
        self.positions = nn.Parameter(torch.zeros(16, 24))
        self.layer = nn.TransformerEncoderLayer(24, 2, 96, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> Any:
        """One logit per digit."""
        patches = x.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        return self.head(self.layer(self.embed(patches) + self.positions).mean(dim=1))


@cache
def transformer() -> bytes:
    """A trained transformer, exported."""
    torch.manual_seed(0)
    module = _train(Transformer(), 30)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "transformer.onnx"
        export_graph(module, {"x": digits()[1].inputs["x"][:9]}, graph, batched=True)
        return graph.read_bytes()


def given(graph: Path, work: Path, *, drop: float = 0.03, agreement: float = 0.95, **more: Any) -> Ingredients:
    """What a recipe gets to quantise a digits network: calibration data, and a trial on tuning data under a gate."""
    _, calibration, tuning = digits()
    gate = {"max_accuracy_drop": drop, "min_agreement": agreement}
    config = ModelConfig.model_validate({"task": "classification", "gate": gate})
    trial = Trial(graph, tuning, config, 32, len(tuning), threads=1)
    chosen: dict[str, Any] = {"samples": calibration, "trial": trial, "config": config}
    return ingredients(graph, work, **(chosen | more))
