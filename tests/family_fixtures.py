"""The four families in a small size, each really trained on real digits in seconds, and built with every technique."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from factory_fixtures import Built, build_in_process

from benchmarks.families import digits, networks
from variants.repository import ModelFolder
from variants.variant import Card

MODEL_YAML = """
source: {{module: "networks:small_{family}", weights: source/model.safetensors}}
task: classification
evaluation: {{data: data/evaluation.npz, target: label, metric: top1}}
calibration: {{data: data/calibration.npz, samples: 64}}
tuning: {{data: data/tuning.npz, target: label}}
training: {{data: data/training.npz, target: label, epochs: 1, learning_rate: 0.002}}
gate: {{max_accuracy_drop: 0.03, min_agreement: 0.94}}
batching: {{max_batch_size: 32}}
variants:
  - fp32
  - int8-dynamic
  - int8-static
  - int8-qat
  - {{name: pruned, recipe: prune-channels, sparsity: 0.3}}
  - {{name: pruned-then-int8, recipe: [prune-channels, {int8}], sparsity: 0.3}}
  - {{name: pruned-unstructured, sparsity: 0.3}}
"""


@dataclass(frozen=True, slots=True)
class Small:
    """How a small network is trained: pixels along a side, epochs and learning rate; and what follows its pruning."""

    pixels: int
    epochs: int
    rate: float
    int8: str


SMALL = {
    "cnn": Small(8, 12, 0.005, "int8-static"),
    "mlp": Small(8, 24, 0.005, "int8-static"),
    "lstm": Small(8, 20, 0.02, "int8-dynamic"),
    "transformer": Small(16, 16, 0.002, "int8-dynamic"),
}


@dataclass(frozen=True, slots=True)
class Families:
    """The built repository with one model for each family. Not to be changed."""

    built: Built

    def cards(self, family: str) -> Mapping[str, Card]:
        """What the build proved about each variant."""
        version = ModelFolder(self.built.root / family).newest()
        found = {name: version.card(name) for name in version.manifest().variants}
        return {name: card for name, card in found.items() if card is not None}

    def artefact(self, family: str, variant: str) -> Path:
        """The main file of a variant."""
        return self.built.root / family / "1/variants" / variant / "model.onnx"


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    """All four families, trained and built once."""
    root = tmp_path_factory.mktemp("families")
    for family, small in SMALL.items():
        train_small(root / family, small)
    return Families(build_in_process(root))


def train_small(folder: Path, small: Small) -> None:
    """Train a small network and write its model folder."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, sets = getattr(networks, f"small_{folder.name}")(), digits.read_sets(small.pixels)
    digits.train(network, sets["training"], epochs=small.epochs, rate=small.rate)
    digits.write_model(folder, network, sets, MODEL_YAML.format(family=folder.name, int8=small.int8))
