"""What a person brings -> the reference graph: an fp32 ONNX file that every recipe starts from.

Rules of this file: used by `build` only. A torch module is the operator's own code and is imported here and nowhere
else; `export.py` makes its graph. An ONNX file is checked and refused when it needs a second file or foreign code.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from variants.data import Array
from variants.export import Axes, export_graph
from variants.repository import RepositoryError, VersionFolder
from variants.runtimes.onnx_signature import Signature, read_signature
from variants.runtimes.runtime import RuntimeUnavailable
from variants.variant import TensorSpec

if TYPE_CHECKING:
    from torch import nn

MAX_ONNX_BYTES = 2**31 - 1
"""The largest single ONNX file: protobuf ends there."""


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
