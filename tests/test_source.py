"""What a source must be, and that it leaves nothing behind: no foreign module in Python, no path in its graph."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper, numpy_helper

from variants.repository import ModelFolder, RepositoryError
from variants.source import Source, importable, load_module, open_source

EXAMPLE = {"x": np.ones((4, 3, 2), np.float32)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty current folder, after which Python's modules are as before."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = set(sys.modules)
    yield tmp_path / "here"
    for name in set(sys.modules) - before:
        del sys.modules[name]


def torch_model(folder: Path, code: str, weights: torch.nn.Module, yaml: str = "") -> ModelFolder:
    """A model whose `network:make` is this code."""
    (folder / "1").mkdir(parents=True)
    (folder / "network.py").write_text(f"import torch\nfrom torch import nn\n{code}")
    safetensors.torch.save_model(weights, str(folder / "1/w.safetensors"))
    (folder / "model.yaml").write_text(f'source: {{module: "network:make", weights: w.safetensors}}\n{yaml}')
    return ModelFolder(folder)


def opened(model: ModelFolder, work: Path) -> Source:
    """The model's source, traced with three steps of two numbers."""
    work.mkdir()
    with importable(model.path):
        return open_source(model.newest(), EXAMPLE, work)


RECURRENT = """
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.LSTM(2, 4, batch_first=True)
    def forward(self, x):
        steps, (hidden, _) = self.layer(x)
        return ANSWER
def make():
    return Network()
"""


class Recurrent(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LSTM(2, 4, batch_first=True)


def test_every_output_of_a_module_counts_samples_first(tmp_path: Path) -> None:
    """An LSTM's hidden state [1, batch, 4] is refused by name and shape; laid out batch first, it is welcome."""
    bad = torch_model(tmp_path / "bad", RECURRENT.replace("ANSWER", "steps, hidden"), Recurrent())
    with pytest.raises(RepositoryError, match=r"first dimension of every.*output_1 \[1, -1, 4\].*max_batch_size: 0"):
        opened(bad, tmp_path / "w1")
    good = torch_model(tmp_path / "good", RECURRENT.replace("ANSWER", "steps, hidden.transpose(0, 1)"), Recurrent())
    assert opened(good, tmp_path / "w2").max_batch == 32


def test_a_fixed_batch_of_one_has_one_row_in_its_outputs_too(tmp_path: Path) -> None:
    """`x` [1, 2] to `y` [2] would be counted as two samples, so it is refused."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    axis = numpy_helper.from_array(np.array([0], np.int64), "axis")
    graph = helper.make_graph([helper.make_node("Squeeze", ["x", "axis"], ["y"])], "g", [x], [y], [axis])
    (tmp_path / "m/1").mkdir(parents=True)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, tmp_path / "m/1/model.onnx")
    with pytest.raises(RepositoryError, match=r"first dimension of every.*y \[2\]"):
        open_source(ModelFolder(tmp_path / "m").newest(), None, tmp_path)


def test_a_model_moved_elsewhere_gives_the_same_bytes(tmp_path: Path) -> None:
    """The graph quotes neither the user's code nor its path, so that the folder decides nothing."""
    torch.manual_seed(0)
    weights, code = Recurrent(), RECURRENT.replace("ANSWER", "steps")
    graphs = [
        opened(torch_model(tmp_path / name, code, weights), tmp_path / f"work-{name}").graph.read_bytes()
        for name in ("one", "another-place")
    ]
    assert graphs[0] == graphs[1]
    assert b"network.py" not in graphs[0]


def test_a_module_of_the_current_folder_is_forgotten(here: Path, tmp_path: Path) -> None:
    """A model that uses the current folder's `network` does not lend it to the next one, which has its own."""
    code = "def make(): return nn.Sequential(nn.Linear(2, 2), nn.{}())"
    a, b = (
        torch_model(tmp_path / name, code.format("Tanh"), torch.nn.Sequential(torch.nn.Linear(2, 2))) for name in "ab"
    )
    (a.path / "network.py").rename(here / "network.py")
    (here / "network.py").write_text((here / "network.py").read_text().replace("Tanh", "ReLU"))
    found = []
    for model in (a, b):
        with importable(model.path):
            found.append(load_module("network:make", model.path / "1/w.safetensors"))
    assert [str(module).count("ReLU") for module in found] == [1, 0]


def test_an_environment_below_the_current_folder_stays_loaded(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a model imports from a virtual environment there may be native code, which cannot be imported twice."""
    site = here / "venv/site-packages"
    (site / "gearshift_library").mkdir(parents=True)
    (site / "gearshift_library/__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [*sys.path, str(site)])
    (here / "gearshift_helper.py").write_text("import gearshift_library")
    code = "import gearshift_helper\ndef make(): return nn.Linear(2, 2)"
    model = torch_model(tmp_path / "m", code, torch.nn.Linear(2, 2))
    with importable(model.path):
        load_module("network:make", model.path / "1/w.safetensors")
    assert {"gearshift_library", "gearshift_helper", "network"} & set(sys.modules) == {"gearshift_library"}


def test_what_a_module_imports_only_when_it_runs_is_found(here: Path, tmp_path: Path) -> None:
    """A `forward` may import its neighbours, as modules that import each other must."""
    (here / "gearshift_helper.py").write_text("import torch\ndef activate(x): return torch.relu(x)")
    code = (
        "class Late(nn.Linear):\n    def forward(self, x):\n        from gearshift_helper import activate\n"
        "        return activate(super().forward(x))\ndef make(): return Late(2, 2)"
    )
    model = torch_model(tmp_path / "m", code, torch.nn.Linear(2, 2))
    assert opened(model, tmp_path / "work").max_batch > 0
    assert "gearshift_helper" not in sys.modules
