"""distilled: what a student learns from a really trained teacher, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from factory_fixtures import build_in_process
from pydantic import ValidationError
from recipe_fixtures import run
from torch import Tensor, nn
from trained_cnn import Trained, load_trained
from training_fixtures import config, lesson, points

from variants.data import Samples
from variants.recipes.distillation.distill import Distil, Lesson, distil
from variants.recipes.distillation.hints import pair_layers
from variants.recipes.distillation.students import Initial, student_of
from variants.recipes.recipe import Product, RecipeRejected
from variants.recipes.training.fit import Batch, Batches
from variants.recipes.training.mixed_precision import MixedPrecision
from variants.repository import open_path


@pytest.fixture(scope="module")
def trained(trained_digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The digits CNN, about 50,000 weights. Not to be changed."""
    return load_trained(trained_digits, tmp_path_factory.mktemp("trained"))


def distilled(trained: Trained, work: Path, *, labels: bool = True, **parameters: Any) -> Product:
    """What the recipe makes of the digits CNN."""
    given = trained.given(work)
    if not labels:
        given = replace(given, training=Samples(trained.training.inputs))
    return distil(given, Distil(**parameters))


def agreement(trained: Trained, graph: Path) -> float:
    """The share of evaluation images on which a graph and the teacher say the same digit."""
    images = trained.evaluation.inputs
    return float((run(graph, **images).argmax(1) == run(trained.graph, **images).argmax(1)).mean())


@pytest.mark.slow
def test_a_student_learns_from_the_teacher_alone(trained: Trained, tmp_path: Path) -> None:
    """Without a single label, a network of a quarter of the weights that starts from nothing answers like its teacher.

    The same student untrained, which is what no learning would leave, agrees on few digits.
    """
    product = distilled(trained, tmp_path / "taught", labels=False, initial="fresh", epochs=16)
    assert product.facts["losses"] == ["response"]
    assert agreement(trained, product.files["model.onnx"]) > 0.93
    barely = distilled(trained, tmp_path / "barely", labels=False, initial="fresh", epochs=1)
    assert agreement(trained, barely.files["model.onnx"]) < 0.85


@pytest.mark.slow
def test_all_losses_together(trained: Trained, tmp_path: Path) -> None:
    """Each loss is on the card, falls during training, and is in the findings by epoch; nothing listens afterwards."""
    product = distilled(
        trained, tmp_path / "all", hints=1.0, relation_distance=25.0, relation_angle=50.0, initial="fresh", epochs=4
    )
    names = ["task", "response", "hints", "relation distance", "relation angle"]
    assert product.facts["losses"] == names
    assert product.facts["epochs"] == 4
    history: Any = product.findings["training"]
    assert [list(epoch) for epoch in history] == [["total", *names]] * 4
    assert all(history[-1][name] < history[0][name] for name in names)
    assert history[0]["total"] == pytest.approx(sum(history[0][name] for name in names), abs=1e-4)
    assert product.module is not None
    assert not any(layer._forward_hooks for layer in product.module.modules())
    weights = [product.facts[name] for name in ("weights_before", "weights_after")]
    assert weights == [sum(p.numel() for p in module.parameters()) for module in (trained.module, product.module)]


OWN_STUDENT = """
from torch import nn


def tiny() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
"""
VARIANTS = """
variants:
  - fp32
  - {name: own, recipe: distilled, student: "students:tiny", epochs: 12}
  - {name: large, recipe: distilled, student: mobilenet-v3}
  - {name: distilled-int8, recipe: [distilled, int8-static], student: narrower, width: 0.6}
"""


@pytest.mark.slow
def test_build_makes_students(digits: Path) -> None:
    """A person's own from the model's folder, one made narrower and then quantised; a too large one is refused."""
    model = digits / "digits"
    (model / "students.py").write_text(OWN_STUDENT)
    (model / "model.yaml").write_text((model / "model.yaml").read_text() + VARIANTS)
    done = build_in_process(digits)
    assert done.code == 0, done.err
    version = open_path(digits)[0].newest()
    cards = {name: version.card(name) for name in ("fp32", "own", "large", "distilled-int8")}
    assert all(cards.values())
    fp32, own, large, int8 = (card for card in cards.values() if card is not None)
    assert "no fewer than the model's" in large.gate.reason
    assert own.weights < fp32.weights / 10
    assert [own.parameters[name] for name in ("student", "width")] == ["students:tiny", None]
    assert own.runtimes["onnxruntime"].score.value > 0.85
    assert int8.runtimes["onnxruntime"].score.value > 0.93
    assert int8.size_bytes < fp32.size_bytes / 4
    assert dict(int8.parameters["distilled"])["epochs"] == 4  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"student": "narower"}, "unknown student 'narower'; did you mean 'narrower'"),
        ({"depth": 0.5}, "'narrower' has no use for `depth`"),
        ({"student": "mobilenet-v2", "depth": 0.5}, "'mobilenet-v2' has no use for `depth`"),
        ({"student": "shallower", "width": 0.5}, "'shallower' has no use for `width`"),
        ({"student": "a:b", "initial": "kept"}, "'a:b' has no use for `initial`"),
        ({"width": 1.0}, "must lose something"),
        ({"hint_layers": {"a": "b"}}, "`hint_layers` need a weight"),
        ({"alpha": 1.5}, "less than or equal to 1"),
        ({"temperature": 0}, "greater than 0"),
        ({"hint": 1.0}, "unknown key 'hint'; did you mean 'hints'"),
    ],
)
def test_parameters_that_would_do_nothing_are_refused(said: dict[str, Any], why: str) -> None:
    """Whatever would be ignored or make no sense is said before anything is trained."""
    with pytest.raises(ValidationError, match=why):
        Distil.model_validate(said)


class TwoHeads(nn.Module):
    """Two outputs of one input: classes and a value."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.value = nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, input: Tensor) -> dict[str, Tensor]:  # noqa: A002 - the data's name
        return {"classes": self.classes(input), "value": self.value(input)}


LABELS = torch.tensor([0, 2, 1])


@pytest.mark.parametrize(
    ("alpha", "target", "weights"),
    [
        (0.7, LABELS, {"task": 0.3, "response": 0.7}),
        (0.0, LABELS, {"task": 1.0}),
        (1.0, LABELS, {"response": 1.0}),
        (0.7, None, {"response": 1.0}),
    ],
)
def test_alpha_shares_between_task_and_response(alpha: float, target: Tensor | None, weights: dict[str, float]) -> None:
    """The first output's classes are learnt from labels and teacher as `alpha` says; other outputs from the teacher."""
    torch.manual_seed(0)
    teacher, student, inputs = TwoHeads(), TwoHeads(), torch.randn(3, 4)
    wanted, answers = teacher(inputs), student(inputs)
    batch = Batch([inputs], target, [value.detach() for value in wanted.values()])
    parts = Lesson(teacher, student, [], Distil(alpha=alpha, temperature=2.0)).parts(batch, classes=True)
    by_hand = {
        "task": nn.functional.cross_entropy(answers["classes"], LABELS),
        "response": 4
        * nn.functional.kl_div(
            (answers["classes"] / 2).log_softmax(1), (wanted["classes"] / 2).softmax(1), reduction="batchmean"
        ),
    }
    expected = {name: weight * by_hand[name] for name, weight in weights.items()}
    expected["further answers"] = ((answers["value"] - wanted["value"]) ** 2).mean()
    assert list(parts) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(parts[name], value, msg=name)


@pytest.mark.parametrize("reduced", [torch.float16, torch.bfloat16])
def test_every_loss_works_in_mixed_precision(trained: Trained, tmp_path: Path, reduced: torch.dtype) -> None:
    """Layers answer in 16 bits under autocast; each loss is close to what it is in 32, and the student learns from it.

    Nothing flows back into the teacher.
    """
    teacher, student = trained.module, copy.deepcopy(trained.module)
    for parameter in student.parameters():
        parameter.data += 0.1 * parameter.std() * torch.randn_like(parameter)
    pairs = pair_layers(teacher, student, trained.training.inputs, {})
    lesson = Lesson(teacher, student, pairs, Distil(hints=1.0, relation_distance=1.0, relation_angle=1.0))
    precision = MixedPrecision("cpu", reduced, first_scale=256.0)
    batch = next(Batches(teacher, trained.given(tmp_path)).shuffled(np.random.default_rng(0)))
    with lesson.listening("cpu"):
        exact = {name: part.item() for name, part in lesson.parts(batch, classes=True).items()}
        with precision.autocast():
            parts = lesson.parts(batch, classes=True)
    assert len(parts) == 5
    assert {name: part.item() for name, part in parts.items()} == pytest.approx(exact, rel=0.05)
    before = [parameter.detach().clone() for parameter in lesson.learner.parameters()]
    assert precision.step(sum(parts.values(), torch.zeros(())), torch.optim.Adam(lesson.learner.parameters()))
    after = list(lesson.learner.parameters())
    assert not any(torch.equal(left, right) for left, right in zip(before, after, strict=True))
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("initial", ["kept", "fresh"])
def test_frozen_sources_have_students_that_learn(tmp_path: Path, initial: Initial) -> None:
    """A teacher that is frozen, as a factory may leave it, does not freeze its student."""
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval().requires_grad_(False)
    given = lesson(teacher, points(), tmp_path)
    tensors = {"input": torch.from_numpy(points().inputs["input"][:4])}
    before = student_of("narrower", teacher, tensors, width=0.5, depth=0.5, initial=initial).state_dict()
    product = distil(given, Distil(initial=initial))
    assert product.module is not None
    assert not any(torch.equal(value, before[name]) for name, value in product.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_classifier_of_one_output_is_learnt_as_a_value(tmp_path: Path) -> None:
    """As a class by itself its probability would always be 1, and there would be nothing to learn."""
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.Sigmoid()).eval()
    product = distil(lesson(teacher, Samples(points().inputs), tmp_path), Distil(initial="fresh"))
    history: Any = product.findings["training"]
    assert history[0]["response"] > 0


def test_students_with_auxiliary_heads_are_refused(tmp_path: Path) -> None:
    """What a student answers in training alone has nothing to be compared with."""

    class Auxiliary(nn.Linear):
        def forward(self, input: Tensor) -> Any:  # noqa: A002 - the data's name
            answer = super().forward(input)
            return (answer, answer) if self.training else answer

    student = Auxiliary(4, 2).train()
    with pytest.raises(RecipeRejected, match="in training it gives 2 outputs and in use 1"):
        Lesson(linear := nn.Linear(4, 2), student, [], Distil()).parts(
            Batch([torch.ones(3, 4)], None, [linear(torch.ones(3, 4))]), classes=True
        )


def test_values_are_learnt_by_their_distance() -> None:
    """Where answers are no classes, task and response are squared distances: to the target, to the teacher."""
    student, wanted, target = nn.Linear(4, 1), torch.zeros(3, 1), torch.ones(3, 1)
    answer = student(torch.ones(3, 4))
    parts = Lesson(nn.Linear(4, 1), student, [], Distil(alpha=0.25)).parts(
        Batch([torch.ones(3, 4)], target, [wanted]), classes=False
    )
    torch.testing.assert_close(parts["task"], 0.75 * ((answer - target) ** 2).mean())
    torch.testing.assert_close(parts["response"], 0.25 * (answer**2).mean())


@pytest.mark.parametrize("more", [{"max_batch": 0}, {"samples": 2}])
def test_relations_need_a_batch(tmp_path: Path, more: dict[str, int]) -> None:
    """Two samples make no triple, and a model without a batch dimension has none either."""
    teacher = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    samples = points(more.get("samples", 64))
    given = lesson(teacher, samples, tmp_path, max_batch=more.get("max_batch", 32))
    with pytest.raises(RecipeRejected, match="need a batch and 3 training samples"):
        distil(given, Distil(relation_angle=1.0))


def test_distillation_needs_a_module(tmp_path: Path) -> None:
    """An ONNX file has no module to learn from."""
    source = replace(lesson(nn.Linear(4, 2), points(), tmp_path).source, module=None)
    given = replace(lesson(nn.Linear(4, 2), points(), tmp_path), source=source)
    with pytest.raises(RecipeRejected, match="needs a torch source"):
        distil(given, Distil())


def test_distillation_needs_training_data(tmp_path: Path) -> None:
    """Without it there is nothing to learn on."""
    given = lesson(nn.Linear(4, 2).eval(), points(), tmp_path, config("classification"), training=None)
    with pytest.raises(RecipeRejected, match="add `training:`"):
        distil(given, Distil())
