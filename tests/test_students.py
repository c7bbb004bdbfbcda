"""Students: how they come from a source, and which are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training_fixtures import lesson, points, stack

from variants.data import Samples
from variants.export import example_tensors
from variants.networks.blocks import InvertedResidual
from variants.recipes.distillation.hints import pair_layers
from variants.recipes.distillation.students import Initial, count_weights, student_of
from variants.recipes.recipe import Ingredients, RecipeRejected

INPUT = {"input": torch.randn(2, 4)}


def make(name: str, given: Ingredients, *, width: float = 0.5, depth: float = 0.5, initial: Initial = "kept") -> Any:
    """A student with the default shares."""
    module, example = given.source.module, given.example
    assert module is not None
    assert example is not None
    tensors = example_tensors(module, example.inputs, 4, batched=True)
    return student_of(name, module, tensors, width=width, depth=depth, initial=initial)


@pytest.fixture
def given(tmp_path: Path) -> Ingredients:
    """A fully connected teacher of four blocks."""
    return lesson(stack(4), points(), tmp_path)


def test_without_repeated_blocks_there_is_no_shallower_student(tmp_path: Path) -> None:
    """The reason says what to ask for instead."""
    with pytest.raises(RecipeRejected, match=r"no repeated blocks.*student: narrower"):
        make("shallower", lesson(stack(1), points(), tmp_path))


def test_a_narrower_student_has_that_share_of_the_channels(given: Ingredients) -> None:
    """Half the width, about a quarter of the inner weights, and the same answers' shape."""
    student = make("narrower", given)
    assert [layer.out_features for layer in student if isinstance(layer, nn.Linear)] == [4, 4, 4, 4, 4, 2]


def test_fresh_students_forget_what_kept_ones_know(given: Ingredients) -> None:
    """Both have the same shapes; only the kept one's first layer is a part of the teacher's."""
    kept, fresh = (make("shallower", given, initial=initial) for initial in ("kept", "fresh"))
    first = given.source.module[0].weight  # type: ignore[index]
    assert [tuple(p.shape) for p in kept.parameters()] == [tuple(p.shape) for p in fresh.parameters()]
    assert torch.equal(kept[0].weight, first)
    assert not torch.equal(fresh[0].weight, first)


def test_the_teacher_stays_as_it_is(given: Ingredients) -> None:
    """A student is a network of its own."""
    before = {name: value.clone() for name, value in given.source.module.state_dict().items()}  # type: ignore[union-attr]
    for name in ("narrower", "shallower"):
        with torch.no_grad():
            for parameter in make(name, given).parameters():
                parameter.zero_()
    after = given.source.module.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("name", ["mobilenet-v2", "mobilenet-v3", "mobilenet-v3-large", "efficientnet"])
def test_built_in_students_fit_the_model(name: str, tmp_path: Path) -> None:
    """Channels and classes are the model's own; the widths are scaled."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2000), nn.ReLU(), nn.Linear(2000, 7)).eval()
    images = Samples({"input": np.zeros((9, 3, 16, 16), np.float32)})
    small, large = (make(name, lesson(teacher, images, tmp_path), width=width) for width in (0.1, 0.3))
    assert small(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    assert count_weights(small) < count_weights(large)


def test_layers_of_built_in_students_have_their_names(tmp_path: Path) -> None:
    """Hints can be taken from any block, by its path in the network, and the input has the model's name."""

    class Image(nn.Sequential):
        def forward(self, image: Tensor) -> Tensor:
            answer: Tensor = super().forward(image)  # type: ignore[no-untyped-call]
            return answer

    teacher = Image(nn.Conv2d(3, 4000, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4000, 70)).eval()
    images = {"image": np.zeros((9, 3, 8, 8), np.float32)}
    student = make("mobilenet-v3", lesson(teacher, Samples(images), tmp_path), width=0.1)
    (pair,) = pair_layers(teacher, student, images, {"0": "features.3"})
    assert pair.student.channels == 8
    assert isinstance(student.get_submodule("features.3"), InvertedResidual)


def test_making_a_student_leaves_the_process_its_randomness(given: Ingredients) -> None:
    """Fresh weights are the same each time, and what draws numbers afterwards goes on as if there had been none."""
    first = make("shallower", given, initial="fresh")
    torch.manual_seed(1234)
    state = torch.get_rng_state()
    assert torch.equal(make("shallower", given, initial="fresh")[0].weight, first[0].weight)
    assert torch.equal(torch.get_rng_state(), state)


def test_depth_thins_an_efficientnet(tmp_path: Path) -> None:
    """Half as deep is smaller at the same width."""
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 9000), nn.ReLU(), nn.Linear(9000, 500)).eval()
    given = lesson(teacher, Samples({"input": np.zeros((9, 1, 8, 8), np.float32)}), tmp_path)
    deep, flat = (make("efficientnet", given, depth=depth) for depth in (1.0, 0.5))
    assert count_weights(flat) < 0.8 * count_weights(deep)


def test_built_in_students_are_for_images(given: Ingredients) -> None:
    """Vectors are no images, and the message shows what the model takes."""
    with pytest.raises(RecipeRejected, match=r"takes one input \[batch, channels, height, width\].*\[\[4, 4\]\]"):
        make("mobilenet-v2", given)


class Other(nn.Linear):
    """A forward with another input's name."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image)


def own(**factories: Any) -> ModuleType:
    """A module as a person might write it."""
    module = ModuleType("own_students")
    vars(module).update(factories)
    return module


def broken() -> nn.Module:
    """A factory that fails."""
    raise OSError("no such file")


@pytest.mark.parametrize(
    ("factory", "said"),
    [
        ("good", None),
        ("missing", "failed: AttributeError"),
        ("broken", "failed: OSError: no such file"),
        ("no_module", "must return a torch.nn.Module, not int"),
        ("other_classes", r"answers with output float32\[4, 3\], the model with output float32\[4, 2\]"),
        ("does_not_run", "does not run: RuntimeError"),
        ("other_name", "takes other inputs than the model"),
        ("too_large", "has 604 weights, no fewer than the model's 346"),
    ],
)
def test_a_students_own_factory_is_proven(
    given: Ingredients, monkeypatch: pytest.MonkeyPatch, factory: str, said: str | None
) -> None:
    """Whatever is wrong with a person's student is said before it is trained."""
    students = own(
        good=lambda: nn.Linear(4, 2),
        broken=broken,
        no_module=lambda: 3,
        other_classes=lambda: nn.Linear(4, 3),
        does_not_run=lambda: nn.Linear(5, 2),
        other_name=lambda: Other(4, 2),
        too_large=lambda: nn.Sequential(nn.Linear(4, 86), nn.Linear(86, 2)),
    )
    monkeypatch.setitem(sys.modules, "own_students", students)
    if said is None:
        assert count_weights(make(f"own_students:{factory}", given)) == 10
        return
    with pytest.raises(RecipeRejected, match=said):
        make(f"own_students:{factory}", given)
