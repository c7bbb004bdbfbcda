"""fp32, the reference, and amp: 16-bit arithmetic where the hardware computes it faster than fp32.

Mixed precision is fp16 on CUDA and bf16 on a CPU that has it; fp16 on a CPU only casts to fp32 and back. Inputs and
outputs stay as the source has them, so that a variant never changes what a client sends. A GPU counts only where ONNX
Runtime can use it: the reference runs there, so no server would use the GPU otherwise.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants.export import dynamic_shapes, example_tensors
from variants.quiet import without_library_noise
from variants.recipes.recipe import Ingredients, NoParameters, Product, RecipeRejected
from variants.runtimes.onnxruntime_runtime import can_use_cuda
from variants.runtimes.torch_runtime import save_archive

if TYPE_CHECKING:
    import torch
    from torch import nn


def make_fp32(ingredients: Ingredients, _: NoParameters) -> Product:
    """The reference graph itself."""
    return Product({"model.onnx": ingredients.source.graph})


def make_amp(ingredients: Ingredients, _: NoParameters) -> Product:
    """For bf16: the fp32 graph, whose arithmetic OpenVINO narrows; for fp16: a converted graph for CUDA.

    A torch source also gets `model.pt2`, the module cast once (autocast would cast the weights on every call).
    """
    precision = "fp16" if ingredients.hardware.cuda and can_use_cuda() else "bf16"
    graph = ingredients.source.graph
    if precision == "fp16":
        graph = _to_fp16(graph, ingredients.work / "fp16.onnx")
    files = {"model.onnx": graph}
    if ingredients.source.module is not None:
        files["model.pt2"] = _archive(ingredients, precision)
    return Product(files, precision=precision)


def _to_fp16(graph: Path, target: Path) -> Path:
    """The graph with fp16 weights and arithmetic between fp32 inputs and outputs."""
    import onnx

    with without_library_noise():
        from onnxruntime.transformers.float16 import convert_float_to_float16

        try:
            converted = convert_float_to_float16(onnx.load(graph), keep_io_types=True)
        except Exception as error:
            raise RecipeRejected(f"the graph cannot be converted to fp16: {error}") from error
    onnx.save(converted, target)
    return target


def _archive(ingredients: Ingredients, precision: str) -> Path:
    """The module in 16 bits as an exported program with a variable batch."""
    import torch

    source = ingredients.source
    data = ingredients.example
    if source.module is None or data is None:
        raise RecipeRejected("there are no samples to trace the module with")
    batched = source.max_batch > 0
    tensors = example_tensors(source.module, data.inputs, 2, batched=batched)
    narrow = _narrowed(source.module, torch.bfloat16 if precision == "bf16" else torch.float16)
    with without_library_noise(), torch.no_grad():
        shapes = dynamic_shapes(tensors, batched=batched, axes=source.axes)
        program = torch.export.export(narrow, tuple(tensors.values()), dynamic_shapes=shapes)
        names = [spec.name for spec in source.signature.outputs]
        save_archive(program, ingredients.work / "model.pt2", names)
    return ingredients.work / "model.pt2"


def _narrowed(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy in `dtype` that casts at its edges; hooks keep the module's own signature, and so its input names."""
    narrow = copy.deepcopy(module).to(dtype)

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(_cast(value, dtype) for value in inputs)

    def leave(_: nn.Module, __: tuple[Any, ...], answer: Any) -> Any:
        return _widen(answer, dtype)

    narrow.register_forward_pre_hook(enter)
    narrow.register_forward_hook(leave)
    return narrow


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if value.is_floating_point() else value


def _widen(answer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """The answer's tensors in order, those of `dtype` as fp32; an archive keeps the outputs' names by itself."""
    import torch
    from torch.utils import _pytree as pytree

    return [leaf.to(torch.float32) if leaf.dtype == dtype else leaf for leaf in pytree.tree_leaves(answer)]
