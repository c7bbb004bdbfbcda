"""Students: smaller networks that answer the same questions, derived from a source, built in, or a person's own.

Rules of this file: a student takes what the source takes and answers in the same shapes, runs, and has fewer weights;
what does not is rejected with the reason before anyone trains it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from variants.export import input_names, output_names
from variants.model_config import RepositoryError
from variants.recipes.distillation.shallower import shallower
from variants.recipes.pruning.channels import narrower
from variants.recipes.recipe import RecipeRejected
from variants.recipes.training.fit import seeded, tensors_of

if TYPE_CHECKING:
    from torch import nn

Initial = Literal["kept", "fresh"]

DERIVED = ("narrower", "shallower")
BUILT_IN: Mapping[str, tuple[str, Mapping[str, str]]] = MappingProxyType(
    {
        "mobilenet-v2": ("mobilenet_v2", {}),
        "mobilenet-v3": ("mobilenet_v3", {"size": "small"}),
        "mobilenet-v3-large": ("mobilenet_v3", {"size": "large"}),
        "efficientnet": ("efficientnet", {}),
    }
)
"""Students by name: the module in `variants.networks` and its function of that name, with what it is given."""

_USES = {"narrower": ("width", "initial"), "shallower": ("depth", "initial"), "efficientnet": ("width", "depth")}


@seeded()
def student_of(
    name: str, module: nn.Module, tensors: dict[str, Any], *, width: float, depth: float, initial: Initial
) -> nn.Module:
    """A student of `module`, in eval mode. Raises RecipeRejected for one that cannot be made or cannot stand in.

    `name` is narrower, shallower, one of `BUILT_IN`, or `package.module:factory`; `tensors` are real samples in the
    order of `forward`. `initial` is what a derived student starts from: the weights that are left, or fresh ones.
    """
    if name == "narrower":
        student = narrower(module, tensors, 1 - width)
    elif name == "shallower":
        student = shallower(module, tensors, depth)
    elif name in BUILT_IN:
        student = _built_in(name, module, tensors, width, depth)
    else:
        student = _own(name)
    if name in DERIVED and initial == "fresh":
        _initialise(student)
    _check(student.eval(), module, tensors, name)
    return student


def used_by(name: str) -> tuple[str, ...]:
    """Which of width, depth and initial weights shape this student."""
    return _USES.get(name, ("width",) if name in BUILT_IN else ())


def count_weights(module: nn.Module) -> int:
    """The numbers that training changes."""
    return sum(parameter.numel() for parameter in module.parameters())


def _initialise(module: nn.Module) -> None:
    """Fresh weights for every layer that knows how; parameters that a module made itself keep their values."""
    for layer in module.modules():
        reset = getattr(layer, "reset_parameters", None) or getattr(layer, "_reset_parameters", None)
        if callable(reset):
            reset()


def _built_in(name: str, teacher: nn.Module, tensors: dict[str, Any], width: float, depth: float) -> nn.Module:
    """A network for images of the example's size and channels, with as many classes as the teacher answers."""
    import torch

    from variants.networks.blocks import halvings_for

    with torch.no_grad():
        answers = tensors_of(teacher(*tensors.values()))
    images = list(tensors.values())
    if len(images) != 1 or images[0].ndim != 4 or len(answers) != 1 or answers[0].ndim != 2:
        raise RecipeRejected(
            f"student {name!r} takes one input [batch, channels, height, width] and gives one output [batch, classes]; "
            f"this model has {[list(i.shape) for i in images]} and {[list(a.shape) for a in answers]}"
        )
    module, options = BUILT_IN[name]
    make: Callable[..., nn.Module] = getattr(importlib.import_module(f"variants.networks.{module}"), module)
    shape = {"halvings": halvings_for(min(images[0].shape[2:])), "width": width}
    shape |= {"depth": depth} if "depth" in used_by(name) else {}
    student = make(images[0].shape[1], answers[0].shape[1], **shape, **options)
    return _with_input(student, next(iter(tensors)))


def _with_input(network: nn.Module, name: str) -> nn.Module:
    """The network with another name for its one input, which the data and the artefact know it by.

    Its layers are called whole, not what is in them, so that hints can be taken from any of them.
    """
    from torch import fx

    class Shallow(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002 - fx names them
            return True

    graph = Shallow().trace(network)
    next(node for node in graph.nodes if node.op == "placeholder").target = name
    return fx.GraphModule(network, graph)


def _own(name: str) -> nn.Module:
    """What a person's factory returns; it is found where the source's is. Raises RecipeRejected."""
    from torch import nn

    module_name, _, factory = name.partition(":")
    try:
        student = getattr(importlib.import_module(module_name), factory)()
    except Exception as error:  # it is someone's own code: anything can happen in it
        raise RecipeRejected(f"student {name!r} failed: {type(error).__name__}: {_in_a_line(error)}") from error
    if not isinstance(student, nn.Module):
        raise RecipeRejected(f"student {name!r} must return a torch.nn.Module, not {type(student).__name__}")
    return student


def _check(student: nn.Module, teacher: nn.Module, tensors: dict[str, Any], name: str) -> None:
    """Raise RecipeRejected for a student that does not run, answers in other shapes or types, or is no smaller."""
    import torch

    try:
        order = input_names(student, tensors)
        with torch.no_grad():
            answers, wanted = student(**tensors), teacher(**tensors)
    except RepositoryError as error:
        raise RecipeRejected(f"student {name!r} takes other inputs than the model: {error}") from error
    except Exception as error:  # it is someone's own code
        raise RecipeRejected(f"student {name!r} does not run: {type(error).__name__}: {_in_a_line(error)}") from error
    if order != list(tensors):
        raise RecipeRejected(f"student {name!r}.forward must take its inputs in the order {', '.join(tensors)}")
    gives, must_give = _described(answers), _described(wanted)
    if gives != must_give:
        raise RecipeRejected(f"student {name!r} answers with {gives}, the model with {must_give}")
    left, before = count_weights(student), count_weights(teacher)
    if left >= before:
        raise RecipeRejected(f"student {name!r} has {left:,} weights, no fewer than the model's {before:,}")


def _described(answer: Any) -> str:
    """Names, types and shapes of what a module returned, for a person."""
    named = zip(output_names(answer), tensors_of(answer), strict=True)
    return ", ".join(f"{name} {str(value.dtype).removeprefix('torch.')}{list(value.shape)}" for name, value in named)


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
