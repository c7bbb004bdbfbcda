"""What the recipes' tests share: small graphs whose answers are known, and what a recipe is given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from factory_fixtures import Built
from onnx import TensorProto, helper, numpy_helper

from variants.data import Samples
from variants.hardware import Hardware
from variants.model_config import ModelConfig
from variants.recipes.recipe import Ingredients
from variants.runtimes.onnx_signature import read_signature
from variants.source import Source

Array = np.ndarray[Any, Any]
CPU = Hardware(cores=1, cpu="test")


def run(graph: Path, **inputs: Array) -> Array:
    """The first output of an ONNX file on ONNX Runtime."""
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, inputs)[0])


def ingredients(graph: Path, work: Path, samples: Samples | None = None, **more: Any) -> Ingredients:
    """What a recipe gets for an ONNX source with a variable batch."""
    source = more.pop("source", None) or Source(graph, read_signature(graph), 32)
    given: dict[str, Any] = {"calibration": samples, "training": None, "hardware": CPU, "config": ModelConfig()}
    return Ingredients(source=source, example=samples, work=work, **(given | more))


def product_graph(path: Path, weight: Array, bias: Array | None = None, **attributes: Any) -> Path:
    """A graph of one Gemm (with bias) or MatMul: x [batch, k] -> y [batch, n]."""
    opset = attributes.pop("opset", 17)
    names = ["x", "w"] + (["b"] if bias is not None else [])
    node = helper.make_node("Gemm" if bias is not None else "MatMul", names, ["y"], **attributes)
    constants = [numpy_helper.from_array(weight.astype(np.float32), "w")]
    constants += [numpy_helper.from_array(bias.astype(np.float32), "b")] if bias is not None else []
    k, n = weight.shape[::-1] if attributes.get("transB") else weight.shape
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", k])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", n])
    model = helper.make_model(
        helper.make_graph([node], "g", [x], [y], constants), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 9
    onnx.save(model, path)
    return path


HIDING_NODES = ("Constant", "Identity", "Transpose")


def hide_weight(path: Path, operator: str) -> None:
    """Move the weight of a product graph behind a node that an exporter may have left there."""
    model = onnx.load(path)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    hidden = numpy_helper.from_array(np.ascontiguousarray(weight.T if operator == "Transpose" else weight), "hidden")
    del model.graph.initializer[:]
    if operator == "Constant":
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], value=hidden))
    else:
        model.graph.initializer.append(hidden)
        model.graph.node.insert(0, helper.make_node(operator, ["hidden"], ["w"]))
    onnx.save(model, path)


def built(digits: Built, variant: str, file: str = "model.onnx") -> Path:
    """An artefact of the built digits repository."""
    return digits.root / "digits/1/variants" / variant / file


def images(digits: Built, count: int = 60) -> Array:
    """Real evaluation images."""
    with np.load(digits.root / "digits/1/data/evaluation.npz") as data:
        return np.asarray(data["input"][:count])
