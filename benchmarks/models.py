"""Untrained ONNX models of known shape, for speed only: a ResNet-18-class CNN and a small MLP, as bare repositories."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.ReLU(), nn.Conv2d(after, after, 3, 1, 1))
        self.shortcut = nn.Conv2d(before, after, 1, stride) if before != after else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, before, H, W] -> [N, after, H/stride, W/stride]."""
        return torch.relu(self.body(x) + self.shortcut(x))


def write_cnn(repository: Path, max_batch_size: int = 16) -> None:
    """`cnn`: 3x64x64 to 10 classes, about 1.1 GFLOP, ResNet-18's widths."""
    torch.manual_seed(0)
    widths = [64, 64, 128, 128, 256, 256, 512, 512]
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1), nn.ReLU(), nn.MaxPool2d(2)]
    for before, after in zip([64, *widths], widths, strict=False):
        layers.append(Block(before, after, 2 if after != before else 1))
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)).eval()
    path = repository / "cnn/1/model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    (repository / "cnn/model.yaml").write_text(f"batching: {{max_batch_size: {max_batch_size}}}\n")
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model,
        (torch.zeros(2, 3, 64, 64),),
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
    )
    assert program is not None
    program.save(str(path), external_data=False)


def write_mlp(repository: Path) -> None:
    """`mlp`: 64-256-256-10, a few microseconds of arithmetic."""
    generator = np.random.default_rng(0)
    sizes, nodes, weights, last = [64, 256, 256, 10], [], [], "x"
    for layer, (before, after) in enumerate(pairwise(sizes)):
        values = generator.standard_normal((before, after)).astype(np.float32) / np.sqrt(before)
        weights.append(numpy_helper.from_array(values.astype(np.float32), f"w{layer}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{layer}"], [f"h{layer}"]))
        nodes.append(helper.make_node("Relu", [f"h{layer}"], [f"r{layer}"]))
        last = f"r{layer}"
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, ["batch", 10])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    path = repository / "mlp/1/model.onnx"
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(path))
