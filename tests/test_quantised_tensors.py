"""The table of quantised tensors: scale, zero point, range and error, against values calculated by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from factory_fixtures import Built
from onnx import numpy_helper
from quantised_models import given, mlp_weights, write_mlp
from recipe_fixtures import built, ingredients, product_graph

from variants.data import Samples
from variants.model_config import ModelConfig
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import Product


def table(product: Product) -> dict[str, dict[str, Any]]:
    """The rows by tensor."""
    rows = product.findings["tensors"]
    assert isinstance(rows, list)
    return {row["tensor"]: row for row in rows}


def relative(values: Any, rounded: Any) -> float:
    """The RMS of a difference over the RMS of the values."""
    return float(np.sqrt(np.mean((values - rounded) ** 2) / np.mean(values**2)))


def test_every_tensor_that_has_bytes_is_in_the_table(tmp_path: Path) -> None:
    """Weights and biases once each, and each activation that is read from bytes; all of it is plain JSON."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    product = quantize_static(given(graph, tmp_path), QuantizeStatic())
    kinds = {name: row["kind"] for name, row in table(product).items()}
    assert kinds == {
        **{f"{layer}.weight": "weight" for layer in (0, 2, 4)},
        **{f"{layer}.bias": "bias" for layer in (0, 2, 4)},
        **dict.fromkeys(("x", "a2", "a4"), "activation"),
    }
    rows = product.findings["tensors"]
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows


def test_a_weight_has_its_channels_scales_and_its_exact_error(tmp_path: Path) -> None:
    """Scales are each output's largest magnitude over 127; the error is that of rounding to them."""
    graph = write_mlp(tmp_path / "g.onnx", mlp_weights())
    row = table(quantize_static(given(graph, tmp_path), QuantizeStatic()))["0.weight"]
    weight = mlp_weights()["0.weight"]
    scale = np.abs(weight).max(axis=1, keepdims=True) / 127
    assert row["scale"] == pytest.approx([scale.min(), scale.max()], rel=1e-5)
    assert row["zero_point"] == 0
    rounded = np.rint(weight / scale) * scale
    assert (row["low"], row["high"]) == (pytest.approx(rounded.min(), rel=1e-5), pytest.approx(rounded.max(), rel=1e-5))
    assert row["error"] == pytest.approx(relative(weight, rounded), rel=1e-3)


def test_an_activation_has_one_scale_and_the_error_that_samples_show(tmp_path: Path) -> None:
    """Scale and zero point span what calibration showed; the error is measured on the samples themselves."""
    x = np.random.default_rng(0).normal(1, 1, (32, 8)).astype(np.float32)
    graph = product_graph(tmp_path / "g.onnx", np.eye(8))
    row = table(quantize_static(ingredients(graph, tmp_path, Samples({"x": x})), QuantizeStatic()))["x"]
    scale = (x.max() - x.min()) / 255
    zero_point = round(float(-x.min() / scale))
    assert row["scale"] == pytest.approx(scale, rel=1e-5)
    assert row["zero_point"] == zero_point
    assert (row["low"], row["high"]) == pytest.approx((-zero_point * scale, (255 - zero_point) * scale), rel=1e-5)
    rounded = (np.clip(np.rint(x / scale) + zero_point, 0, 255) - zero_point) * scale
    assert row["error"] == pytest.approx(relative(x, rounded), rel=1e-3)


def test_clipping_shows_in_the_error(tmp_path: Path) -> None:
    """What lies beyond the range counts in full: a sample that calibration did not weigh costs what it loses."""
    x = np.concatenate([np.full((20_000, 8), 1, np.float32), np.full((1, 8), 50, np.float32)])
    graph = product_graph(tmp_path / "g.onnx", np.eye(8))
    config = ModelConfig.model_validate({"calibration": {"data": "c.npz", "samples": len(x)}})
    given_here = ingredients(graph, tmp_path, Samples({"x": x}), config=config)
    row = table(quantize_static(given_here, QuantizeStatic(calibrate="percentile")))["x"]
    assert row["high"] == pytest.approx(1, rel=0.05)
    assert row["error"] > 0.9


def test_the_card_of_a_real_build_has_the_table(built_digits: Built) -> None:
    """Every QuantizeLinear and every constant DequantizeLinear of the artefact has a row on the card."""
    file = built(built_digits, "int8-static")
    graph = onnx.load(file).graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    rows = json.loads((file.parent / "card.json").read_text())["findings"]["tensors"]
    read = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in constants]
    quantised = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert len(rows) == len(read) + len(quantised)
    scales = sorted(float(constants[node.input[1]]) for node in quantised)
    assert sorted(row["scale"] for row in rows if row["kind"] == "activation") == pytest.approx(scales, rel=1e-5)
    assert all(0 < row["error"] < 0.05 for row in rows if row["kind"] != "bias")
