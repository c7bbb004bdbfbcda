"""Operations, counted and compared with what a person counts."""

from __future__ import annotations

import numpy as np
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper
from recipe_fixtures import built

from variants.cost import cost_of, count_flops


def test_flops_by_hand(built_digits: Built) -> None:
    """Two convolutions and two linear layers, two FLOPs per multiply-accumulate; int8 counts alike."""
    by_hand = 2 * (16 * 9 * 64 + 32 * 16 * 9 * 16 + 512 * 64 + 64 * 10)
    for variant in ("fp32", "int8-dynamic", "int8-static"):
        assert cost_of(built(built_digits, variant)).flops == by_hand


def test_flops_of_a_recurrent_layer_by_hand() -> None:
    """An LSTM costs 4·h·(in+h) multiply-accumulates per step and direction."""
    nodes = [helper.make_node("LSTM", ["x", "w", "r"], ["y"], hidden_size=16, direction="bidirectional")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [12, "batch", 8])]
    weights = [
        numpy_helper.from_array(np.zeros((2, 64, 8), np.float32), "w"),
        numpy_helper.from_array(np.zeros((2, 64, 16), np.float32), "r"),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [12, 2, "batch", 16])
    model = helper.make_model(helper.make_graph(nodes, "g", inputs, [y], weights))
    assert count_flops(model) == 2 * 2 * 12 * 4 * 16 * (8 + 16)
