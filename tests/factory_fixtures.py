"""Really trained tiny models as repositories on disk: what the factory's tests build variants of."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from sklearn.datasets import load_digits
from torch import nn

NETWORK = """
from torch import nn


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )
"""
MODEL_YAML = """
source: {module: "network:convolutional", weights: source/model.safetensors}
task: classification
evaluation: {data: data/evaluation.npz, target: label, metric: top1}
calibration: {data: data/calibration.npz, samples: 64}
training: {data: data/training.npz, target: label, epochs: 4, learning_rate: 0.003}
gate: {max_accuracy_drop: 0.03, min_agreement: 0.95}
batching: {max_batch_size: 16}
"""


def train(module: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """Plain training, seeded: some seconds on one core."""
    optimiser = torch.optim.Adam(module.parameters(), lr=0.005)
    module.train()
    for _ in range(epochs):
        for rows in torch.tensor_split(torch.randperm(len(images)), len(images) // 64):
            loss = nn.functional.cross_entropy(module(images[rows]), labels[rows])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    module.eval()


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository folder with one model, `digits`: a trained CNN on scikit-learn's real digits. Not to be changed."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None]
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(images))
    parts = {"training": order[:1000], "calibration": order[1000:1100], "evaluation": order[1100:]}
    folder = tmp_path_factory.mktemp("trained") / "digits"
    (folder / "1" / "source").mkdir(parents=True)
    (folder / "1" / "data").mkdir()
    (folder / "network.py").write_text(NETWORK)
    (folder / "model.yaml").write_text(MODEL_YAML)
    scope: dict[str, Callable[[], nn.Module]] = {}
    exec(textwrap.dedent(NETWORK), scope)  # noqa: S102 - our own text above
    module = scope["convolutional"]()
    train(module, torch.from_numpy(images[parts["training"]]), torch.from_numpy(labels[parts["training"]]), 6)
    safetensors.torch.save_model(module, str(folder / "1/source/model.safetensors"))
    for name, rows in parts.items():
        np.savez(folder / "1/data" / f"{name}.npz", input=images[rows], label=labels[rows])
    return folder.parent


@pytest.fixture
def digits(trained_digits: Path, tmp_path: Path) -> Path:
    """A fresh copy of the trained repository, not yet built."""
    return Path(shutil.copytree(trained_digits, tmp_path / "models"))


@dataclass(frozen=True)
class Built:
    """A repository after `build` ran in its own process, with what the person saw."""

    root: Path
    code: int
    out: str
    err: str


def build_in_process(root: Path, arguments: str = "") -> Built:
    """Run `build(root, arguments)` as a user's process would, so that stray warnings and logs are seen."""
    script = (
        "import sys; from pathlib import Path; from variants.build import build\n"
        "from variants.factory import Options\n"
        f"sys.exit(build(Path({str(root)!r}), {arguments}))"
    )
    top = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=top, check=False)
    return Built(root, done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="session")
def built_digits(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The trained repository with its default variants built once. Not to be changed; copy it to play with it."""
    root = Path(shutil.copytree(trained_digits, tmp_path_factory.mktemp("built") / "models"))
    return build_in_process(root)


@pytest.fixture
def onnx_digits(built_digits: Built, tmp_path: Path) -> Path:
    """The trained model as a model folder with nothing but an ONNX source and its data, not yet built."""
    origin, folder = built_digits.root / "digits" / "1", tmp_path / "plain"
    (folder / "1").mkdir(parents=True)
    shutil.copytree(origin / "data", folder / "1" / "data")
    shutil.copy(origin / "variants/fp32/model.onnx", folder / "1/model.onnx")
    kept = [line for line in MODEL_YAML.splitlines() if not line.startswith(("source", "training"))]
    (folder / "model.yaml").write_text("\n".join([*kept, "variants: [fp32, int8-dynamic, pruned-unstructured]"]))
    return folder
