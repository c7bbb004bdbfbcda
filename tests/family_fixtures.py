"""The four families in a small size, each really trained on real digits in seconds, with variants made and proven."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.families import digits, networks
from variants.factory import Options, open_factory
from variants.hardware import detect_hardware
from variants.plan import plan
from variants.progress import Reporter
from variants.repository import ModelFolder
from variants.source import importable
from variants.variant import Card

MODEL_YAML = """
source: {{module: "networks:small_{family}", weights: source/model.safetensors}}
task: classification
evaluation: {{data: data/evaluation.npz, target: label, metric: top1}}
calibration: {{data: data/calibration.npz, samples: 64}}
tuning: {{data: data/tuning.npz, target: label}}
training: {{data: data/training.npz, target: label, epochs: 1, learning_rate: 0.002}}
gate: {{max_accuracy_drop: 0.03, min_agreement: 0.93}}
batching: {{max_batch_size: 32}}
variants:
  - fp32
  {variants}
"""
PRUNED = "- {name: pruned, recipe: prune-channels, sparsity: 0.3}"
CHAIN = "- {{name: pruned-then-int8, recipe: [prune-channels, {int8}], sparsity: 0.3}}"
ZEROS = "- {name: zeros, recipe: prune-unstructured, sparsity: 0.3}"


@dataclass(frozen=True, slots=True)
class Small:
    """How a small network is trained: pixels along a side, epochs and learning rate; and what is made of it."""

    pixels: int
    epochs: int
    rate: float
    variants: tuple[str, ...]


SMALL = {
    "cnn": Small(8, 12, 0.005, ("- int8-static", PRUNED, CHAIN.format(int8="int8-static"))),
    "mlp": Small(8, 24, 0.005, ("- int8-dynamic", "- int8-static", "- int8-qat", ZEROS)),
    "lstm": Small(
        8, 20, 0.02, ("- int8-dynamic", "- int8-static", "- int8-qat", PRUNED, CHAIN.format(int8="int8-dynamic"))
    ),
    "transformer": Small(16, 16, 0.002, ("- int8-dynamic", "- int8-static", PRUNED, CHAIN.format(int8="int8-dynamic"))),
}


@dataclass(frozen=True, slots=True)
class Families:
    """A repository that gets each family once it is asked for. Not to be changed."""

    root: Path
    crashed: dict[str, list[str]] = field(default_factory=dict)

    def made(self, family: str) -> Path:
        """The folder of a family with its variants: about twenty seconds of processor time at first."""
        folder = self.root / family
        if family not in self.crashed:
            train_small(folder, SMALL[family])
            self.crashed[family] = make_variants(folder)
        return folder

    def cards(self, family: str) -> Mapping[str, Card]:
        """What was proven about each variant."""
        version = ModelFolder(self.made(family)).newest()
        found = {name: version.card(name) for name in version.manifest().variants}
        return {name: card for name, card in found.items() if card is not None}

    def artefact(self, family: str, variant: str) -> Path:
        """The main file of a variant."""
        return self.made(family) / "1/variants" / variant / "model.onnx"


def train_small(folder: Path, small: Small) -> None:
    """Train a small network and write its model folder."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    network, sets = getattr(networks, f"small_{folder.name}")(), digits.read_sets(small.pixels)
    digits.train(network, sets["training"], epochs=small.epochs, rate=small.rate)
    config = MODEL_YAML.format(family=folder.name, variants="\n  ".join(small.variants))
    digits.write_model(folder, network, sets, config)


def make_variants(folder: Path) -> list[str]:
    """Make and prove every variant as `build` does, but for its measuring of speed; returns which recipes crashed."""
    version, hardware = ModelFolder(folder).newest(), detect_hardware()
    planned = plan(version, hardware, quick=False)
    with importable(folder), TemporaryDirectory() as work:
        factory = open_factory(version, planned[0], hardware, Path(work), Options(), Reporter())
        return [each.name for each in planned if factory.make(each) is not None]
