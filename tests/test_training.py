"""Fine-tuning: what a changed module learns from, and how."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_fixtures import config, lesson, points

from variants.data import Samples
from variants.recipes.recipe import Ingredients, RecipeRejected
from variants.recipes.training.fit import Batch, Batches, answers_to, effort, finetune, fit, tensors_of
from variants.recipes.training.mixed_precision import MixedPrecision

Recover = Literal["finetune", "distill"]


def linear(classes: int = 2) -> nn.Linear:
    """An untrained teacher or student of `points`."""
    torch.manual_seed(0)
    return nn.Linear(4, classes).eval()


def taught(module: nn.Module, teacher: nn.Module, given: Ingredients, recover: Recover) -> Any:
    """A copy after training, as its weights."""
    learner: Any = copy.deepcopy(module)
    finetune(learner, teacher, given, recover=recover)
    return learner.weight


@pytest.mark.parametrize(
    ("task", "metric", "learns"),
    [
        ("embedding", None, False),
        ("regression", None, False),
        ("generic", "cosine", False),
        ("generic", "macro_f1", True),
        ("classification", None, True),
    ],
)
def test_only_class_numbers_are_learnt_as_classes(tmp_path: Path, task: str, metric: str | None, learns: bool) -> None:
    """A module that already answers like its teacher has nothing to learn, unless its integer targets are classes."""
    teacher = linear(8)
    samples = Samples(points().inputs, np.random.default_rng(0).integers(0, 8, 64))
    given = lesson(teacher, samples, tmp_path, config(task, metric=metric))
    assert torch.equal(taught(teacher, teacher, given, "distill"), teacher.weight) is not learns
    assert torch.equal(taught(teacher, teacher, given, "finetune"), teacher.weight) is not learns


def test_answers_without_a_gradient_are_a_reason(tmp_path: Path) -> None:
    """A module that computes under `no_grad` cannot learn, and the person is told so."""

    class Still(nn.Linear):
        @torch.no_grad()
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's name
            return super().forward(input)

    teacher = Still(4, 2)
    with pytest.raises(RecipeRejected, match=r"no gradient.*cannot be trained"):
        finetune(copy.deepcopy(teacher), teacher, lesson(teacher, points(), tmp_path))


def test_inputs_that_a_module_changes_are_its_own(tmp_path: Path) -> None:
    """In-place arithmetic at the beginning of `forward` reaches nobody else's inputs."""

    class Changing(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the data's name
            return super().forward(input.mul_(3))

    given = lesson(linear(), points(), tmp_path)
    (batch, *_) = Batches(linear(), given).shuffled(np.random.default_rng(0))
    before = batch.inputs[0].clone()
    answers_to(batch, Changing(4, 2))
    assert torch.equal(batch.inputs[0], before)


def test_a_regression_may_have_whole_numbers_as_targets(tmp_path: Path) -> None:
    """Ages are no class numbers, most of them beyond the one output, but fine-tuning learns them as values."""
    teacher = linear(1)
    samples = Samples({"input": np.ones((64, 4), np.float32)}, np.random.default_rng(0).integers(18, 90, (64, 1)))
    given = lesson(teacher, samples, tmp_path, config("regression"))
    assert torch.equal(taught(teacher, teacher, given, "distill"), teacher.weight)
    assert not torch.equal(taught(teacher, teacher, given, "finetune"), teacher.weight)


@pytest.mark.parametrize(("recover", "alike"), [("finetune", True), ("distill", False)])
def test_fine_tuning_never_asks_the_teacher_where_there_are_labels(
    tmp_path: Path, recover: Recover, alike: bool
) -> None:
    """Two teachers that contradict each other leave the same weights behind, unless one learns from them."""
    module, other = linear(), nn.Linear(4, 2).eval()
    given = lesson(module, points(), tmp_path)
    assert torch.equal(taught(module, module, given, recover), taught(module, other, given, recover)) is alike


@pytest.mark.parametrize(("recover", "batches"), [("finetune", 1), ("distill", 4)])
def test_the_teacher_is_asked_no_more_than_needed(tmp_path: Path, recover: Recover, batches: int) -> None:
    """With labels for the one output, a single batch tells fine-tuning what the outputs are."""
    teacher, asked = linear(), list[int]()
    teacher.register_forward_pre_hook(lambda _layer, inputs: asked.append(len(inputs[0])))
    finetune(linear(), teacher, lesson(teacher, points(256), tmp_path), recover=recover)
    assert asked == [64] * batches


def test_values_of_the_outputs_shape_are_learnt(tmp_path: Path) -> None:
    """A target [samples] for an output [samples, 1] is its value: the module learns it, not the teacher's zero."""
    inputs = points(256).inputs
    samples = Samples(inputs, inputs["input"] @ np.array([1.0, -2.0, 0.5, 3.0], np.float32))
    silent = linear(1)
    silent.weight.data.zero_()
    given = lesson(silent, samples, tmp_path, config("regression", epochs=60, learning_rate=0.1))
    learnt = taught(linear(1), silent, given, "finetune")
    torch.testing.assert_close(learnt.flatten(), torch.tensor([1.0, -2.0, 0.5, 3.0]), atol=0.02, rtol=0)


def test_without_targets_the_teachers_answers_are_learnt(tmp_path: Path) -> None:
    """Unlabelled samples are enough to answer like the teacher, on new samples too."""
    teacher, student = linear(3), nn.Linear(4, 3)
    given = lesson(teacher, Samples(points(256).inputs), tmp_path, config(epochs=60, learning_rate=0.1))
    finetune(student, teacher, given, recover="finetune")
    fresh = torch.from_numpy(points(seed=1).inputs["input"])
    torch.testing.assert_close(student(fresh), teacher(fresh), atol=0.02, rtol=0)


class TwoHeads(nn.Module):
    """Classes and a value of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.classes, self.value = nn.Linear(4, 2), nn.Linear(4, 1)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:  # noqa: A002 - the data's name
        return self.classes(input), self.value(input)


@pytest.mark.parametrize("recover", ["finetune", "distill"])
def test_further_outputs_are_learnt_from_the_teacher(tmp_path: Path, recover: Recover) -> None:
    """Labels speak of the first output only; a second one, lost on the way, comes back."""
    teacher, module = TwoHeads().eval(), TwoHeads()
    given = lesson(teacher, points(256), tmp_path, config(epochs=60, learning_rate=0.1))
    finetune(module, teacher, given, recover=recover)
    torch.testing.assert_close(module.value.weight, teacher.value.weight, atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.array([0, 1, 2, 1]), "run from 0 to 2, but the model answers with 2 classes: they must be 0 to 1"),
        (np.array([0, 1, -1, 1]), "run from -1 to 1, but the model answers with 2 classes"),
        (np.array([0.0, 1.0, 1.0, 0.0]), "one class number per sample, not float64"),
        (np.array([[0, 1], [1, 0], [0, 0], [1, 1]]), r"of shape \[2\] per sample"),
    ],
)
@pytest.mark.parametrize("recover", ["finetune", "distill"])
def test_bad_labels_are_refused_by_their_range(tmp_path: Path, labels: Any, said: str, recover: Recover) -> None:
    """Labels that the model has no output for are a reason for a person, never a crash."""
    given = lesson(linear(), Samples(points(4).inputs, labels), tmp_path)
    with pytest.raises(RecipeRejected, match=said):
        finetune(linear(), linear(), given, recover=recover)


def test_training_that_diverges_is_refused(tmp_path: Path) -> None:
    """A loss that is no number any more is not exported; the message says what to lower."""
    given = lesson(linear(), points(), tmp_path, config(epochs=3, learning_rate=1e38))
    with pytest.raises(RecipeRejected, match=r"diverged in epoch \d.*lower `training.learning_rate`"):
        finetune(linear(), linear(), given)


class Rooted(nn.Linear):
    """Answers with square roots, whose gradient at zero is infinite, and times zero none at all."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        return (super().forward(input) ** 2).sqrt()


def test_a_last_step_that_spoils_the_weights_is_refused(tmp_path: Path) -> None:
    """The only step has a finite loss and a gradient that is none; NaN must not be taken for a trained module."""
    module = Rooted(4, 2, bias=False).eval()
    samples = points()
    samples.inputs["input"][3] = 0
    with pytest.raises(RecipeRejected, match=r"diverged in its last step: its weights.*lower `training.learning_rate`"):
        finetune(module, copy.deepcopy(module), lesson(module, samples, tmp_path))


def test_infinities_that_were_always_there_are_no_divergence(tmp_path: Path) -> None:
    """A mask of minus infinities, as attention has, is as it should be."""
    module = linear()
    module.register_buffer("mask", torch.full((2,), -torch.inf))
    assert len(finetune(module, linear(), lesson(linear(), points(), tmp_path))) == 1


@pytest.mark.parametrize("frozen", [["0"], ["0", "2"]])
def test_frozen_layers_learn_too(tmp_path: Path, frozen: list[str]) -> None:
    """A factory may freeze a backbone or everything; what a recipe changed must still find its way back."""
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).eval()
    for path in frozen:
        module.get_submodule(path).requires_grad_(False)
    before = {name: value.detach().clone() for name, value in module.named_parameters()}
    finetune(module, linear(), lesson(linear(), points(), tmp_path))
    assert not any(torch.equal(value, before[name]) for name, value in module.named_parameters())


class Auxiliary(nn.Linear):
    """A head that answers in training only."""

    def forward(self, input: Tensor) -> Any:  # noqa: A002 - the data's name
        answer = super().forward(input)
        return (answer, answer) if self.training else answer


@pytest.mark.parametrize("recover", ["finetune", "distill"])
def test_auxiliary_heads_are_refused(tmp_path: Path, recover: Recover) -> None:
    """Nobody knows what an output that is there in training only should learn."""
    module = Auxiliary(4, 2).eval()
    with pytest.raises(RecipeRejected, match="in training it gives 2 outputs and in use 1"):
        finetune(copy.deepcopy(module), module, lesson(module, points(), tmp_path), recover=recover)


class Bag(nn.Module):
    """An embedding with sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the data's name
        answer: Tensor = self.head(self.table(input).mean(dim=1))
        return answer


WORDS = Samples({"input": np.ones((64, 3), np.int64)}, np.zeros(64, np.int64))
NORMALISED = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("module", "samples", "max_batch", "said"),
    [
        (NORMALISED, points(1), 32, "batch normalisation cannot be trained on one sample at a time"),
        (nn.Sequential(nn.Unflatten(0, (1, 4)), NORMALISED), points(), 0, "one sample at a time.*a batch dimension"),
        (Bag(), WORDS, 32, "sparse gradients.*sparse=False"),
        (nn.Sequential(nn.Linear(4, 1), nn.Sigmoid()), points(), 32, "one output per class.*`training.target`"),
    ],
    ids=["one sample", "no batch", "sparse", "sigmoid"],
)
def test_what_cannot_be_trained_is_refused(
    tmp_path: Path, module: nn.Module, samples: Samples, max_batch: int, said: str
) -> None:
    """The reason says what to change, instead of a library's error."""
    module.eval()
    with pytest.raises(RecipeRejected, match=said):
        finetune(copy.deepcopy(module), module, lesson(module, samples, tmp_path, max_batch=max_batch))


def test_training_leaves_the_process_its_randomness(tmp_path: Path) -> None:
    """What draws numbers afterwards goes on as if nothing had been trained."""
    student, teacher = linear(), linear()
    given = lesson(teacher, points(), tmp_path)
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    finetune(student, teacher, given)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_training_data_is_a_reason(tmp_path: Path) -> None:
    """Without data there is nothing to learn from."""
    with pytest.raises(RecipeRejected, match="add `training:`"):
        finetune(linear(), linear(), lesson(linear(), points(), tmp_path, training=None))


def test_a_recipe_may_ask_for_its_own_epochs(tmp_path: Path) -> None:
    """Its own number replaces the configured one; `--quick` trains a single epoch all the same."""
    given = lesson(linear(), points(), tmp_path, config(epochs=3))
    assert [effort(given)[0], effort(given, 7)[0]] == [3, 7]
    assert len(finetune(linear(), linear(), lesson(linear(), points(), tmp_path, quick=True), epochs=7)) == 1


def test_training_is_repeatable_and_reports_its_progress(tmp_path: Path) -> None:
    """The same ingredients leave the same weights; progress rises to one."""
    shares: list[float] = []
    given = lesson(linear(), points(200), tmp_path, config(epochs=2), progress=shares.append)
    first, second = (taught(linear(), linear(), given, "distill") for _ in range(2))
    assert torch.equal(first, second)
    assert all(a < b for a, b in itertools.pairwise(shares[: len(shares) // 2]))
    assert shares[-1] == 1.0


def test_samples_that_cannot_be_stacked_come_one_by_one(tmp_path: Path) -> None:
    """A model without a batch dimension trains on one sample at a time."""
    teacher, student = linear(3), nn.Linear(4, 3)
    given = lesson(teacher, Samples(points().inputs), tmp_path, config(epochs=20, learning_rate=0.1), max_batch=0)
    finetune(student, teacher, given)
    torch.testing.assert_close(student.weight, teacher.weight, atol=0.05, rtol=0)


def cross_entropy(module: nn.Module) -> Any:
    """The loss of a classifier by itself."""

    def loss(batch: Batch) -> dict[str, Tensor]:
        assert batch.target is not None
        return {"task": nn.functional.cross_entropy(tensors_of(module(*batch.inputs))[0].float(), batch.target)}

    return loss


def test_overflowed_steps_are_skipped_and_training_goes_on(tmp_path: Path) -> None:
    """fp16 with a scale far too large: the first steps overflow and change nothing, the scale falls, the rest learns.

    The very scaler and autocast that CUDA uses, on a CPU.
    """
    module, taken = linear(), []
    batches = Batches(module, lesson(module, points(512), tmp_path))
    precision = MixedPrecision("cpu", torch.float16, first_scale=2.0**30)
    step = precision.step

    def noted(loss: Tensor, optimiser: torch.optim.Optimizer) -> bool:
        before = module.weight.detach().clone()
        taken.append(step(loss, optimiser))
        assert torch.equal(before, module.weight) is not taken[-1]
        return taken[-1]

    precision.step = noted  # type: ignore[method-assign]
    history = fit(
        module,
        cross_entropy(module),
        batches,
        epochs=12,
        learning_rate=0.1,
        progress=lambda _share: None,
        precision=precision,
    )
    assert not taken[0]
    assert all(taken[-40:])
    assert history[-1]["task"] < history[0]["task"] / 3
    assert module.weight.dtype == torch.float32
    assert bool(module.weight.isfinite().all())


def test_training_in_which_every_step_overflows_is_refused(tmp_path: Path) -> None:
    """A scaler that never finds a scale leaves the module untrained, which nobody should take for trained."""
    module = linear()
    batches = Batches(module, lesson(module, points(), tmp_path))
    precision = MixedPrecision("cpu", torch.float16, first_scale=2.0**100)
    with pytest.raises(RecipeRejected, match="every step overflowed"):
        fit(
            module,
            cross_entropy(module),
            batches,
            epochs=1,
            learning_rate=0.1,
            progress=lambda _share: None,
            precision=precision,
        )


@pytest.mark.parametrize("reduced", [None, torch.bfloat16])
def test_without_fp16_nothing_is_scaled(reduced: torch.dtype | None) -> None:
    """fp32 and bf16 have the range: their step is the optimiser's own, to the bit."""
    ours, plain = linear(), linear()
    losses = [(module(torch.ones(2, 4)) ** 2).mean() for module in (ours, plain)]
    assert MixedPrecision("cpu", reduced).step(losses[0], torch.optim.SGD(ours.parameters(), lr=0.1))
    losses[1].backward()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert torch.equal(ours.weight, plain.weight)


def test_autocast_computes_in_the_reduced_precision() -> None:
    """The context that training runs in: products in fp16 there, fp32 where nothing is reduced."""
    for reduced, expected in ((None, torch.float32), (torch.float16, torch.float16)):
        with MixedPrecision("cpu", reduced).autocast():
            assert linear()(torch.ones(2, 4)).dtype == expected


def test_a_trained_module_comes_back_ready_to_be_exported(tmp_path: Path) -> None:
    """Every layer in eval mode: a dropout that stayed active would give other answers each time."""
    module = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5))
    finetune(module, copy.deepcopy(module).eval(), lesson(module.eval(), points(), tmp_path))
    assert not any(layer.training for layer in module.modules())
    inputs = torch.ones(1, 4)
    assert torch.equal(module(inputs), module[0](inputs))
