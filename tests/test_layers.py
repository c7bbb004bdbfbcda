"""Layers: which ones are found, under which names, and whose time is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from variants.layer_names import LayerNames
from variants.layers import Event, archive_layers, graph_layers, module_layers, self_times
from variants.measurements import LayerTime
from variants.quiet import without_library_noise
from variants.runtimes.torch_runtime import save_archive

IMAGE = {"input": np.zeros((1, 1, 8, 8), np.float32)}


def by_name(layers: tuple[LayerTime, ...]) -> dict[str, str]:
    """The operator of each layer; the dearest comes first and nothing takes less than no time."""
    times = [layer.time_ns for layer in layers]
    assert times == sorted(times, reverse=True)
    assert min(times) >= 0 < max(times)
    return {layer.name: layer.operator for layer in layers}


def test_a_layers_time_is_its_own() -> None:
    """A loop of 100 with two turns of 30 inside keeps 40; what runs twice is summed; neighbours share nothing."""
    events = [
        Event("turn", "MatMul", 10, 40),
        Event("turn", "MatMul", 40, 70),
        Event("loop", "Loop", 0, 100),
        Event("next", "Add", 100, 105),
    ]
    assert self_times(events) == {("loop", "Loop"): 40, ("turn", "MatMul"): 60, ("next", "Add"): 5}


def test_fused_and_quantised_operators_keep_the_names_of_their_nodes(built_digits: Built) -> None:
    """Every layer with weights of fp32, and every quantised one, is told by the node it has in the artefact."""
    for variant in ("fp32", "int8-static"):
        artefact = built_digits.root / "digits/1/variants" / variant / "model.onnx"
        nodes = {node.name for node in onnx.load(artefact).graph.node if node.op_type in ("Conv", "Gemm")}
        assert len(nodes) == 4
        found = by_name(graph_layers(artefact, IMAGE, budget_s=0))
        kinds = {found[name] for name in nodes}
        assert kinds <= {"Conv", "FusedConv", "Gemm", "FusedGemm", "QLinearConv", "QGemm"}
        assert ("QLinearConv" in kinds) == (variant == "int8-static")


def saved(nodes: list[onnx.NodeProto], weights: dict[str, Any], path: Path) -> Path:
    """A graph from `x` [batch, steps, 16] to `y`."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "steps", 16]) for name in "xy")
    constants = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


X = {"x": np.ones((1, 2, 16), np.float32)}
SQUARE = np.eye(16, dtype=np.float32)


def test_nodes_without_names_get_some(tmp_path: Path) -> None:
    """A fused operator is told by what it makes, a node without a name by its operator and number."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Add", ["a", "b"], ["c"], "my_bias"),
        helper.make_node("Gelu", ["c"], ["d"], "my_gelu"),
        helper.make_node("MatMul", ["d", "w"], ["y"]),
    ]
    path = saved(nodes, {"w": SQUARE, "b": np.ones(16, np.float32)}, tmp_path / "g.onnx")
    found = by_name(graph_layers(path, X, budget_s=0))
    assert found == {"MatMul_0": "MatMul", "my_gelu": "BiasGelu", "MatMul_3": "MatMul"}


def test_the_body_of_a_loop_is_told_apart_from_it(tmp_path: Path) -> None:
    """Two hundred turns are the body's, not the loop's, although the loop lasts as long."""
    onnx.save(models.turns(), tmp_path / "g.onnx")
    layers = {layer.operator: layer for layer in graph_layers(tmp_path / "g.onnx", {"turns": np.array([200])})}
    assert {"Loop", "Mul"} <= set(layers)
    assert layers["Mul"].name == "Mul_0"


def test_what_cannot_be_run_has_no_layers(tmp_path: Path) -> None:
    """Inputs that do not fit, a file that is none and a module that raises are no reason to stop."""
    path = saved([helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": SQUARE}, tmp_path / "g.onnx")
    assert graph_layers(path, {"x": np.ones((1, 2, 3), np.float32)}) == ()
    assert graph_layers(tmp_path / "none.onnx", X) == ()
    assert archive_layers(tmp_path / "none.pt2", X) == ()
    assert module_layers(nn.Linear(3, 3), {"input": np.ones((1, 16), np.float32)}) == ()


class Block(nn.Module):
    """Two layers, one of them used twice, and work between them that belongs to no module."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Inner twice, head once."""
        return torch.as_tensor(self.head(self.inner(self.inner(x)).relu() * 2))


def test_the_modules_of_a_network_are_its_layers() -> None:
    """Each module under its own name and class; afterwards no hook is left and torch has its threads again."""
    module, threads = Block(), torch.get_num_threads()
    found = by_name(module_layers(module, X, budget_s=0))
    members = {"inner.0": "Linear", "inner.1": "Tanh", "inner": "Sequential", "head": "Linear"}
    assert found == {**members, "Block": "Block"}
    assert torch.get_num_threads() == threads
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_an_archive_still_knows_its_modules(tmp_path: Path) -> None:
    """What was exported is told by the names and classes of the modules that it came from."""
    with without_library_noise():
        program = torch.export.export(Block().eval(), (torch.ones(1, 2, 16),))
        save_archive(program, tmp_path / "model.pt2", ["y"])
    found = by_name(archive_layers(tmp_path / "model.pt2", X, budget_s=0))
    assert found.items() >= {"inner.0": "Linear", "inner.1": "Tanh", "head": "Linear"}.items()


def test_the_middle_half_of_the_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of eight runs the two fastest and the two slowest say nothing."""
    from variants import layers

    runs = [[Event("a", "Add", 0, time)] for time in (1000, 40, 41, 0, 5000, 42, 43, 1)]
    assert layers._summary(runs) == (LayerTime("a", "Add", round((40 + 41 + 42 + 43) / 4)),)


def test_a_name_is_found_wherever_it_stands_whole() -> None:
    """After a longer name that begins alike, too; as a piece of one it is not found."""
    graph = helper.make_graph([helper.make_node("Conv", ["x", "w"], ["y"], name="Conv_9")], "g", [], [])
    names = LayerNames(graph, graph)
    assert names.of("Conv_93_Conv_9", "FusedConv") == "Conv_9"
    assert names.of("Conv_93", "FusedConv") == "Conv_93"
