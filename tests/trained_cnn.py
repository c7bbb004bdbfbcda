"""The really trained digits CNN as recipes get it: a torch source with its data, exported once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from factory_fixtures import NETWORK
from onnx import load, numpy_helper
from recipe_fixtures import Array, ingredients, run

from variants.data import Samples
from variants.export import export_graph
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source

CONFIG = ModelConfig.model_validate(
    {
        "task": "classification",
        "calibration": {"data": "c.npz", "samples": 64},
        "training": {"data": "t.npz", "target": "label", "epochs": 4, "learning_rate": 0.003},
    }
)


@dataclass(frozen=True)
class Trained:
    """Not to be changed."""

    module: Any
    graph: Path
    training: Samples
    calibration: Samples
    evaluation: Samples

    def given(self, work: Path, module: Any = None, graph: Path | None = None) -> Ingredients:
        """What a recipe gets for the CNN, or for another module that takes the digits."""
        work.mkdir(exist_ok=True)
        module, graph = module or self.module, graph or self.graph
        source = Source(graph, read_signature(graph), 32, module)
        said = {"source": source, "training": self.training, "config": CONFIG, "teacher": module}
        return ingredients(graph, work, Samples(self.calibration.inputs), **said)

    def right(self, graph: Path) -> float:
        """Top-1 accuracy of a file on ONNX Runtime."""
        return float((run(graph, **self.evaluation.inputs).argmax(1) == self.evaluation.target).mean())


def load_trained(root: Path, work: Path) -> Trained:
    """From the trained repository `root`; the graph goes to `work`."""
    torch.set_num_threads(1)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - our own text
    module, graph = scope["convolutional"](), work / "fp32.onnx"
    safetensors.torch.load_model(module, root / "digits/1/source/model.safetensors")
    sets = []
    for name in ("training", "calibration", "evaluation"):
        with np.load(root / "digits/1/data" / f"{name}.npz") as data:
            sets.append(Samples({"input": data["input"]}, data["label"]))
    export_graph(module.eval(), sets[0].inputs, graph, batched=True)
    return Trained(module, graph, *sets)


def dequantised_weights(graph: Path) -> list[Array]:
    """The weights of a QDQ file, back as floats, in the graph's order."""
    model = load(graph).graph
    named = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.initializer}
    found = []
    for node in model.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in named and named[node.input[0]].dtype == np.int8:
            weight, scale = named[node.input[0]], named[node.input[1]]
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)
            shape = [-1 if dim == axis else 1 for dim in range(weight.ndim)]
            found.append(weight.astype(np.float32) * scale.reshape(shape))
    return found
