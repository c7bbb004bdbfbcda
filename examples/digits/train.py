"""Train the digits network and lay out a model repository for `gearshift build`.

    python examples/digits/train.py --out models

The data are scikit-learn's 1797 real handwritten digits. They come as 14 sheets on each of which somebody copied the
same digits, so the sets are split by sheet: accuracy is measured on handwritings that nothing was trained or
calibrated on. A random split would put every writer on both sides and flatter each variant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin double the time on a busy host

import numpy as np
import numpy.typing as npt
import torch
from model import CLASSES, IMAGE_SIZE, build
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from variants.hardware import detect_hardware

HERE = Path(__file__).parent
FIRST_HELD_OUT = 1029
"""Where the ninth sheet begins: the digits from here on, six sheets, are for evaluation only."""
BATCH = 32


class Digits(NamedTuple):
    """Images [n, 1, 32, 32] in [0, 1] and their labels [n]."""

    image: npt.NDArray[np.float32]
    label: npt.NDArray[np.int64]


def main() -> None:
    """Train, say how good it is, write the repository."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, required=True, help="the model repository to write `digits` into")
    arguments.add_argument("--epochs", type=int, default=10)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    started = time.monotonic()
    torch.set_num_threads(detect_hardware().cores)  # by default it takes the whole node's, whatever our quota
    sets = split(read_digits())
    network = train(sets["training"], options.epochs, options.seed)
    score = accuracy(network, sets["evaluation"])
    write_repository(options.out / "digits", network, sets)
    seconds, count = time.monotonic() - started, len(sets["evaluation"].label)
    print(f"accuracy {score:.2%} on {count} held-out digits, {seconds:.0f} s")
    print(f"next: gearshift build {options.out / 'digits'}")


def read_digits() -> Digits:
    """All digits in the order of their sheets, enlarged from 8x8 as a camera would see them."""
    digits = load_digits()
    small = torch.from_numpy(digits.images.astype(np.float32) / 16)[:, None]
    image = functional.interpolate(small, size=IMAGE_SIZE, mode="bilinear", align_corners=False)
    return Digits(image.numpy(), digits.target.astype(np.int64))


def split(digits: Digits) -> dict[str, Digits]:
    """Disjoint sets: the last six sheets to evaluate; of the first eight, one in eight of each digit to calibrate.

    Every sheet holds each digit about 13 times, so every set has all classes in about equal shares.
    """
    held_out = np.arange(len(digits.label)) >= FIRST_HELD_OUT
    calibrating = np.zeros_like(held_out)
    for label in range(CLASSES):
        calibrating[np.flatnonzero(~held_out & (digits.label == label))[::8]] = True
    choices = {"training": ~held_out & ~calibrating, "calibration": calibrating, "evaluation": held_out}
    return {name: Digits(digits.image[chosen], digits.label[chosen]) for name, chosen in choices.items()}


def train(digits: Digits, epochs: int, seed: int) -> nn.Module:
    """The trained network; the same seed on the same machine gives the same weights."""
    torch.manual_seed(seed)
    network = build()
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on a CPU
    images, labels = torch.from_numpy(digits.image), torch.from_numpy(digits.label)
    batches = len(labels) // BATCH
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=0.003, total_steps=epochs * batches)
    for epoch in range(epochs):
        losses = []
        for rows in torch.randperm(len(labels)).tensor_split(batches):
            inputs = distorted(images[rows]).to(memory_format=torch.channels_last)
            loss = functional.cross_entropy(network(inputs), labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1}/{epochs}: loss {np.mean(losses):.3f}", flush=True)
    return network.eval()


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


def write_repository(folder: Path, network: nn.Module, sets: dict[str, Digits]) -> None:
    """The model's folder as `gearshift build` reads it; data and weights of an earlier run are replaced."""
    source, data = folder / "1" / "source", folder / "1" / "data"
    source.mkdir(parents=True, exist_ok=True)
    data.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(HERE / "model.yaml", folder / "model.yaml")
    shutil.copyfile(HERE / "model.py", folder / "model.py")  # `build` imports the factory from the model's own folder
    save_file({name: value.contiguous() for name, value in network.state_dict().items()}, source / "model.safetensors")
    for name, digits in sets.items():
        np.savez(data / f"{name}.npz", image=digits.image, label=digits.label)


if __name__ == "__main__":
    main()
