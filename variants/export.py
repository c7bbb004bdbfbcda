"""A torch module -> an ONNX file with a variable batch, proven to answer alike.

Rules of this file: what is written names its inputs and outputs as the module does, says nothing of where it was made,
and has been compared with the module at several batch sizes before anybody sees it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Array
from variants.model_config import RepositoryError, nearest
from variants.quiet import without_library_noise

if TYPE_CHECKING:
    from torch import nn

CHECKED_BATCHES = (1, 3, 9)
EXPORT_TOLERANCE = 1e-4
"""How far an exported graph may be from its module, relative to the largest answer (or 1)."""

Axes = Mapping[str, Mapping[int, str]]
"""Input name -> dimension -> the name of its size."""


def input_names(module: nn.Module, arrays: Mapping[str, Array]) -> list[str]:
    """The module's inputs in the order of its `forward`; the data must name them alike. Raises RepositoryError."""
    parameters = inspect.signature(module.forward).parameters
    required = [name for name, p in parameters.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    unknown, missing = set(arrays) - set(parameters), set(required) - set(arrays)
    if unknown or missing:
        raise RepositoryError(
            f"the data's arrays ({', '.join(sorted(arrays))}) must be named as the inputs of "
            f"{type(module).__name__}.forward ({', '.join(parameters)})"
        )
    return [name for name in parameters if name in arrays]


def example_tensors(module: nn.Module, example: Mapping[str, Array], count: int, *, batched: bool) -> dict[str, Any]:
    """The first `count` samples as tensors in the order of `forward`, repeated if there are fewer.

    Float64 data is narrowed to float32. Without a batch dimension it is one sample, unstacked.
    """
    import torch

    tensors = {}
    for name in input_names(module, example):
        array = np.resize(example[name], (count, *example[name].shape[1:])) if batched else example[name][0]
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        tensors[name] = torch.from_numpy(np.array(array))
    return tensors


def dynamic_shapes(tensors: Mapping[str, Any], *, batched: bool, axes: Axes) -> dict[str, Any] | None:
    """`dynamic_shapes` for torch.export: dimension 0 of every input is one shared batch, and `axes` vary too.

    Raises RepositoryError for axes of an input that is none, or that it has not.
    """
    import torch

    for unknown in sorted(set(axes) - set(tensors)):
        raise RepositoryError(f"source.dynamic_axes: {unknown!r} is no input; {nearest(unknown, tensors)}")
    shift = 0 if batched else -1  # a model without a batch dimension has what the data have after the first
    for name, varying in axes.items():
        for axis in varying:
            if axis + shift >= tensors[name].ndim:
                raise RepositoryError(f"source.dynamic_axes: {name}: it has no dimension {axis}")
    if not batched and not axes:
        return None
    symbols = {symbol for each in axes.values() for symbol in each.values()}
    dims = {symbol: torch.export.Dim(symbol, min=1) for symbol in symbols}
    batch = {0: torch.export.Dim("batch", min=1)} if batched else {}
    return {name: batch | {axis + shift: dims[s] for axis, s in axes.get(name, {}).items()} for name in tensors}


def output_names(answer: Any) -> list[str]:
    """Names for what a module returns: its own keys for a dictionary, else `output`, or `output_0` and so on."""
    if isinstance(answer, dict):
        return [str(key) for key in answer]
    count = len(answer) if isinstance(answer, (tuple, list)) else 1
    return ["output"] if count == 1 else [f"output_{index}" for index in range(count)]


def export_graph(
    module: nn.Module, example: Mapping[str, Array], graph: Path, *, batched: bool, axes: Axes | None = None
) -> None:
    """Write a module as one ONNX file with a variable batch, and prove that it answers like the module.

    Traced with a batch of 2, because torch.export takes a batch of 1 for a constant. Raises RepositoryError.
    """
    import torch

    tensors = example_tensors(module, example, 2, batched=batched)
    with torch.inference_mode():
        names = output_names(module(*tensors.values()))
    try:
        with without_library_noise():
            program = torch.onnx.export(
                module,
                tuple(tensors.values()),
                input_names=list(tensors),
                dynamic_shapes=dynamic_shapes(tensors, batched=batched, axes=axes or {}),
                dynamo=True,
                verbose=False,
            )
        if program is None:
            raise RepositoryError("torch.onnx.export returned nothing")
        _name_outputs(program.model.graph, names)
        _forget_origin(program.model)
        program.save(graph, external_data=False)
    except RepositoryError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise RepositoryError(f"{type(module).__name__} cannot be exported to ONNX: {first}") from error
    _check_export(module, example, graph, batched=batched)
    if axes:
        try:
            _check_export(module, _halved(example, axes), graph, batched=batched)
        except Exception as error:  # someone's own code runs on sizes that it may not have been meant for
            why = str(error).strip().splitlines()[0]
            raise RepositoryError(f"source.dynamic_axes: at half the length it does not work: {why}") from error


def _halved(example: Mapping[str, Array], axes: Axes) -> Mapping[str, Array]:
    """The example with half the length along each dynamic axis; the same where there is none."""

    def part(array: Array, varying: Mapping[int, str]) -> Array:
        keep = [slice(max(1, size // 2) if axis in varying else size) for axis, size in enumerate(array.shape)]
        return array[tuple(keep)]

    return {name: part(array, axes.get(name, {})) for name, array in example.items()}


def _name_outputs(graph: Any, names: Sequence[str]) -> None:
    """Name the outputs of an exported graph; the exporter itself lets them collide with values inside it."""
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.name in names:
                value.name = f"{value.name}_inner"
    for value, name in zip(graph.outputs, names, strict=True):
        value.name = name


def _forget_origin(model: Any) -> None:
    """Drop the exporter's notes: they quote the user's code with its paths, and would differ in another folder."""
    model.metadata_props.clear()
    for graph in (model.graph, *model.functions.values()):
        graph.metadata_props.clear()
        for value in (*graph.inputs, *getattr(graph, "initializers", {}).values()):
            value.metadata_props.clear()
        for node in graph.all_nodes():
            for noted in (node, *node.outputs):
                noted.metadata_props.clear()


def _check_export(module: nn.Module, example: Mapping[str, Array], graph: Path, *, batched: bool) -> None:
    """Compare graph and module at several batch sizes. Raises RepositoryError when they differ."""
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    for batch in CHECKED_BATCHES if batched else (1,):
        tensors = example_tensors(module, example, batch, batched=batched)
        with torch.inference_mode():
            expected = _flat(module(*tensors.values()))
        answers = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
        for want, got in zip(expected, answers, strict=True):
            scale = max(1.0, float(np.max(np.abs(want), initial=0.0)))
            apart = np.abs(want - got).max(initial=0.0) if want.shape == got.shape else np.inf
            if not apart <= EXPORT_TOLERANCE * scale:  # put this way round, NaN is a difference
                raise RepositoryError(f"the ONNX export of {type(module).__name__} differs from it at batch {batch}")


def _flat(answer: Any) -> list[Array]:
    """What a module returned, as arrays in order."""
    values = answer.values() if isinstance(answer, dict) else answer if isinstance(answer, (tuple, list)) else [answer]
    return [value.numpy().astype(np.float64) for value in values]
