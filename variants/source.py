"""What a person brings -> the reference graph: an fp32 ONNX file that every recipe starts from.

Rules of this file: used by `build` only. A torch module is the operator's own code and is imported here and nowhere
else. An exported graph is compared with the module before anything is made from it; an ONNX file is checked and
refused when it needs a second file or foreign code.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from variants.data import Array
from variants.model_config import nearest
from variants.repository import RepositoryError, VersionFolder
from variants.runtimes.onnx_signature import Signature, read_signature
from variants.runtimes.runtime import RuntimeUnavailable
from variants.variant import TensorSpec

if TYPE_CHECKING:
    from torch import nn

MAX_ONNX_BYTES = 2**31 - 1
"""The largest single ONNX file: protobuf ends there."""

CHECKED_BATCHES = (1, 3, 9)
EXPORT_TOLERANCE = 1e-4
"""How far an exported graph may be from its module, relative to the largest answer (or 1)."""


Axes = Mapping[str, Mapping[int, str]]
"""Input name -> dimension -> the name of its size."""

_NOISY_LOGGERS = ("", "torch.onnx", "onnxscript", "onnx_ir", "nncf")


@contextmanager
def without_library_noise() -> Iterator[None]:
    """Keep the libraries' notices to their own developers off the user's terminal; errors are raised as ever.

    Meant for the calls of an exporter or a quantiser only: inside it, deprecations and advice are dropped.
    """
    loggers = {name: logging.getLogger(name) for name in _NOISY_LOGGERS}
    levels, handlers = {name: logger.level for name, logger in loggers.items()}, list(logging.root.handlers)
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        try:
            for logger in loggers.values():
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for name, logger in loggers.items():
                logger.setLevel(levels[name])
            logging.root.handlers[:] = handlers  # logging.warning() installs one behind our back


@dataclass(frozen=True, slots=True)
class Source:
    """The reference graph, and the torch module where there is one. `max_batch` is 0 without a batch dimension.

    `axes` are the module's dimensions that vary beside the batch: their names by input and position.
    """

    graph: Path
    signature: Signature
    max_batch: int
    module: nn.Module | None = None
    axes: Axes = field(default_factory=dict)

    @property
    def sample_specs(self) -> tuple[TensorSpec, ...]:
        """The inputs as one sample has them: without the batch dimension."""
        if self.max_batch == 0:
            return self.signature.inputs
        return tuple(replace(spec, shape=spec.shape[1:]) for spec in self.signature.inputs)


def open_source(version: VersionFolder, example: Mapping[str, Array] | None, work: Path) -> Source:
    """The source of a version; call it within `importable`. Raises RepositoryError.

    `example` holds a few samples for tracing a torch module.
    """
    config = version.source
    if config.onnx is not None:
        return _open_onnx(version.resolve(config.onnx), version.model.config.batching.max_batch_size)
    if example is None:
        raise RepositoryError(
            f"{version.path}: a torch source needs example inputs; give evaluation, calibration or training data"
        )
    if config.module is None or config.weights is None:
        raise RepositoryError(f"{version.path}: `source` needs `module` and `weights`")
    module = load_module(config.module, version.resolve(config.weights))
    graph, max_batch = work / "reference.onnx", version.model.config.batching.max_batch_size
    export_graph(module, example, graph, batched=max_batch > 0, axes=config.dynamic_axes)
    signature = _signature(graph)
    if max_batch and not signature.batch_axis:
        raise _without_batch(config.module, signature)
    return Source(graph, signature, max_batch, module, config.dynamic_axes)


def _open_onnx(graph: Path, max_batch: int) -> Source:
    """An ONNX file that stands alone and that ONNX's own checker accepts."""
    import onnx

    if graph.stat().st_size > MAX_ONNX_BYTES:
        raise RepositoryError(f"{graph}: larger than {MAX_ONNX_BYTES} bytes, the most a single ONNX file can hold")
    signature = _signature(graph)  # refuses external data before the checker would follow it
    try:
        onnx.checker.check_model(str(graph))
    except Exception as error:
        raise RepositoryError(f"{graph}: not a valid ONNX graph: {str(error).strip().splitlines()[0]}") from error
    if max_batch and not signature.batch_axis:
        if any(spec.shape[:1] != (1,) for spec in (*signature.inputs, *signature.outputs)):
            raise _without_batch(str(graph), signature)
        max_batch = 1
    return Source(graph, signature, max_batch)


def _without_batch(what: str, signature: Signature) -> RepositoryError:
    shapes = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in (*signature.inputs, *signature.outputs))
    return RepositoryError(
        f"{what}: the first dimension of every input and output must be one variable batch ({shapes}); export it so, "
        "or say `batching: {max_batch_size: 0}` in model.yaml for a model without a batch dimension"
    )


def _signature(graph: Path) -> Signature:
    try:
        return read_signature(graph)
    except RuntimeUnavailable as error:
        raise RepositoryError(f"{graph}: {error}") from error


def load_module(name: str, weights: Path) -> nn.Module:
    """Call a `package.module:factory` and load its weights.

    Within `importable` it is found in the model's folder, the current one or among what is installed; what it imports
    only when it runs is found so too.
    """
    import safetensors.torch
    from torch import nn

    module_name, _, factory_name = name.partition(":")
    try:
        module = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # it is someone's own code: anything can happen in it
        raise RepositoryError(f"source.module {name!r} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise RepositoryError(f"source.module {name!r} must return a torch.nn.Module, not {type(module).__name__}")
    try:
        safetensors.torch.load_model(module, weights, strict=True)
    except Exception as error:  # safetensors, OS and torch errors share no base class
        message = " ".join(str(error).split())
        raise RepositoryError(f"{weights}: does not fit source.module {name!r}: {message}") from error
    return module.eval()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Let a model's own modules be imported, and forget them afterwards: two models may both have a `network.py`.

    Its own are those anywhere in its folder or directly in the current one, where an environment may lie deeper down.
    """
    before, paths = set(sys.modules), list(sys.path)
    model, here = folder.resolve(), Path.cwd()
    sys.path[:0] = [str(model), str(here)]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        fresh = set(sys.modules) - before
        own = {
            name
            for name in fresh
            if any(place.is_relative_to(model) or place.parent == here for place in _places(sys.modules[name]))
        }
        for name in fresh:
            if name in own or name.partition(".")[0] in own:
                del sys.modules[name]
        sys.path[:] = paths


def _places(module: ModuleType) -> list[Path]:
    """Where a module was found: a package's folders, or its file; nothing for one that is built in."""
    spec = getattr(module, "__spec__", None)
    if not isinstance(spec, ModuleSpec):  # what stands among the modules may make up any attribute it is asked for
        return []
    file = [spec.origin] if spec.origin and spec.has_location else []
    return [Path(place).resolve() for place in spec.submodule_search_locations or file]


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
