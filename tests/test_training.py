"""Fine-tuning: what a changed module learns from."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recipe_fixtures import ingredients

from variants.data import Samples
from variants.model_config import ModelConfig
from variants.recipes.training import finetune
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source, export_graph


def training(task: str, metric: str | None = None) -> ModelConfig:
    """A model of this task with integer targets to train on."""
    said: dict[str, Any] = {"task": task, "training": {"data": "t.npz", "target": "y", "epochs": 1}}
    if metric is not None:
        said["evaluation"] = {"data": "e.npz", "target": "y", "metric": metric}
    return ModelConfig.model_validate(said)


@pytest.mark.parametrize(
    ("task", "metric", "learns"),
    [
        ("embedding", None, False),
        ("regression", None, False),
        ("generic", "cosine", False),
        ("generic", "macro_f1", True),
        ("classification", None, True),
    ],
)
def test_only_class_numbers_are_learnt_as_classes(tmp_path: Path, task: str, metric: str | None, learns: bool) -> None:
    """A module that already answers like its teacher has nothing to learn, unless its integer targets are classes."""
    torch.manual_seed(0)
    teacher = torch.nn.Linear(4, 8).eval()
    module = copy.deepcopy(teacher)
    generator = np.random.default_rng(0)
    samples = Samples({"input": generator.normal(size=(64, 4)).astype(np.float32)}, generator.integers(0, 8, 64))
    graph = tmp_path / "g.onnx"
    export_graph(teacher, samples.inputs, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, teacher)
    given = ingredients(graph, tmp_path, samples, source=source, training=samples, config=training(task, metric))
    finetune(module, teacher, given)
    assert torch.equal(module.weight, teacher.weight) is not learns


def test_a_regression_may_have_whole_numbers_as_targets(tmp_path: Path) -> None:
    """Ages are no class numbers: most of them are beyond the one output."""
    teacher = torch.nn.Linear(4, 1).eval()
    ages = np.random.default_rng(0).integers(18, 90, (64, 1))
    samples = Samples({"input": np.ones((64, 4), np.float32)}, ages)
    graph = tmp_path / "g.onnx"
    export_graph(teacher, samples.inputs, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, teacher)
    given = ingredients(graph, tmp_path, samples, source=source, training=samples, config=training("regression"))
    assert finetune(copy.deepcopy(teacher), teacher, given) == 1
