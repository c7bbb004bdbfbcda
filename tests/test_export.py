"""From what a person brings to the reference graph: names, faithfulness, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import TensorProto, helper
from recipe_fixtures import ingredients, run

from variants.data import Samples
from variants.export import export_graph
from variants.recipes import RECIPES
from variants.recipes.chain import Step, run_chain
from variants.repository import ModelFolder, RepositoryError
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source, importable, load_module, open_source

Array = np.ndarray[Any, Any]


class Two(torch.nn.Module):
    """Two inputs, two named outputs, one of them named like an operator inside."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.linear = torch.nn.Embedding(10, 4), torch.nn.Linear(3, 4)

    def forward(self, ids: torch.Tensor, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"embedding": self.table(ids) + self.linear(x), "linear": self.linear(x)}


def test_several_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    """The graph's tensors are named as `forward` and its dictionary say, whatever order the data come in."""
    example: Mapping[str, Array] = {"x": np.ones((4, 3), np.float32), "ids": np.arange(4)}
    export_graph(Two().eval(), example, tmp_path / "g.onnx", batched=True)
    signature = read_signature(tmp_path / "g.onnx")
    assert [(spec.name, spec.datatype) for spec in signature.inputs] == [("ids", "INT64"), ("x", "FP32")]
    assert [spec.name for spec in signature.outputs] == ["embedding", "linear"]
    assert signature.batch_axis


class Mean(torch.nn.Module):
    """Steps [batch, length, 3] with a mask [batch, length] -> their weighted mean through a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weighted = self.linear(x) * mask[..., None]
        mean: torch.Tensor = weighted.sum(1) / mask.sum(1, keepdim=True)
        return mean


def test_declared_axes_vary_beside_the_batch(tmp_path: Path) -> None:
    """A graph exported at length 6 answers like its module at lengths 6, 4 and 9."""
    module, generator = Mean().eval(), np.random.default_rng(0)

    def inputs(length: int) -> dict[str, Array]:
        x, mask = generator.normal(size=(9, length, 3)), np.ones((9, length))
        return {"x": x.astype(np.float32), "mask": mask.astype(np.float32)}

    axes = {"x": {1: "length"}, "mask": {1: "length"}}
    export_graph(module, inputs(6), tmp_path / "g.onnx", batched=True, axes=axes)
    assert [spec.shape for spec in read_signature(tmp_path / "g.onnx").inputs] == [(-1, -1, 3), (-1, -1)]
    session = onnxruntime.InferenceSession(tmp_path / "g.onnx", providers=["CPUExecutionProvider"])
    for length in (6, 4, 9):
        x = inputs(length)
        want = module(*(torch.from_numpy(array) for array in x.values())).detach().numpy()
        assert np.allclose(session.run(None, x)[0], want, atol=1e-5)


def test_a_chain_keeps_declared_axes(tmp_path: Path) -> None:
    """What is pruned twice still answers at lengths that it was never traced with."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4)).eval()
    axes, graph = {"input": {1: "length"}}, tmp_path / "g.onnx"
    samples = Samples({"input": np.random.default_rng(0).normal(size=(9, 6, 3)).astype(np.float32)})
    export_graph(module, samples.inputs, graph, batched=True, axes=axes)
    source = Source(graph, read_signature(graph), 32, module, axes)
    asked = {"prune-channels": {"recover": "none"}, "prune-unstructured": {}}
    steps = [Step(name, RECIPES[name], RECIPES[name].parameters.model_validate(given)) for name, given in asked.items()]
    made = run_chain(steps, ingredients(graph, tmp_path, samples, source=source), {}).files["model.onnx"]
    assert source.signature.fits(read_signature(made))
    assert run(made, input=np.ones((2, 11, 3), np.float32)).shape == (2, 11, 4)


def test_axes_of_an_unknown_input_are_named(tmp_path: Path) -> None:
    """A mistyped input among the dynamic axes is an error that names the nearest one."""
    example = {"x": np.ones((9, 6, 3), np.float32), "mask": np.ones((9, 6), np.float32)}
    with pytest.raises(RepositoryError, match="dynamic_axes: 'masks' is no input; did you mean 'mask'"):
        export_graph(Mean().eval(), example, tmp_path / "g.onnx", batched=True, axes={"masks": {1: "length"}})


@pytest.mark.parametrize(
    ("axis", "message"),
    [(7, "input: it has no dimension 7"), (2, "dynamic_axes: at half the length it does not work|cannot")],
)
def test_axes_that_cannot_vary_are_named(tmp_path: Path, axis: int, message: str) -> None:
    """A dimension that is not there, or that the network's weights fix, is one clear line."""
    example = {"x": np.ones((9, 6, 4), np.float32)}
    with pytest.raises(RepositoryError, match=message) as caught:
        export_graph(
            torch.nn.Linear(4, 2).eval(),
            {"input": example["x"]},
            tmp_path / "g.onnx",
            batched=True,
            axes={"input": {axis: "width"}},
        )
    assert "\n" not in str(caught.value)


def test_data_must_be_named_as_the_modules_inputs(tmp_path: Path) -> None:
    """A misnamed array is an error that shows the names `forward` has."""
    with pytest.raises(
        RepositoryError, match=r"arrays \(image\) must be named as the inputs of Two.forward \(ids, x\)"
    ):
        export_graph(Two(), {"image": np.ones((2, 3))}, tmp_path / "g.onnx", batched=True)


class Unfaithful(torch.nn.Module):
    """A module that behaves otherwise with a batch of nine, which no trace can know."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if torch.onnx.is_in_onnx_export() or len(x) != 9 else x * 3


def test_an_unfaithful_export_is_refused(tmp_path: Path) -> None:
    """The graph is compared with the module at batch sizes 1, 3 and 9 before anything is made from it."""
    with pytest.raises(RepositoryError, match=r"differs from it at batch 9|cannot be exported"):
        export_graph(Unfaithful(), {"x": np.ones((9, 2), np.float32)}, tmp_path / "g.onnx", batched=True)


class NotANumber(torch.nn.Module):
    """A module whose export answers NaN, which no comparison with a tolerance calls too large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * float("nan") if torch.onnx.is_in_onnx_export() else x * 2


def test_an_export_that_answers_nan_is_refused(tmp_path: Path) -> None:
    """NaN is a difference."""
    with pytest.raises(RepositoryError, match="differs from it at batch 1"):
        export_graph(NotANumber(), {"x": np.ones((9, 2), np.float32)}, tmp_path / "g.onnx", batched=True)


def test_two_models_may_both_have_a_module_of_the_same_name(tmp_path: Path) -> None:
    """Each model's `network` is its own, although Python caches modules by name."""
    widths = {}
    for name, width in (("a", 3), ("b", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "network.py").write_text(f"from torch import nn\ndef make(): return nn.Linear(2, {width})\n")
        safetensors.torch.save_model(torch.nn.Linear(2, width), str(tmp_path / name / "w.safetensors"))
        with importable(tmp_path / name):
            module = load_module("network:make", tmp_path / name / "w.safetensors")
        widths[name] = module(torch.ones(1, 2)).shape[1]
    assert widths == {"a": 3, "b": 5}


def test_weights_that_do_not_fit_are_one_clear_line(tmp_path: Path) -> None:
    """Missing and surplus tensors are named; so is a factory that fails."""
    (tmp_path / "network.py").write_text("from torch import nn\ndef make(): return nn.Linear(2, 3)\n")
    safetensors.torch.save_file({"other": torch.ones(1)}, tmp_path / "w.safetensors")
    does_not_fit = r"does not fit source.module 'network:make'.*other"
    with importable(tmp_path), pytest.raises(RepositoryError, match=does_not_fit) as caught:
        load_module("network:make", tmp_path / "w.safetensors")
    assert "\n" not in str(caught.value)
    failed = r"source.module 'network:made' failed: AttributeError"
    with importable(tmp_path), pytest.raises(RepositoryError, match=failed):
        load_module("network:made", tmp_path / "w.safetensors")


def onnx_model(folder: Path, graph: onnx.ModelProto) -> ModelFolder:
    """A model folder with this graph as its bare source."""
    (folder / "m/1").mkdir(parents=True)
    onnx.save(graph, folder / "m/1/model.onnx")
    return ModelFolder(folder / "m")


def test_a_custom_operator_is_refused(tmp_path: Path) -> None:
    """A graph that needs foreign native code is no source."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    graph = helper.make_graph([helper.make_node("Evil", ["x"], ["y"], domain="my.ops")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("my.ops", 1)])
    with pytest.raises(RepositoryError, match="custom operator"):
        open_source(onnx_model(tmp_path, model).newest(), None, tmp_path)


@pytest.mark.parametrize(("first", "max_batch"), [(1, 1), ("batch", 32)])
def test_the_batch_comes_from_the_graph(tmp_path: Path, first: int | str, max_batch: int) -> None:
    """A fixed batch of one is served one by one; a variable one up to the configured size."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [first, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    source = open_source(onnx_model(tmp_path, model).newest(), None, tmp_path)
    assert source.max_batch == max_batch
    assert source.sample_specs[0].shape == (2,)


def test_a_fixed_batch_of_many_needs_a_word(tmp_path: Path) -> None:
    """A graph fixed to eight rows cannot be batched, and the error says what to write."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [8, 2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    folder = onnx_model(tmp_path, model)
    with pytest.raises(RepositoryError, match="max_batch_size: 0"):
        open_source(folder.newest(), None, tmp_path)
    (folder.path / "model.yaml").write_text("batching: {max_batch_size: 0}")
    assert open_source(ModelFolder(folder.path).newest(), None, tmp_path).sample_specs[0].shape == (8, 2)
