"""amp: 16-bit arithmetic between the source's own inputs and outputs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from factory_fixtures import Built
from recipe_fixtures import built, images, ingredients, run

from variants.cost import cost_of
from variants.data import Samples
from variants.export import export_graph
from variants.hardware import CudaDevice, Hardware
from variants.recipes import precision
from variants.recipes.precision import make_amp
from variants.recipes.recipe import NoParameters
from variants.runtimes.onnx_signature import read_signature
from variants.runtimes.torch_runtime import TorchRuntime
from variants.source import Source


def test_amp_keeps_the_tensors_a_client_sends(built_digits: Built) -> None:
    """The bf16 archive takes and gives fp32 with the same names, for any batch, near fp32's answers."""
    session = TorchRuntime().load(built(built_digits, "amp", "model.pt2"), precision="bf16", threads=1, device="cpu")
    signature = read_signature(built(built_digits, "fp32"))
    assert (session.inputs, session.outputs) == (signature.inputs, signature.outputs)
    for batch in (1, 3, 9):
        x = images(built_digits, batch)
        want, got = run(built(built_digits, "fp32"), input=x), session.run({"input": x})[0]
        assert got.dtype == np.float32
        assert 0 < np.abs(want - got).max() < 0.05 * np.abs(want).max()


GPU = Hardware(cores=1, cpu="test", isa=frozenset({"AMX_BF16"}), cuda=(CudaDevice("a GPU"),))


def test_amp_on_a_cuda_host_is_fp16_between_fp32_edges(
    built_digits: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a GPU the graph itself holds fp16 weights, and its inputs and outputs stay fp32."""
    monkeypatch.setattr(precision, "can_use_cuda", lambda: True)
    graph = built(built_digits, "fp32")
    made = make_amp(ingredients(graph, tmp_path, hardware=GPU), NoParameters())
    assert made.precision == "fp16"
    assert read_signature(made.files["model.onnx"]) == read_signature(graph)
    assert cost_of(made.files["model.onnx"]).size_bytes < 0.6 * cost_of(graph).size_bytes


def test_a_gpu_that_no_runtime_can_use_is_none(
    built_digits: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With ONNX Runtime's plain wheel the reference runs on the CPU, so amp is what this CPU computes fast: bf16."""
    monkeypatch.setattr(precision, "can_use_cuda", lambda: False)
    made = make_amp(ingredients(built(built_digits, "fp32"), tmp_path, hardware=GPU), NoParameters())
    assert made.precision == "bf16"


class Pair(NamedTuple):
    logits: torch.Tensor
    sums: torch.Tensor


class Named(torch.nn.Module):
    """A module that returns a named tuple, one of whose tensors has 64 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> Pair:
        logits = self.layer(x)
        return Pair(logits, logits.double().sum(1, keepdim=True))


def test_amp_of_a_module_that_returns_a_named_tuple(tmp_path: Path) -> None:
    """Its archive gives the same tensors in the same order, the 16-bit one widened and the 64-bit one as it is."""
    module, x = Named().eval(), np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    graph = tmp_path / "g.onnx"
    export_graph(module, {"x": x}, graph, batched=True)
    source = Source(graph, read_signature(graph), 32, module)
    made = make_amp(ingredients(graph, tmp_path, Samples({"x": x}), source=source), NoParameters())
    session = TorchRuntime().load(made.files["model.pt2"], precision="bf16", threads=1, device="cpu")
    assert session.outputs == source.signature.outputs
    logits, sums = session.run({"x": x})
    np.testing.assert_allclose(logits, run(graph, x=x), atol=0.05)
    np.testing.assert_allclose(sums[:, 0], logits.sum(1), atol=0.05)
