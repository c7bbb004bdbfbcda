"""ONNX graphs as recipes begin and end with them: constants folded before, proven sound after.

Rules of this file: whatever a tool does to a graph, its inputs and outputs stay those of the source, the batch
dimension included; a changed graph is loaded and run before anyone sees it.
"""

from __future__ import annotations

from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

import onnx

from variants.measure import synthetic_inputs
from variants.quiet import without_library_noise
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.runtimes.onnx_signature import nested_graphs, read_signature


def folded(graph: Path, work: Path, *, least_opset: int = 0) -> Path:
    """The graph with computed constants as plain weights, annotated with shapes, in at least that opset.

    Exporters leave weights behind Constant, Identity and Transpose nodes. Symbolic shape inference fails on some real
    models, so it may be left out. Raises RecipeRejected when the opset cannot be raised.
    """
    raised = work / "raised.onnx"
    model = at_least_opset(onnx.load(graph), least_opset)
    for node in model.graph.node:
        while node.input and not node.input[-1]:
            node.input.pop()  # an absent last input may be written as an empty name, which quantisers look up
    onnx.save(model, raised)
    with without_library_noise():
        from onnxruntime.quantization.shape_inference import quant_pre_process

        for skip_symbolic_shape in (False, True):
            target = work / f"folded-{skip_symbolic_shape}.onnx"
            try:
                quant_pre_process(raised, target, skip_symbolic_shape=skip_symbolic_shape)
            except Exception:  # noqa: S112 - any failure means: try with less, at last with the graph as it is
                continue
            return target
    return raised


def at_least_opset(model: onnx.ModelProto, least: int) -> onnx.ModelProto:
    """The model in an opset that has the operators we write. Raises RecipeRejected."""
    version = max((opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")), default=0)
    if version >= least:
        return model
    try:
        return onnx.version_converter.convert_version(model, least)
    except Exception as error:
        raise RecipeRejected(f"opset {version} cannot be raised to {least}: {error}") from error


def reads(node: onnx.NodeProto) -> set[str]:
    """The tensors that a node needs, those that its branches or its body read included."""
    inner = [graph for each in node.attribute if each.HasField("g") for graph in nested_graphs(each.g)]
    names = {name for graph in inner for each in graph.node for name in each.input}
    return {*node.input, *names, *(value.name for graph in inner for value in graph.output)}


def put_in_order(graph: onnx.GraphProto) -> None:
    """Let every node follow what it reads."""
    nodes = list(graph.node)
    makers = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order = TopologicalSorter({i: {makers[n] for n in reads(node) if n in makers} for i, node in enumerate(nodes)})
    del graph.node[:]
    graph.node.extend(nodes[index] for index in order.static_order())


def finished(ingredients: Ingredients, model: onnx.ModelProto, name: str) -> Path:
    """Write the changed model with the source's own inputs and outputs, and prove it sound. Raises RecipeRejected."""
    target = ingredients.work / name
    source = onnx.load(ingredients.source.graph).graph
    given = {value.name: value for value in (*source.input, *source.output)}
    for value in (*model.graph.input, *model.graph.output):
        if value.name in given and given[value.name].type.tensor_type.HasField("shape"):
            value.CopyFrom(given[value.name])  # shape inference renames batch symbols: "floor(1.0*batch)"
    _unlist_weights(model)
    onnx.save(model, target)
    _prove_sound(ingredients, target)
    return target


def _unlist_weights(model: onnx.ModelProto) -> None:
    """Raise a file from before IR 4, where each weight had to be an input too; such weights count as no constants."""
    if model.ir_version >= 4:
        return
    model.ir_version, weights = 4, {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    del model.graph.input[:]
    model.graph.input.extend(inputs)


def _prove_sound(ingredients: Ingredients, graph: Path) -> None:
    """Check and load what was made, compare its tensors with the source's and run one sample. Raises RecipeRejected."""
    source = ingredients.source
    try:
        found = read_signature(graph)
        onnx.checker.check_model(str(graph))
        session = _open(graph)
    except Exception as error:  # the runtime's own exceptions share no narrower base
        raise RecipeRejected(f"the changed graph is not sound: {_in_a_line(error)}") from error
    if not source.signature.fits(found):
        raise RecipeRejected("the changed graph takes or gives other tensors than the source")
    inputs = _one_sample(ingredients)
    try:
        session.run(None, inputs)
    except Exception as error:
        if ingredients.example is None and not _runs(source.graph, inputs):
            return  # what we made up fits this model no better before than after
        raise RecipeRejected(f"the changed graph does not run: {_in_a_line(error)}") from error


def _open(graph: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _runs(graph: Path, inputs: dict[str, Any]) -> bool:
    try:
        _open(graph).run(None, inputs)
    except Exception:  # the runtime's own exceptions share no narrower base
        return False
    return True


def _one_sample(ingredients: Ingredients) -> dict[str, Any]:
    """A real sample as the model takes it, or a synthetic one."""
    batched = ingredients.source.max_batch > 0
    if ingredients.example is None:
        return synthetic_inputs(ingredients.source.signature.inputs, 1, batch_axis=batched)
    return {name: array[:1] if batched else array[0, ...] for name, array in ingredients.example.inputs.items()}


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
