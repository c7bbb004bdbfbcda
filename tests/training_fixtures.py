"""What the tests of training share: ingredients around a module, without a graph where nothing is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from recipe_fixtures import CPU
from torch import nn

from variants.data import Samples
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients
from variants.runtimes.onnx_signature import Signature
from variants.source import Source

torch.set_num_threads(1)  # several threads of torch get in each other's way on a shared host

NO_SIGNATURE = Signature((), (), batch_axis=True)


def config(task: str = "classification", *, metric: str | None = None, **training: Any) -> ModelConfig:
    """A model of this task that trains for one epoch unless told otherwise."""
    said: dict[str, Any] = {"task": task, "training": {"data": "t.npz", "epochs": 1} | training}
    if metric is not None:
        said["evaluation"] = {"data": "e.npz", "target": "y", "metric": metric}
    return ModelConfig.model_validate(said)


def lesson(
    teacher: nn.Module, samples: Samples, work: Path, configured: ModelConfig | None = None, **more: Any
) -> Ingredients:
    """Ingredients with a torch source whose graph nobody reads."""
    source = Source(work / "none.onnx", NO_SIGNATURE, more.pop("max_batch", 32), teacher)
    example = samples.take(slice(0, 9))
    given: dict[str, Any] = {"calibration": None, "training": samples, "hardware": CPU, "teacher": teacher}
    return Ingredients(source=source, example=example, config=configured or config(), work=work, **(given | more))


def points(count: int = 64, width: int = 4, seed: int = 0) -> Samples:
    """Random inputs [count, width] with class numbers that say on which side of zero each one's sum is."""
    inputs = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return Samples({"input": inputs}, (inputs.sum(axis=1) > 0).astype(np.int64))


def stack(blocks: int) -> nn.Sequential:
    """A network of blocks that do not change the shape, between an entrance and a head."""
    torch.manual_seed(0)
    repeated = [layer for _ in range(blocks) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(nn.Linear(4, 8), *repeated, nn.Linear(8, 2)).eval()
