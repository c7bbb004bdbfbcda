"""What a recipe is: a function from ingredients and checked parameters to artefact files, or a reason why not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variants.data import Samples
from variants.hardware import Hardware
from variants.model_config import ModelConfig, Section
from variants.source import Source

if TYPE_CHECKING:
    from torch import nn

    from variants.trial import Trial


class RecipeRejected(Exception):
    """This recipe makes no sense for this model or this data; the message says why, for a person.

    `findings` are what it tried before it gave up.
    """

    def __init__(self, message: str, findings: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.findings = findings or {}


class NoParameters(Section):
    """A recipe with nothing to choose."""


@dataclass(frozen=True, slots=True)
class Ingredients:
    """All that a recipe may use. It writes into `work` only and reports its progress as a share in [0, 1].

    `source` is what to change: the reference, or what the step before made of it. `teacher` is the reference's own
    module. `example` holds some samples for tracing; `trial` judges candidates for recipes that choose among several.
    `quick` asks for less effort: fewer samples and epochs, the same in kind.
    """

    source: Source
    example: Samples | None
    config: ModelConfig
    calibration: Samples | None
    training: Samples | None
    hardware: Hardware
    work: Path
    teacher: nn.Module | None = None
    trial: Trial | None = None
    quick: bool = False
    progress: Callable[[float], None] = field(default=lambda _share: None)


@dataclass(frozen=True, slots=True)
class Product:
    """What a recipe made: files by the name they get, the first of which is the variant's artefact.

    `precision` is what a runtime is asked for; `facts` are short and stand on the card beside the parameters;
    `findings` are for the report (plain JSON values). `module` is the changed module, for the next recipe of a chain.
    """

    files: Mapping[str, Path]
    precision: str = "fp32"
    facts: Mapping[str, object] = field(default_factory=dict)
    findings: Mapping[str, object] = field(default_factory=dict)
    module: nn.Module | None = None

    @property
    def artefact(self) -> str:
        """The name of the main file."""
        return next(iter(self.files))


@dataclass(frozen=True, slots=True)
class Recipe:
    """How something is made, and which parameters it takes; `chooses` says with which of them the gate decides."""

    make: Callable[[Ingredients, Any], Product]
    parameters: type[Section] = NoParameters
    chooses: Callable[[Any], bool] = field(default=lambda _parameters: False)
