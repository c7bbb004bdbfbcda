"""int8-mixed: which layers stay in floating point, on trained networks with and without a layer that 8 bits harm."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quantised_models import digits, given, mlp_weights, transformer, with_outlier, write_mlp
from recipe_fixtures import product_graph

from variants.recipes.int8.calibration import Activations, Observed
from variants.recipes.int8.mixed import QuantizeMixed, quantize_mixed
from variants.recipes.int8.static import QuantizeStatic, quantize_static
from variants.recipes.recipe import Product, RecipeRejected


def harmed(tmp_path: Path) -> Path:
    """A trained network whose second layer reads one unit three hundred times as large as the others."""
    return write_mlp(tmp_path / "g.onnx", with_outlier(mlp_weights(), 300))


def made(graph: Path, work: Path, parameters: QuantizeMixed | None = None, **more: Any) -> Product:
    """The product, made in a folder of its own."""
    work = work / "mixed"
    work.mkdir()
    return quantize_mixed(given(graph, work, **more), parameters or QuantizeMixed())


def rows(product: Product, name: str) -> list[dict[str, Any]]:
    """A finding that is a list of rows."""
    found = product.findings[name]
    assert isinstance(found, list)
    return found


def test_the_layer_that_8_bits_harm_is_kept(tmp_path: Path) -> None:
    """Static int8 fails the gate; keeping the one most sensitive layer in floating point passes it."""
    graph = harmed(tmp_path)
    static = quantize_static(given(graph, tmp_path), QuantizeStatic())
    product = made(graph, tmp_path)
    trial = given(graph, tmp_path).trial
    assert trial is not None
    assert not trial.judge(static.files["model.onnx"]).passes
    assert trial.judge(product.files["model.onnx"]).passes
    assert product.facts["kept_layers"] == ["second"]
    assert product.facts["quantised_layers"] == 2
    assert [(row["kept"], row["passes"]) for row in rows(product, "mixed")] == [(0, False), (1, True)]


def test_the_scan_names_every_layer_by_the_damage_it_does(tmp_path: Path) -> None:
    """Each layer is quantised alone, and the harmed one does more damage than the others together."""
    scan = rows(made(harmed(tmp_path), tmp_path), "sensitivity")
    assert scan[0]["layer"] == "second"
    assert {row["layer"] for row in scan} == {"first", "second", "third"}
    assert {row["operator"] for row in scan} == {"Gemm"}
    damages = [row["damage"] for row in scan]
    assert damages == sorted(damages, reverse=True)
    assert damages[0] > 5 * sum(damages[1:])


def test_a_kept_layer_reads_what_it_read_before(tmp_path: Path) -> None:
    """Its weights are the source's, and its input is no byte's value although the layer before is quantised."""
    graph = harmed(tmp_path)
    after = onnx.load(made(graph, tmp_path).files["model.onnx"]).graph
    kept = next(node for node in after.node if node.name == "second")
    assert not any(name.endswith("_DequantizeLinear_Output") for name in kept.input)
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.initializer}
    np.testing.assert_array_equal(weights["2.weight"], with_outlier(mlp_weights(), 300)["2.weight"])


def test_a_healthy_network_keeps_nothing(tmp_path: Path) -> None:
    """The smallest number of kept layers is none where static int8 passes already."""
    product = made(write_mlp(tmp_path / "g.onnx", mlp_weights()), tmp_path)
    assert product.facts["kept_layers"] == []
    assert [row["kept"] for row in rows(product, "mixed")] == [0]


def test_where_no_number_passes_the_numbers_are_told(tmp_path: Path) -> None:
    """`most: 0` forbids what the network needs, and the reason says how near it came and which layer does the harm."""
    with pytest.raises(RecipeRejected, match=r"up to 0 of 3 layers .* drop of .* agreement of .* alone are second \("):
        made(harmed(tmp_path), tmp_path, QuantizeMixed(most=0))


def test_a_gate_that_nothing_can_pass_is_told_at_once(tmp_path: Path) -> None:
    """Where even fp32's own answers prove too little, no layer is to blame."""
    with pytest.raises(RecipeRejected, match="not even fp32's own answers"):
        made(harmed(tmp_path), tmp_path, agreement=0.9999)


def test_tuning_data_are_needed(tmp_path: Path) -> None:
    """Without them the reason names what to add."""
    with pytest.raises(RecipeRejected, match=r"add `tuning:` .*`training:` or `calibration:` .*128 samples"):
        made(harmed(tmp_path), tmp_path, trial=None)


def test_a_model_without_static_layers_is_rejected(tmp_path: Path) -> None:
    """A product of two activations is no layer: there is nothing to keep or to quantise."""
    graph = product_graph(tmp_path / "g.onnx", np.eye(64))
    model = onnx.load(graph)
    model.graph.node[0].input[1] = "x"
    model.graph.node[0].op_type = "Mul"
    del model.graph.initializer[:]
    onnx.save(model, graph)
    with pytest.raises(RecipeRejected, match="nothing to quantise statically among Mul"):
        made(graph, tmp_path, drop=0.03)


def test_a_quick_build_doubles_the_number(tmp_path: Path) -> None:
    """It tries 0, 1, 2, 4 … kept layers and the limit itself, where a full build counts."""
    graph = chain(tmp_path / "g.onnx", layers=8)
    shares: list[float] = []
    ingredients = given(graph, tmp_path, quick=True, progress=shares.append)
    with pytest.raises(RecipeRejected, match="up to 6 of 8 layers"):
        quantize_mixed(ingredients, QuantizeMixed(most=6))
    assert len([share for share in shares if share > 0.61]) == len([0, 1, 2, 4, 6])
    assert shares == sorted(shares)


def chain(path: Path, layers: int) -> Path:
    """Products one after the other, each of them badly scaled: 8 bits of the first lose all but one unit."""
    model = onnx.load(product_graph(path, np.eye(64)))
    scale = np.logspace(0, 6, 64, dtype=np.float32)
    del model.graph.node[:], model.graph.initializer[:]
    for layer in range(layers):
        names = ["x" if layer == 0 else f"h{layer}", f"w{layer}"]
        weight = np.diag(scale if layer % 2 == 0 else 1 / scale)
        model.graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{layer}"))
        output = "y" if layer == layers - 1 else f"h{layer + 1}"
        model.graph.node.append(onnx.helper.make_node("MatMul", names, [output], f"layer_{layer}"))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 64
    onnx.save(model, path)
    return path


@pytest.mark.slow
def test_a_transformer_is_scanned_layer_by_layer(tmp_path: Path) -> None:
    """All six products with constant weights of a trained transformer are ranked, attention's own products are not."""
    graph = tmp_path / "g.onnx"
    graph.write_bytes(transformer())
    product = made(graph, tmp_path)
    scan = rows(product, "sensitivity")
    assert sorted(row["operator"] for row in scan) == ["Gemm", "Gemm", "MatMul", "MatMul", "MatMul", "MatMul"]
    assert all(0 < row["damage"] < 0.1 for row in scan)
    assert rows(product, "mixed")[-1]["passes"]


def test_an_onnx_source_needs_no_torch(tmp_path: Path) -> None:
    """Static and mixed int8 are made, tried and told of in a process that cannot import torch."""
    harmed(tmp_path)
    _, calibration, tuning = digits()
    assert tuning.target is not None
    np.savez(tmp_path / "data.npz", c=calibration.inputs["x"], t=tuning.inputs["x"], y=tuning.target)
    script = f"""
import sys; sys.modules["torch"] = None
from pathlib import Path; import numpy as np
from variants.data import Samples; from variants.hardware import Hardware; from variants.model_config import ModelConfig
from variants.recipes.int8.mixed import QuantizeMixed, quantize_mixed; from variants.recipes.recipe import Ingredients
from variants.runtimes.onnx_signature import read_signature; from variants.source import Source
from variants.trial import Trial
work = Path({str(tmp_path)!r}); data = np.load(work / "data.npz"); graph = work / "g.onnx"
gate = dict(max_accuracy_drop=0.03, min_agreement=0.95)
config = ModelConfig.model_validate(dict(task="classification", gate=gate))
calibration, tuning = Samples(dict(x=data["c"])), Samples(dict(x=data["t"]), data["y"])
ingredients = Ingredients(source=Source(graph, read_signature(graph), 32), example=calibration, config=config,
    calibration=calibration, training=None, hardware=Hardware(cores=1, cpu="test"), work=work,
    trial=Trial(graph, tuning, config, 32, 800, 1))
print(quantize_mixed(ingredients, QuantizeMixed()).facts["kept_layers"])
"""
    top = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=top, check=False)
    assert (done.stdout, done.stderr) == ("['second']\n", "")


def test_samples_are_observed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many candidates are tried, the calibration data are observed once for all of them."""
    observed = []
    observe = Activations.observe

    def counted(activations: Activations, *, histograms: bool) -> dict[str, Observed]:
        observed.append(len(activations.samples))
        return observe(activations, histograms=histograms)

    monkeypatch.setattr(Activations, "observe", counted)
    product = made(harmed(tmp_path), tmp_path)
    assert observed == [len(digits()[1])]
    assert len(rows(product, "sensitivity")) == 3
