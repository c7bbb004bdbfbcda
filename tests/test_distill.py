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
from variants.recipes.distillation.hints import listening, pair_layers
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
    """Layers answer in 16 bits under autocast; each loss is still a finite 32-bit number that can be learnt from."""
    weights: Any = {"hints": 1.0, "relation_distance": 1.0, "relation_angle": 1.0}
    teacher, student = trained.module, copy.deepcopy(trained.module)
    pairs = pair_layers(teacher, student, trained.training.inputs, {})
    lesson, precision = (
        Lesson(teacher, student, pairs, Distil(**weights)),
        MixedPrecision("cpu", reduced, first_scale=256.0),
    )
    batch = next(Batches(teacher, trained.given(tmp_path)).shuffled(np.random.default_rng(0)))
    with lesson.listening("cpu"), precision.autocast():
        parts = lesson.parts(batch, classes=True)
    assert len(parts) == 5
    assert all(part.dtype == torch.float32 and bool(part.isfinite()) for part in parts.values())
    assert precision.step(sum(parts.values(), torch.zeros(())), torch.optim.Adam(lesson.learner.parameters()))


def test_values_are_learnt_by_their_distance() -> None:
    """Where answers are no classes, task and response are squared distances: to the target, to the teacher."""
    student, wanted, target = nn.Linear(4, 1), torch.zeros(3, 1), torch.ones(3, 1)
    answer = student(torch.ones(3, 4))
    parts = Lesson(nn.Linear(4, 1), student, [], Distil(alpha=0.25)).parts(
        Batch([torch.ones(3, 4)], target, [wanted]), classes=False
    )
    torch.testing.assert_close(parts["task"], 0.75 * ((answer - target) ** 2).mean())
    torch.testing.assert_close(parts["response"], 0.25 * (answer**2).mean())


class Tokens(nn.Module):
    """Steps [batch, steps, 4] through layers of every kind to [batch, 2]; the recurrent one takes steps first."""

    def __init__(self) -> None:
        super().__init__()
        self.widen, self.bend, self.recurrent = nn.Linear(4, 6), nn.GELU(), nn.LSTM(6, 8)
        self.convolution, self.head = nn.Conv1d(8, 5, 3, padding=1), nn.Linear(5, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        steps = self.recurrent(self.bend(self.widen(input)).transpose(0, 1))[0].permute(1, 2, 0)
        answer: Tensor = self.head(self.convolution(steps).relu().mean(dim=2))
        return answer


STEPS = {"input": np.zeros((3, 7, 4), np.float32)}


@pytest.mark.parametrize(
    ("path", "shape"),
    [
        ("widen", (3, 6, 7)),
        ("bend", (3, 6, 7)),
        ("recurrent", (3, 8, 7)),
        ("convolution", (3, 5, 7)),
        ("head", (3, 2)),
    ],
)
def test_every_layers_answer_becomes_samples_by_channels(path: str, shape: tuple[int, ...]) -> None:
    """Whether channels are last or second, and steps or samples first."""
    module = Tokens().eval()
    (pair,) = pair_layers(module, module, STEPS, {path: path})
    with listening(module, [path]) as heard:
        module(torch.from_numpy(STEPS["input"]))
    assert pair.student.as_map(heard[path]).shape == shape
    assert pair.student.channels == shape[1]


def test_without_names_the_last_maps_before_the_heads_are_compared(trained: Trained) -> None:
    """A network with positions gives its last feature map, one without gives its last hidden layer."""
    tokens = Tokens().eval()
    (pair,) = pair_layers(tokens, tokens, STEPS, {})
    assert pair.teacher.path == "convolution"
    (pair,) = pair_layers(trained.module, trained.module, trained.training.inputs, {})
    assert isinstance(trained.module.get_submodule(pair.teacher.path), nn.Conv2d)
    assert pair.teacher.channels == 32
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2))
    (pair,) = pair_layers(plain, plain, points().inputs, {})
    assert pair.student.path == "2"


@pytest.mark.parametrize(
    ("named", "why"),
    [
        ({"convolutoin": "widen"}, "the teacher has no layer 'convolutoin'.*did you mean 'convolution'"),
        ({"convolution": "wide"}, "the student has no layer 'wide'.*did you mean 'widen'"),
        ({"convolution": "head"}, "'convolution' of the teacher answers in 3 dimensions and 'head' .* in 2"),
    ],
)
def test_layers_that_cannot_be_compared_are_refused(named: dict[str, str], why: str) -> None:
    """A mistyped name gets the nearest one; maps and vectors are not compared."""
    with pytest.raises(RecipeRejected, match=why):
        pair_layers(Tokens().eval(), Tokens().eval(), STEPS, named)


def test_a_network_of_one_layer_has_no_hints(tmp_path: Path) -> None:
    """There is nothing before its head; the reason says so."""
    single = nn.Linear(4, 2).eval()
    with pytest.raises(RecipeRejected, match="no layer before its head"):
        pair_layers(single, single, points().inputs, {})


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
