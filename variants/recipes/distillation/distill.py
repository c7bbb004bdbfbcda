"""distilled: a smaller network learns from the source how it answers, and what it thinks on the way.

Rules of this file: the teacher is the reference itself and stays as it is; the losses are in `losses.py`, each with its
own weight, and their sum is made small. Hints are learnt together with the answers, not in a stage before them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field, field_validator, model_validator

from variants.export import example_tensors, export_graph
from variants.model_config import RepositoryError, Section, nearest
from variants.recipes.distillation.hints import Pair, listening, pair_layers
from variants.recipes.distillation.students import BUILT_IN, DERIVED, Initial, count_weights, student_of, used_by
from variants.recipes.recipe import Ingredients, Product, RecipeRejected
from variants.recipes.training.fit import Batch, Batches, Parts, answers_to, as_finding, effort, fit
from variants.recipes.training.losses import angle_loss, answer_loss, distance_loss, hint_loss, response_loss, task_loss
from variants.recipes.training.mixed_precision import MixedPrecision

if TYPE_CHECKING:
    import torch
    from torch import nn

_SAMPLES = 4
"""How many real samples a student is tried on before it is trained."""


class Distil(Section):
    """Which student, and what it learns from.

    `width` and `depth` are the share that stays of channels and of repeated blocks, `initial` what a derived student
    starts from. The answers' loss is `alpha` times the response loss at `temperature` and 1 - `alpha` times the task's
    own; without a target it is the response alone. `hints`, `relation_distance` and `relation_angle` are the weights of
    further losses between the layers of `hint_layers`, the teacher's -> the student's; found by themselves if unnamed.
    `epochs` are those of `training:` where none are given; a student that starts afresh needs more.
    """

    student: str = "narrower"
    width: float = Field(0.5, gt=0, le=2)
    depth: float = Field(0.5, gt=0, le=2)
    initial: Initial = "kept"
    temperature: float = Field(4.0, gt=0)
    alpha: float = Field(0.7, ge=0, le=1)
    hints: float = Field(0.0, ge=0)
    relation_distance: float = Field(0.0, ge=0)
    relation_angle: float = Field(0.0, ge=0)
    hint_layers: dict[str, str] = Field(default_factory=dict)
    epochs: int | None = Field(None, ge=1)

    @property
    def compares_layers(self) -> bool:
        """Whether any loss looks inside the networks."""
        return any((self.hints, self.relation_distance, self.relation_angle))

    @property
    def idle(self) -> list[str]:
        """The parameters that say nothing about this student."""
        return [name for name in ("width", "depth", "initial") if name not in used_by(self.student)]

    @field_validator("student")
    @classmethod
    def _known(cls, student: str) -> str:
        if student not in DERIVED and student not in BUILT_IN and ":" not in student:
            known = nearest(student, (*DERIVED, *BUILT_IN))
            raise ValueError(f"unknown student {student!r}; {known}, or a factory of your own as `module:factory`")
        return student

    @model_validator(mode="after")
    def _consistent(self) -> Distil:
        if (self.student == "narrower" and self.width >= 1) or (self.student == "shallower" and self.depth >= 1):
            raise ValueError(f"student {self.student!r} must lose something: give a share below 1")
        for name in self.idle:
            if name in self.model_fields_set:
                raise ValueError(f"student {self.student!r} has no use for `{name}`; leave it out")
        if self.hint_layers and not self.compares_layers:
            raise ValueError("`hint_layers` need a weight: `hints`, `relation_distance` or `relation_angle`")
        return self


def distil(ingredients: Ingredients, parameters: Distil) -> Product:
    """Make a student, train it to answer like the reference, and export it. Raises RecipeRejected."""
    source, example = ingredients.source, ingredients.example
    if source.module is None or example is None:
        raise RecipeRejected("distillation needs a torch source (module and safetensors): the teacher")
    epochs, rate = effort(ingredients, parameters.epochs)
    tensors = example_tensors(source.module, example.inputs, _SAMPLES, batched=source.max_batch > 0)
    student = student_of(
        parameters.student,
        source.module,
        tensors,
        width=parameters.width,
        depth=parameters.depth,
        initial=parameters.initial,
    )
    teacher = ingredients.teacher or source.module
    lesson = Lesson(teacher, student, _pairs(teacher, student, ingredients, parameters), parameters)
    batches = Batches(teacher, ingredients)
    with lesson.listening(MixedPrecision.here().device):
        history = fit(
            lesson.learner,
            lambda batch: lesson.parts(batch, classes=batches.learns_classes),
            batches,
            epochs=epochs,
            learning_rate=rate,
            progress=ingredients.progress,
        )
    target = ingredients.work / "distilled.onnx"
    try:
        export_graph(student, example.inputs, target, batched=source.max_batch > 0, axes=source.axes)
    except RepositoryError as error:
        raise RecipeRejected(f"the student cannot be exported: {error}") from error
    facts = dict.fromkeys(parameters.idle) | {
        "weights_before": count_weights(source.module),
        "weights_after": count_weights(student),
        "losses": [name for name in history[0] if name != "total"],
        "epochs": epochs,
    }
    findings = as_finding(history)
    return Product({"model.onnx": target}, facts=facts, findings=findings, module=student)


def _pairs(teacher: nn.Module, student: nn.Module, ingredients: Ingredients, parameters: Distil) -> list[Pair]:
    """The layers to compare; none where no loss asks for them. Raises RecipeRejected."""
    if not parameters.compares_layers or ingredients.example is None:
        return []
    if ingredients.source.max_batch == 0 or len(ingredients.training or ()) < 3:
        raise RecipeRejected("hints and relations compare samples of a batch: they need a batch and 3 training samples")
    return pair_layers(teacher, student, ingredients.example.inputs, parameters.hint_layers)


class Lesson:
    """What a student learns from one batch: answers, hints, relations.

    `learner` is all that is trained: the student, and a projection of its channels to the teacher's for each hint.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, pairs: Sequence[Pair], parameters: Distil) -> None:
        from torch import nn

        self._teacher, self._student, self._pairs, self._weights = teacher, student, pairs, parameters
        self._projections = nn.ModuleList(
            nn.Linear(pair.student.channels, pair.teacher.channels) for pair in pairs if parameters.hints
        )
        self.learner = nn.ModuleList([student, self._projections])
        self._heard: dict[str, torch.Tensor] = {}
        self._hints: dict[str, torch.Tensor] = {}

    @contextmanager
    def listening(self, device: str) -> Iterator[None]:
        """Needed around training: the layers are listened to, and the teacher is at hand on the device."""
        if device != "cpu":
            self._teacher = copy.deepcopy(self._teacher).to(device)
        with (
            listening(self._student, [pair.student.path for pair in self._pairs]) as self._heard,
            listening(self._teacher, [pair.teacher.path for pair in self._pairs]) as self._hints,
        ):
            yield

    def parts(self, batch: Batch, *, classes: bool) -> Parts:
        """The loss of one batch by its parts; those without weight are left out."""
        import torch

        parts = self._answers(answers_to(batch, self._student), batch, classes=classes)
        if self._pairs:
            with torch.no_grad():
                self._teacher(*batch.inputs)
            parts |= self._inner()
        return parts

    def _answers(self, answers: list[torch.Tensor], batch: Batch, *, classes: bool) -> Parts:
        alpha = self._weights.alpha if batch.target is not None else 1.0
        parts: Parts = {}
        if batch.target is not None and alpha < 1:
            parts["task"] = (1 - alpha) * task_loss(answers[0], batch.target)
        if alpha > 0 and classes:
            parts["response"] = alpha * response_loss(answers[0], batch.wanted[0], self._weights.temperature)
        elif alpha > 0:
            parts["response"] = alpha * answer_loss(answers[:1], batch.wanted[:1])
        if answers[1:]:
            parts["further answers"] = answer_loss(answers[1:], batch.wanted[1:])
        return parts

    def _inner(self) -> Parts:
        """The losses between layers, each the mean over the pairs."""
        import torch

        weights, parts = self._weights, Parts()
        maps = [
            (pair.student.as_map(self._heard[pair.student.path]), pair.teacher.as_map(self._hints[pair.teacher.path]))
            for pair in self._pairs
        ]
        if weights.hints:
            losses = [hint_loss(*pair, projection) for pair, projection in zip(maps, self._projections, strict=True)]
            parts["hints"] = weights.hints * torch.stack(losses).mean()
        if weights.relation_distance:
            losses = [distance_loss(*pair) for pair in maps]
            parts["relation distance"] = weights.relation_distance * torch.stack(losses).mean()
        if weights.relation_angle:
            losses = [angle_loss(*pair) for pair in maps]
            parts["relation angle"] = weights.relation_angle * torch.stack(losses).mean()
        return parts
