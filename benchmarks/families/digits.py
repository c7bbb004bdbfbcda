"""Real digits for the families: honest sets, training, and a model's folder for `build`.

The data are scikit-learn's 1797 handwritten digits, which come as 14 sheets on each of which somebody copied the same
digits. The sets are split by sheet: accuracy is measured on handwritings that nothing was trained, calibrated or tuned
on, and choices are made on one that nothing was trained on either. A random split would put every hand on both sides
and flatter each variant.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.families import networks

TUNING_SHEET, FIRST_HELD_OUT = 905, 1029
"""Where the eighth and the ninth sheet begin: digits from the ninth on, six sheets, are for evaluation only."""
BATCH = 32
COPIES = 3
"""How many distorted copies of each training digit go with it into `training.npz`, for recipes that train."""


@dataclass(frozen=True, slots=True)
class Digits:
    """Images [n, 1, size, size] in [0, 1] and their labels [n]."""

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]


def read_sets(size: int) -> dict[str, Digits]:
    """The disjoint sets: six sheets to evaluate, one to tune; of the others, one in eight of each digit to calibrate.

    Every sheet holds each digit about 13 times, so every set has all classes in about equal shares. Images are enlarged
    from 8x8 to `size` as a camera would see them.
    """
    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    image = functional.interpolate(small, size=size, mode="bilinear", align_corners=False).numpy()
    label = digits.target.astype(np.int64)
    position = np.arange(len(label))
    calibrating = np.zeros_like(position, np.bool_)
    for digit in range(networks.CLASSES):
        calibrating[np.flatnonzero((position < TUNING_SHEET) & (label == digit))[::8]] = True
    chosen = {
        "training": (position < TUNING_SHEET) & ~calibrating,
        "calibration": calibrating,
        "tuning": (position >= TUNING_SHEET) & (position < FIRST_HELD_OUT),
        "evaluation": position >= FIRST_HELD_OUT,
    }
    return {name: Digits(image[rows], label[rows]) for name, rows in chosen.items()}


def train(network: nn.Module, digits: Digits, *, epochs: int, rate: float) -> None:
    """Train in place, seeded, on images distorted anew in every epoch, and leave the network in evaluation mode."""
    torch.manual_seed(0)
    images, labels = torch.from_numpy(digits.image), torch.from_numpy(digits.label)
    batches = len(labels) // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=epochs * batches)
    network.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(labels)).tensor_split(batches):
            answers = network(distorted(images[rows]))
            loss = functional.cross_entropy(answers, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)  # an LSTM's first steps are steep
            optimiser.step()
            schedule.step()
    network.eval()


def distorted(images: Tensor) -> Tensor:
    """Each image turned, sheared, scaled and shifted a little at random, as other hands would write it."""
    count = len(images)

    def uniform(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, shear, wide, high = uniform(0.25), uniform(0.2), 1 + uniform(0.15), 1 + uniform(0.15)
    first = torch.stack([torch.cos(angle) * wide, shear - torch.sin(angle), uniform(0.12)], dim=1)
    second = torch.stack([torch.sin(angle), torch.cos(angle) * high, uniform(0.12)], dim=1)
    grid = functional.affine_grid(torch.stack([first, second], dim=1), list(images.shape), align_corners=False)
    return functional.grid_sample(images, grid, align_corners=False)


@torch.inference_mode()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """The share of digits that the network recognises."""
    guesses = [network(part).argmax(dim=1) for part in torch.split(torch.from_numpy(digits.image), BATCH)]
    return float((torch.cat(guesses).numpy() == digits.label).mean())


def with_copies(digits: Digits) -> Digits:
    """The digits, and distorted copies of each; seeded."""
    torch.manual_seed(0)
    copies = [distorted(torch.from_numpy(digits.image)).numpy() for _ in range(COPIES)]
    return Digits(np.concatenate([digits.image, *copies]), np.tile(digits.label, 1 + COPIES))


def write_model(folder: Path, network: nn.Module, sets: Mapping[str, Digits], config: str) -> None:
    """The model's folder as `gearshift build` reads it, `config` being its model.yaml; an earlier run's is replaced."""
    source, data = folder / "1" / "source", folder / "1" / "data"
    source.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    (folder / "model.yaml").write_text(config)
    shutil.copyfile(networks.__file__, folder / "networks.py")  # `build` imports the factory from the model's folder
    save_model(network, str(source / "model.safetensors"))
    for name, digits in (dict(sets) | {"training": with_copies(sets["training"])}).items():
        np.savez(data / f"{name}.npz", image=digits.image, label=digits.label)
