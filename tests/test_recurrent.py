"""int8 LSTM and GRU: on really trained models, and layer by layer against ONNX Runtime's own in floating point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from factory_fixtures import train
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import Array, ingredients, run
from sklearn.datasets import load_digits
from torch import nn

from variants.cost import cost_of
from variants.data import Samples
from variants.export import export_graph
from variants.recipes.int8.dynamic import QuantizeDynamic, quantize_dynamic
from variants.recipes.int8.ranges import KnownRanges
from variants.recipes.recipe import Product, RecipeRejected
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
STEPS, WIDTH = 7, 5


class Reader(nn.Module):
    """Two recurrent layers over the rows of a digit."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.layers = getattr(nn, kind)(8, 24, 2, batch_first=True)
        self.classify = nn.Linear(8 * 24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.classify(self.layers(x)[0].flatten(1))
        return logits


@pytest.fixture(scope="module", params=["LSTM", "GRU"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Samples, Samples]:
    """A trained reader as ONNX, samples to calibrate it with, and others."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    x, labels = (data.images / 16).astype(np.float32)[order], data.target.astype(np.int64)[order]
    module = Reader(request.param)
    train(module, torch.from_numpy(x[:1000]), torch.from_numpy(labels[:1000]), 7)
    graph = tmp_path_factory.mktemp("reader") / "g.onnx"
    export_graph(module, {"x": x[:9]}, graph, batched=True)
    return graph, Samples({"x": x[1000:1100]}), Samples({"x": x[1100:]}, labels[1100:])


def test_a_trained_recurrent_network_in_int8(reader: tuple[Path, Samples, Samples], tmp_path: Path) -> None:
    """As accurate as in fp32, and a digit's answer is the same to the bit alone or among others."""
    graph, calibration, held_out = reader
    made = quantize_dynamic(ingredients(graph, tmp_path, calibration), QuantizeDynamic())
    assert (made.facts["quantised_layers"], made.facts["float_layers"], made.facts["batch_invariant"]) == (3, 0, True)
    int8, x = made.files["model.onnx"], held_out.inputs["x"]
    assert not {"LSTM", "GRU"} & {node.op_type for node in onnx.load(int8).graph.node}
    assert cost_of(int8).size_bytes < 0.6 * cost_of(graph).size_bytes
    wanted, together = run(graph, x=x), run(int8, x=x)
    rights = [np.mean(answers.argmax(1) == held_out.target) for answers in (wanted, together)]
    assert rights[0] > 0.85
    assert rights[1] > rights[0] - 0.01
    alone = np.concatenate([run(int8, x=x[i : i + 1]) for i in range(30)])
    assert np.array_equal(alone, together[:30])


def layer_graph(path: Path, kind: str, *, hidden: int = 6, scale: float = 1.0, **more: Any) -> Path:
    """One layer with random weights: x [steps, batch, width] -> every output; further inputs by their position."""
    attributes = {"hidden_size": hidden} | {name: v for name, v in more.items() if name not in ("inputs", "biases")}
    directions = 2 if attributes.get("direction") == "bidirectional" else 1
    generator, rows = np.random.default_rng(0), GATES[kind] * hidden
    shapes = {"W": (directions, rows, WIDTH), "R": (directions, rows, hidden), "B": (directions, 2 * rows)}
    if not more.get("biases", True):
        del shapes["B"]
    constants = {n: generator.normal(size=s, scale=scale / hidden**0.5).astype(np.float32) for n, s in shapes.items()}
    names = ["x", "W", "R", "B" if "B" in shapes else ""]
    given: dict[int, tuple[str, Array, bool]] = more.get("inputs", {})
    for position, (name, value, is_input) in given.items():
        names += [""] * (position + 1 - len(names))
        names[position] = name
        if not is_input:
            constants[name] = value
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [STEPS, "batch", WIDTH])]
    values += [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), ["batch"])
        for name, value, is_input in given.values() if is_input
    ]  # fmt: skip
    outputs = ["Y", "Y_h", "Y_c"][: 3 if kind == "LSTM" else 2]
    node = helper.make_node(kind, names, outputs, "layer", **attributes)
    made = [helper.make_tensor_value_info(outputs[0], TensorProto.FLOAT, [STEPS, directions, "batch", hidden])]
    made += [helper.make_tensor_value_info(n, TensorProto.FLOAT, [directions, "batch", hidden]) for n in outputs[1:]]
    tensors = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", values, made, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def inputs(batch: int, scale: float = 1.0) -> Array:
    """Sequences [steps, batch, width] within ±2."""
    return (scale * np.random.default_rng(1).normal(size=(STEPS, batch, WIDTH))).clip(-2, 2).astype(np.float32)


def answers(graph: Path, **given: Array) -> list[Array]:
    """All outputs."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return [np.asarray(output) for output in session.run(None, given)]


def quantised(graph: Path, work: Path, *, calibrated: bool = True) -> Product:
    """The layer in int8; calibration data reach from -2 to 2."""
    ends = Samples({"x": np.stack([np.full((STEPS, 1, WIDTH), value, np.float32) for value in (-2, 2)])})
    source = Source(graph, read_signature(graph), 0)  # the batch is not in front
    given = ingredients(graph, work, ends if calibrated else None, source=source)
    return quantize_dynamic(given, QuantizeDynamic())


LAYERS: list[dict[str, Any]] = [
    {"kind": "LSTM"},
    {"kind": "LSTM", "direction": "reverse"},
    {"kind": "LSTM", "direction": "bidirectional", "biases": False},
    {"kind": "LSTM", "clip": 0.5},
    {"kind": "LSTM", "scale": 20.0},  # saturated units are as large as the pinned ones
    {"kind": "GRU", "linear_before_reset": 1},
    {"kind": "GRU", "linear_before_reset": 1, "direction": "reverse"},
    {"kind": "GRU", "linear_before_reset": 1, "direction": "bidirectional"},
    {"kind": "GRU", "linear_before_reset": 1, "biases": False},
    {"kind": "GRU", "linear_before_reset": 1, "scale": 20.0},
]


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if "scale" not in layer], ids=str)
def test_a_layer_in_int8_is_near_the_layer(tmp_path: Path, layer: dict[str, Any]) -> None:
    """Every output, in every direction, is what ONNX Runtime's own layer gives, up to the error of 8 bits."""
    graph = layer_graph(tmp_path / "g.onnx", **layer)
    made = quantised(graph, tmp_path).files["model.onnx"]
    wanted, got = answers(graph, x=inputs(4)), answers(made, x=inputs(4))
    assert [array.shape for array in wanted] == [array.shape for array in got]
    for one, other in zip(wanted, got, strict=True):
        assert 0 < np.abs(one - other).max() < 0.06


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_no_batch_mate_changes_a_layers_answer(tmp_path: Path, layer: dict[str, Any]) -> None:
    """A sample gets the same states to the bit alone, among others, and beside one that is a million times as loud."""
    graph = layer_graph(tmp_path / "g.onnx", **layer)
    made = quantised(graph, tmp_path).files["model.onnx"]
    x = inputs(4, scale=0.1)
    loud = np.concatenate([x, 1e6 * x[:, :1]], axis=1)
    together, beside = answers(made, x=x), answers(made, x=loud)
    for sample in range(4):
        alone = answers(made, x=x[:, sample : sample + 1])
        for one, many, more in zip(alone, together, beside, strict=True):
            assert np.array_equal(one[..., 0, :], many[..., sample, :])
            assert np.array_equal(one[..., 0, :], more[..., sample, :])


def test_what_leaves_the_calibrated_range_is_clipped_to_it(tmp_path: Path) -> None:
    """An LSTM's input beyond what calibration showed counts as the range's end."""
    made = quantised(layer_graph(tmp_path / "g.onnx", "LSTM"), tmp_path)
    assert made.findings["input_ranges"] == {"x": [-2.0, 2.0]}
    wild, ends = (np.full((STEPS, 1, WIDTH), value, np.float32) for value in (50, 2))
    assert np.array_equal(run(made.files["model.onnx"], x=wild), run(made.files["model.onnx"], x=ends))


def test_sequences_of_an_lstm_may_differ_in_length(tmp_path: Path) -> None:
    """After its end, a sequence's states are zero, and its last state is that of its last step."""
    lengths = np.array([2, 7, 4], np.int32)
    graph = layer_graph(tmp_path / "g.onnx", "LSTM", inputs={4: ("lengths", lengths, True)})
    source = Source(graph, read_signature(graph), 0)
    samples = Samples({"x": np.stack([2 * np.sign(inputs(3))] * 2), "lengths": np.stack([lengths] * 2)})
    made = quantize_dynamic(ingredients(graph, tmp_path, samples, source=source), QuantizeDynamic()).files["model.onnx"]
    wanted, got = (answers(each, x=inputs(3), lengths=lengths) for each in (graph, made))
    for one, other in zip(wanted, got, strict=True):
        np.testing.assert_allclose(other, one, atol=0.06)
    assert not got[0][2:, 0, 0].any()


def test_an_lstm_of_unknown_range_needs_calibration_data(tmp_path: Path) -> None:
    """Without them it stays in floating point; the reason says what to add. A GRU scales its input by itself."""
    with pytest.raises(RecipeRejected, match=r"the range of its input is not known; add `calibration:` to model.yaml"):
        quantised(layer_graph(tmp_path / "g.onnx", "LSTM"), tmp_path, calibrated=False)
    graph = layer_graph(tmp_path / "g.onnx", "GRU", linear_before_reset=1)
    assert quantised(graph, tmp_path, calibrated=False).facts["quantised_layers"] == 1


@pytest.mark.parametrize("value", [0, np.nan])
def test_calibration_data_without_a_range_leave_an_lstm_in_floats(tmp_path: Path, value: float) -> None:
    """Nothing but zeros or NaN says nothing of how far inputs reach."""
    graph = layer_graph(tmp_path / "g.onnx", "LSTM")
    empty = Samples({"x": np.full((2, STEPS, 1, WIDTH), value, np.float32)})
    given = ingredients(graph, tmp_path, empty, source=Source(graph, read_signature(graph), 0))
    with pytest.raises(RecipeRejected, match="no range of its input"):
        quantize_dynamic(given, QuantizeDynamic())


STATE = np.full((1, 3, 6), 0.5, np.float32)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"kind": "RNN"}, "RNN has no int8 form"),
        ({"kind": "LSTM", "activations": ["Sigmoid", "Relu", "Tanh"]}, "not the usual ones"),
        ({"kind": "LSTM", "input_forget": 1}, "not the usual ones"),
        ({"kind": "LSTM", "inputs": {7: ("P", np.ones((1, 18), np.float32), False)}}, "not the usual ones"),
        ({"kind": "LSTM", "inputs": {5: ("h", STATE, False)}}, "initial state"),
        ({"kind": "LSTM", "inputs": {6: ("c", STATE, False)}}, "initial state"),
        ({"kind": "GRU"}, "reset gate comes before the product"),
        ({"kind": "GRU", "linear_before_reset": 1, "clip": 0.5}, "clips"),
        ({"kind": "GRU", "linear_before_reset": 1, "inputs": {4: ("n", np.array([1]), False)}}, "differ in length"),
        ({"kind": "GRU", "linear_before_reset": 1, "inputs": {5: ("h", STATE, False)}}, "initial state"),
    ],
)
def test_what_is_rare_stays_in_floating_point(tmp_path: Path, layer: dict[str, Any], reason: str) -> None:
    """A layer that the rewriting does not cover is left alone, and the reason is told."""
    with pytest.raises(RecipeRejected, match=reason):
        quantised(layer_graph(tmp_path / "g.onnx", **layer), tmp_path)


def test_initial_states_that_are_zero_do_no_harm(tmp_path: Path) -> None:
    """Exporters write zeros out, as constants or as an Expand: the layer is quantised all the same."""
    zeros = {5: ("h", 0 * STATE, False), 6: ("c", 0 * STATE, False)}
    graph = layer_graph(tmp_path / "g.onnx", "LSTM", inputs=zeros)
    made = quantised(graph, tmp_path).files["model.onnx"]
    for one, other in zip(answers(graph, x=inputs(3)), answers(made, x=inputs(3)), strict=True):
        np.testing.assert_allclose(other, one, atol=0.06)


def test_a_narrow_layer_beside_a_wide_one_is_left_alone(tmp_path: Path) -> None:
    """Below some width int8 costs more than it saves: only the wide layer is quantised."""
    wide, narrow = (onnx.load(layer_graph(tmp_path / "g.onnx", "LSTM", hidden=n)).graph for n in (128, 6))
    both = onnx.compose.add_prefix_graph(wide, "wide_")
    both.node.extend(narrow.node)
    both.node[1].input[0] = both.input[0].name
    both.output.extend(narrow.output)
    both.initializer.extend(narrow.initializer)
    onnx.save(helper.make_model(both, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "g.onnx")
    samples = Samples({"wide_x": inputs(1)[None]})
    source = Source(tmp_path / "g.onnx", read_signature(tmp_path / "g.onnx"), 0)
    made = quantize_dynamic(ingredients(tmp_path / "g.onnx", tmp_path, samples, source=source), QuantizeDynamic())
    assert (made.facts["quantised_layers"], made.facts["float_layers"]) == (1, 1)
    operators = [node.op_type for node in onnx.load(made.files["model.onnx"]).graph.node]
    assert (operators.count("LSTM"), operators.count("DynamicQuantizeLSTM")) == (1, 1)


def test_ranges_are_known_from_what_makes_a_tensor() -> None:
    """Bounded functions, hidden states, constants and what moves values have a range; sums and inputs have none."""
    table = numpy_helper.from_array(np.array([[-3.0, 2.0], [0.5, 1.0]], np.float32), "table")
    weights = [
        numpy_helper.from_array(np.ones(shape, np.float32), name)
        for name, shape in (("W", (1, 8, 2)), ("R", (1, 8, 2)))
    ]
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["embedded"]),
        helper.make_node("LSTM", ["embedded", "W", "R"], ["y", "h", "c"], hidden_size=2),
        helper.make_node("Transpose", ["y"], ["turned"]),
        helper.make_node("Concat", ["turned", "embedded"], ["joined"], axis=0),
        helper.make_node("Concat", ["turned", "ids"], ["mixed"], axis=0),
        helper.make_node("Softmax", ["x"], ["shares"]),
        helper.make_node("Add", ["shares", "shares"], ["sum"]),
        helper.make_node("ConstantOfShape", ["ids"], ["zeros"]),
        helper.make_node("GRU", ["x", "W", "R", "", "", "x"], ["gru"], hidden_size=2),
    ]
    known = KnownRanges(helper.make_graph(nodes, "g", [], [], [table, *weights]))
    ranges = {name: known.of(name) for name in ("embedded", "h", "c", "turned", "joined", "shares", "zeros")}
    assert ranges == {
        "embedded": (-3.0, 2.0), "h": (-1.0, 1.0), "c": None, "turned": (-1.0, 1.0), "joined": (-3.0, 2.0),
        "shares": (0.0, 1.0), "zeros": (0.0, 0.0),
    }  # fmt: skip
    assert [known.of(name) for name in ("sum", "mixed", "x", "gru")] == [None] * 4
    assert known.is_zero("zeros")
    assert known.is_zero("")
    assert not known.is_zero("embedded")
