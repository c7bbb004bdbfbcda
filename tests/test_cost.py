"""Operations, counted and compared with what a person counts, or torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from factory_fixtures import NETWORK, Built
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import built
from torch.utils.flop_counter import FlopCounterMode

from variants.cost import cost_of, count_flops, count_weights

FLOAT = TensorProto.FLOAT


def test_flops_by_hand_and_by_torch(built_digits: Built) -> None:
    """Two convolutions and two linear layers, two FLOPs per multiply-accumulate; int8 counts alike."""
    by_hand = 2 * (16 * 9 * 64 + 32 * 16 * 9 * 16 + 512 * 64 + 64 * 10)
    scope: dict[str, Any] = {}
    exec(NETWORK, scope)  # noqa: S102 - the fixture's own text
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        scope["convolutional"]().eval()(torch.zeros(1, 1, 8, 8))
    assert counter.get_total_flops() == by_hand
    for variant in ("fp32", "int8-dynamic", "int8-static"):
        assert cost_of(built(built_digits, variant)).flops == by_hand


def graph(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Any], weights: Mapping[str, Any], outputs: Sequence[str]
) -> onnx.GraphProto:
    """A graph of float inputs, of weights given as arrays or as shapes of zeros, and of outputs without a shape."""
    arrays = {name: np.zeros(w, np.float32) if isinstance(w, tuple) else np.asarray(w) for name, w in weights.items()}
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    given = [helper.make_tensor_value_info(name, FLOAT, shape) for name, shape in inputs.items()]
    made = [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs]
    return helper.make_graph(list(nodes), "g", given, made, constants)


def flops(
    nodes: Sequence[onnx.NodeProto], inputs: Mapping[str, Any], weights: Mapping[str, Any], output: str = "y"
) -> int:
    """The FLOPs of a model that is one such graph."""
    return count_flops(model_of(graph(nodes, inputs, weights, [output])))


def model_of(made: onnx.GraphProto) -> onnx.ModelProto:
    """A graph as a model that every runtime here can load."""
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(("operator", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_flops_of_a_recurrent_layer_by_hand(operator: str, gates: int) -> None:
    """`gates`·h·(in+h) multiply-accumulates per step and direction, whichever axis is the batch."""
    by_hand = 2 * 2 * 12 * gates * 16 * (8 + 16)
    weights = {"w": (2, gates * 16, 8), "r": (2, gates * 16, 16)}
    for layout, shape in ((0, [12, "batch", 8]), (1, ["batch", 12, 8])):
        node = helper.make_node(
            operator, ["x", "w", "r"], ["y"], hidden_size=16, direction="bidirectional", layout=layout
        )
        assert flops([node], {"x": shape}, weights) == by_hand


def test_a_quantised_lstm_counts_alike_and_hides_nothing_behind_it() -> None:
    """ONNX Runtime's own operator costs what an LSTM costs, and the layer after it is still counted."""
    names = ["x", "w", "r", "", "", "", "", "", "ws", "wz", "rs", "rz"]
    nodes = [
        helper.make_node("DynamicQuantizeLSTM", names, ["", "h"], hidden_size=16, domain="com.microsoft"),
        helper.make_node("MatMul", ["h", "head"], ["y"]),
    ]
    scales = {"ws": (64,), "wz": (64,), "rs": (64,), "rz": (64,)}
    weights = {"w": np.zeros((1, 8, 64), np.int8), "r": np.zeros((1, 16, 64), np.int8), "head": (16, 5), **scales}
    assert flops(nodes, {"x": [12, "batch", 8]}, weights) == 2 * (12 * 4 * 16 * (8 + 16) + 16 * 5)


def test_shapes_that_the_graph_computes_are_known() -> None:
    """Exporters reshape by arithmetic on shapes; the layers behind such a reshape are counted all the same."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        *(helper.make_node("Gather", ["shape", axis], [f"size {axis}"]) for axis in ("zero", "one", "two", "three")),
        helper.make_node("Mul", ["size two", "size three"], ["product"]),
        helper.make_node("Reshape", ["product", "single"], ["width"]),
        helper.make_node("Concat", ["size zero", "size one", "width"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node("Conv", ["flat", "w"], ["y"]),
    ]
    numbers = {"zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "three": np.array([3])}
    weights = {"w": (5, 12, 3), "single": np.array([-1]), **numbers}
    assert flops(nodes, {"x": ["batch", 12, 2, 4]}, weights) == 2 * (5 * 6) * (12 * 3)


def cell() -> onnx.GraphProto:
    """One step of a recurrent cell: 8 inputs and 16 states to 16 states, with its own weight beside an outer one."""
    nodes = [
        helper.make_node("MatMul", ["x_t", "w"], ["a"]),
        helper.make_node("MatMul", ["h", "r"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["h_next"]),
        helper.make_node("Identity", ["h_next"], ["y_t"]),
    ]
    return graph(nodes, {"h": ["n", 16], "x_t": ["n", 8]}, {"r": (16, 16)}, ["h_next", "y_t"])


@pytest.mark.parametrize(("axis", "shape"), [(0, [12, "batch", 8]), (1, ["batch", 12, 8]), (-2, ["batch", 12, 8])])
def test_the_body_of_a_scan_counts_once_per_step(axis: int, shape: list[Any]) -> None:
    """Twelve steps of a cell are twelve times its products, and the weights inside the body are weights."""
    scan = helper.make_node("Scan", ["start", "x"], ["", "y"], body=cell(), num_scan_inputs=1, scan_input_axes=[axis])
    whole = graph([scan], {"start": ["batch", 16], "x": shape}, {"w": (8, 16)}, ["y"])
    model = model_of(whole)
    assert count_flops(model) == 2 * 12 * (8 * 16 + 16 * 16)
    assert count_weights(model) == 8 * 16 + 16 * 16


def test_a_loop_counts_its_turns_and_an_if_its_dearer_branch() -> None:
    """Seven turns of one product; of two branches the one with more work."""
    turn = graph(
        [helper.make_node("MatMul", ["v", "w"], ["v_next"]), helper.make_node("Identity", ["go"], ["on"])],
        {"i": [], "go": [], "v": ["n", 16]},
        {},
        ["on", "v_next"],
    )
    for value, kind in ((turn.input[0], TensorProto.INT64), (turn.input[1], TensorProto.BOOL)):
        value.type.tensor_type.elem_type = kind
    turn.output[0].type.tensor_type.elem_type = TensorProto.BOOL
    loop = helper.make_node("Loop", ["turns", "", "x"], ["y"], body=turn)
    assert flops([loop], {"x": ["n", 16]}, {"w": (16, 16), "turns": np.array(7)}) == 2 * 7 * 16 * 16
    endless = {"w": (16, 16), "turns": np.array(2**63 - 1)}
    assert flops([loop], {"x": ["n", 16]}, endless) == 2 * 16 * 16, "a `while` runs nobody knows how often"
    branches = {
        name: graph([helper.make_node("MatMul", ["x", weight], ["out"])], {}, {}, ["out"])
        for name, weight in (("then_branch", "w"), ("else_branch", "v"))
    }
    choice = helper.make_node("If", ["condition"], ["y"], **branches)
    weights = {"w": (16, 16), "v": (16, 3), "condition": np.array(True)}
    assert flops([choice], {"x": ["n", 16]}, weights) == 2 * 16 * 16


def test_weights_of_few_bits_count_as_the_products_they_stand_for() -> None:
    """[5, 64] x [64, 32] and on with [32, 7], although the packed weight has another shape."""
    packed = {"q": np.zeros((32, 2, 16), np.uint8), "s": (32, 2), "head": (32, 7)}
    nodes = [
        helper.make_node(
            "MatMulNBits", ["x", "q", "s"], ["h"], domain="com.microsoft", K=64, N=32, bits=4, block_size=32
        ),
        helper.make_node("MatMul", ["h", "head"], ["y"]),
    ]
    assert flops(nodes, {"x": ["batch", 5, 64]}, packed) == 2 * 5 * (64 * 32 + 32 * 7)


def test_attention_counts_both_products() -> None:
    """Ten queries meet twelve keys and twelve values in four heads, laid out in either of the operator's two ways."""
    by_hand = 2 * 4 * 10 * 12 * (16 + 8)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    inputs = {"q": ["batch", 4, 10, 16], "k": ["batch", 4, 12, 16], "v": ["batch", 4, 12, 8]}
    assert flops([node], inputs, {}) == by_hand
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], q_num_heads=4, kv_num_heads=2)
    inputs = {"q": ["batch", 10, 64], "k": ["batch", 12, 32], "v": ["batch", 12, 16]}
    assert flops([node], inputs, {}) == by_hand


@pytest.mark.parametrize("declared", [["n", 8, 32, 32], ["n", 8, "h", "w"], ["n", "c", "h", "w"], None])
def test_what_an_exporter_says_of_an_output_does_not_shrink_the_work(declared: list[Any] | None) -> None:
    """Names in place of an output's sizes are filled in from the inputs; only the batch counts as 1."""
    made = graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 4)], {"x": ["n", 3, 32, 32]}, {"w": (8, 3, 3, 3)}, []
    )
    made.output.append(helper.make_tensor_value_info("y", FLOAT, declared))
    assert count_flops(model_of(made)) == 2 * 8 * 32 * 32 * 27


@pytest.mark.parametrize(
    ("equation", "shapes", "macs"),
    [
        ("bij,jk->bik", [["batch", 10, 64], [64, 32]], 10 * 64 * 32),
        ("...ij, ...jk", [["batch", 4, 10, 64], ["batch", 4, 64, 32]], 4 * 10 * 64 * 32),
        ("b...d,d->b...", [["batch", 5, 6, 7], [7]], 5 * 6 * 7),
        ("i,j,k->ijk", [[3], [4], [5]], 2 * 3 * 4 * 5),
        ("ij->ji", [[3, 4]], 0),
    ],
)
def test_einsum_multiplies_once_per_combination_of_indices(equation: str, shapes: list[Any], macs: int) -> None:
    """The product of the sizes of all indices, for each operand beyond the first."""
    names = [f"x{number}" for number in range(len(shapes))]
    node = helper.make_node("Einsum", names, ["y"], equation=equation)
    assert flops([node], dict(zip(names, shapes, strict=True)), {}) == 2 * macs


@pytest.mark.parametrize(
    ("inputs", "macs"),
    [
        ({"q": ["n", 10, 64], "k": ["n", 10, 64], "v": ["n", 10, 64]}, 2 * 10 * 10 * 64),
        ({"q": ["n", 10, 64], "k": ["n", 12, 64], "v": ["n", 12, 32]}, 10 * 12 * (64 + 32)),
        ({"q": ["n", 10, 64], "k": ["n", 4, 12, 16], "v": ["n", 4, 12, 8]}, 10 * 12 * (64 + 32)),
        ({"q": ["n", 10, 64], "k": ["n", 12, 4, 2, 16]}, 2 * 10 * 12 * 64),
        ({"q": ["n", 10, 4, 3, 16]}, 2 * 10 * 10 * 64),
    ],
)
def test_the_attention_of_onnx_runtime_counts_both_products(inputs: dict[str, list[Any]], macs: int) -> None:
    """Each query meets each key and each value, in all the ways in which it takes them."""
    node = helper.make_node("MultiHeadAttention", list(inputs), ["y"], domain="com.microsoft", num_heads=4)
    assert flops([node], inputs, {}) == 2 * macs
