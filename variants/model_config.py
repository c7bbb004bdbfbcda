"""`model.yaml` <-> values: what a person may say about a model, with the defaults for what they leave out.

Rules of this file: every section refuses unknown keys and names the nearest valid one; every mistake becomes one
`RepositoryError` line. Imports neither torch nor onnx nor numpy, because the server reads this too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from variants.variant import REFERENCE

Metric = Literal["top1", "macro_f1", "cosine", "r2", "agreement"]
Task = Literal["classification", "embedding", "regression", "generic"]

NAME_PATTERN = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
"""What a model's or a variant's name looks like: a safe folder name and a safe label value."""

DEFAULT_METRICS: dict[Task, Metric] = {
    "classification": "top1",
    "embedding": "cosine",
    "regression": "r2",
    "generic": "agreement",
}

RECIPES_OF_VARIANT: dict[str, tuple[str, ...]] = {
    "pruned": ("prune-channels",),
    "pruned-unstructured": ("prune-unstructured",),
    "pruned-int8": ("prune-channels", "int8-static"),
    "distilled-int8": ("distilled", "int8-static"),
}
"""Variant names made by other recipes; every other variant is made by the recipe of its own name."""


class RepositoryError(Exception):
    """The repository or its configuration is wrong; the message is one line that says what and where."""


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for a person who mistyped: the nearest valid name, or all of them where none is near."""
    valid = sorted(valid)
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean {close[0]!r}?" if close else f"valid: {', '.join(valid) or 'none'}"


class Section(BaseModel):
    """A part of `model.yaml`: frozen, and deaf to unknown keys only after saying which one was meant."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key in values:
                if key not in cls.model_fields:
                    raise ValueError(f"unknown key {str(key)!r}; {nearest(str(key), cls.model_fields)}")
        return values


class SourceConfig(Section):
    """What the variants are made from: an ONNX file, or a torch module with its weights.

    `dynamic_axes` names the dimensions of a module's inputs that vary beside the batch: `{tokens: {1: length}}`. Equal
    names are equal sizes.
    """

    onnx: str | None = None
    module: str | None = Field(None, pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
    weights: str | None = None
    dynamic_axes: dict[str, dict[int, str]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_form(self) -> SourceConfig:
        if (self.onnx is None) == (self.module is None) or (self.module is None) != (self.weights is None):
            raise ValueError("give either `onnx`, or `module` together with `weights`")
        if self.dynamic_axes and self.module is None:
            raise ValueError("dynamic_axes are for a `module`; an ONNX file says itself which dimensions vary")
        for name, axes in self.dynamic_axes.items():
            if wrong := [axis for axis, s in axes.items() if axis < 1 or not s.isidentifier() or s == "batch"]:
                raise ValueError(
                    f"dynamic_axes: {name}: {wrong[0]} must be a dimension after the batch, 1 or more, "
                    "with a name such as `length`"
                )
        return self


class EvaluationConfig(Section):
    """Held-out data. Without a target the score is fidelity to fp32."""

    data: str
    target: str | None = None
    metric: Metric | None = None


class CalibrationConfig(Section):
    """Data that static quantisation observes activations on."""

    data: str
    samples: int = Field(256, ge=1)


class TrainingConfig(Section):
    """Data and effort for recipes that train."""

    data: str
    target: str | None = None
    epochs: int = Field(5, ge=1)
    learning_rate: float = Field(0.001, gt=0)


class TuningConfig(Section):
    """Data that recipes choose among candidates on; without it a share of the training or calibration data is used."""

    data: str
    target: str | None = None


class GateConfig(Section):
    """What a variant must prove: both bounds are compared with 95 % confidence bounds, never with point values."""

    max_accuracy_drop: float = Field(0.01, ge=0, le=1)
    min_agreement: float = Field(0.98, ge=0, le=1)


class BatchingConfig(Section):
    """How requests may share a batch; a `max_batch_size` of 0 means the model has no batch dimension."""

    max_batch_size: int = Field(32, ge=0, le=4096)
    max_queue_delay_ms: float = Field(0, ge=0)


class SloConfig(Section):
    """What a request asks that names nothing itself; None leaves it to the server."""

    latency_ms: float | None = Field(None, gt=0)
    max_accuracy_drop: float | None = Field(None, ge=0, le=1)
    on_infeasible: tuple[Literal["degrade", "late", "reject"], ...] | None = None


class StepConfig(BaseModel):
    """One step of a recipe chain: a recipe by its name, and parameters meant for it alone."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, entry: Any) -> Any:
        if isinstance(entry, StepConfig):
            return entry
        values = {"recipe": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("recipe"), str):
            raise ValueError("a recipe is a name, a mapping with `recipe`, or a list of these")
        return {"recipe": values["recipe"], "parameters": _without(values, "recipe")}


class VariantConfig(BaseModel):
    """One entry of `variants:`: a name, the recipes that make it one after the other, and their parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=f"^{NAME_PATTERN}$")
    steps: tuple[StepConfig, ...] = Field(min_length=1, validation_alias="recipe")
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_entry(cls, entry: Any) -> Any:
        if isinstance(entry, VariantConfig):
            return entry
        values = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(values, dict) or not isinstance(values.get("name"), str):
            raise ValueError("a variant is a name, or a mapping with `name`")
        name = values["name"]
        recipe = values.get("recipe", list(RECIPES_OF_VARIANT.get(name, (name,))))
        steps = recipe if isinstance(recipe, list) else [recipe]
        return {"name": name, "recipe": steps, "parameters": _without(values, "name", "recipe")}

    @property
    def entry(self) -> dict[str, Any]:
        """What a person would write in `variants:` for this."""
        steps = [{"recipe": step.recipe, **step.parameters} for step in self.steps]
        return {"name": self.name, "recipe": steps, **self.parameters}

    @property
    def recipe(self) -> str:
        """The recipes' names, as one."""
        return " + ".join(step.recipe for step in self.steps)


def _without(values: Mapping[Any, Any], *keys: str) -> dict[str, Any]:
    return {str(key): value for key, value in values.items() if key not in keys}


class ModelConfig(Section):
    """All of `model.yaml`. `variants` is None when the file names none; `auto` stands for ``variants: auto``."""

    source: SourceConfig | None = None
    task: Task = "generic"
    evaluation: EvaluationConfig | None = None
    calibration: CalibrationConfig | None = None
    training: TrainingConfig | None = None
    tuning: TuningConfig | None = None
    gate: GateConfig = GateConfig()
    variants: tuple[VariantConfig, ...] | None = None
    auto: bool = False
    batching: BatchingConfig = BatchingConfig()
    slo: SloConfig = SloConfig()

    @model_validator(mode="before")
    @classmethod
    def _auto(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "auto" in values:
            raise ValueError("unknown key 'auto'; say `variants: auto`")
        return _without(values, "variants") | {"auto": True} if values.get("variants") == "auto" else values

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        names = [variant.name for variant in self.variants or ()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"variants: {name!r} is listed twice")
        if any(variant.name == REFERENCE != variant.recipe for variant in self.variants or ()):
            raise ValueError(f"variants: {REFERENCE!r} is the reference and cannot have another recipe")
        if self.evaluation and self.evaluation.target and self.metric == "agreement":
            raise ValueError("evaluation.metric 'agreement' compares with fp32 and takes no target")
        return self

    @property
    def metric(self) -> Metric:
        """The score in use: the configured one, or the task's usual one."""
        return (self.evaluation and self.evaluation.metric) or DEFAULT_METRICS[self.task]


def one_line(error: ValidationError, where: str) -> str:
    """The first mistake of a pydantic error in one line that starts with where it is."""
    first = error.errors(include_url=False, include_context=False)[0]
    location = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}: {location + ': ' if location else ''}{message}"


def read_model_config(path: Path) -> ModelConfig:
    """Read a `model.yaml`; a missing file means all defaults. Raises RepositoryError with one line."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ModelConfig()
    except (OSError, UnicodeDecodeError) as error:
        raise RepositoryError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        raise RepositoryError(f"{path}: not valid YAML{where}: {getattr(error, 'problem', error)}") from error
    if values is None:
        return ModelConfig()
    if not isinstance(values, dict):
        raise RepositoryError(f"{path}: must hold keys and values, not a {type(values).__name__}")
    try:
        return ModelConfig.model_validate(values)
    except ValidationError as error:
        raise RepositoryError(one_line(error, str(path))) from error
