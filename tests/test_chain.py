"""Chains of recipes: what each step starts from, what is made once, and what model.yaml may say of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import Field
from recipe_fixtures import ingredients, product_graph, run

from variants.hardware import Hardware
from variants.model_config import RepositoryError, Section, VariantConfig, read_model_config
from variants.plan import plan
from variants.recipes.chain import Step, run_chain
from variants.recipes.int8.dynamic import quantize_dynamic
from variants.recipes.pruning.unstructured import PruneUnstructured
from variants.recipes.recipe import Ingredients, NoParameters, Product, Recipe, RecipeRejected
from variants.repository import ModelFolder


class Factor(Section):
    """What the weights are multiplied by."""

    by: float = Field(2.0, gt=0)


@dataclass
class Scaling:
    """A recipe that multiplies every weight, and counts how often it was asked."""

    calls: list[float] = field(default_factory=list)

    def __call__(self, given: Ingredients, parameters: Factor) -> Product:
        self.calls.append(parameters.by)
        model = onnx.load(given.source.graph)
        weight = onnx.numpy_helper.to_array(model.graph.initializer[0])
        scaled = (weight * parameters.by).astype(np.float32)
        model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(scaled, "w"))
        onnx.save(model, given.work / "scaled.onnx")
        return Product(
            {"model.onnx": given.work / "scaled.onnx"}, facts={"by": parameters.by}, findings={"seen": parameters.by}
        )


def refuse(_: Ingredients, __: NoParameters) -> Product:
    """A recipe that never applies."""
    raise RecipeRejected("not today")


def step(name: str, scaling: Scaling, by: float) -> Step:
    """One step of a chain of scalings."""
    return Step(name, Recipe(scaling, Factor), Factor(by=by))


@pytest.fixture
def given(tmp_path: Path) -> Ingredients:
    """A graph whose answer is its input."""
    return ingredients(product_graph(tmp_path / "g.onnx", np.eye(2)), tmp_path)


ONES = np.ones((1, 2), np.float32)


def test_each_step_starts_from_what_the_one_before_made(given: Ingredients) -> None:
    """Doubling and then tripling is six times; the card hears of both under their names."""
    scaling = Scaling()
    made = run_chain([step("double", scaling, 2), step("triple", scaling, 3)], given, {})
    assert run(made.files["model.onnx"], x=ONES).tolist() == [[6.0, 6.0]]
    assert made.facts == {"double": {"by": 2.0}, "triple": {"by": 3.0}}


def test_a_recipe_used_twice_is_heard_of_twice(given: Ingredients) -> None:
    """The second time its facts stand under the name with a number, and findings of one name too; none is lost."""
    scaling = Scaling()
    made = run_chain([step("scale", scaling, 2), step("scale", scaling, 3), step("scale", scaling, 5)], given, {})
    assert made.facts == {"scale": {"by": 2.0}, "scale 2": {"by": 3.0}, "scale 3": {"by": 5.0}}
    assert made.findings == {"seen": 2.0, "seen 2": 3.0, "seen 3": 5.0}


def test_one_step_is_no_chain(given: Ingredients) -> None:
    """A single recipe's facts stand on the card without its name around them."""
    assert run_chain([step("double", Scaling(), 2)], given, {}).facts == {"by": 2.0}


def test_a_common_beginning_is_made_once(tmp_path: Path, given: Ingredients) -> None:
    """Two chains that begin alike share their beginning; the same step with other parameters is another."""
    scaling, made = Scaling(), dict[str, Product]()
    for number, steps in enumerate(([2.0], [2.0, 3.0], [2.0, 5.0], [4.0, 3.0])):
        (tmp_path / str(number)).mkdir()
        own = Ingredients(**{name: getattr(given, name) for name in given.__slots__} | {"work": tmp_path / str(number)})
        run_chain([step(f"step {at}", scaling, by) for at, by in enumerate(steps)], own, made)
    assert scaling.calls == [2.0, 3.0, 5.0, 4.0, 3.0]


def test_a_chain_says_which_step_does_not_apply(given: Ingredients) -> None:
    """The reason of a rejected chain begins with the recipe that gave it."""
    steps = [step("double", Scaling(), 2), Step("refuse", Recipe(refuse), NoParameters())]
    with pytest.raises(RecipeRejected, match=r"^refuse: not today$"):
        run_chain(steps, given, {})


def test_real_recipes_chain(tmp_path: Path) -> None:
    """Zeros of the first step are zeros in the second one's int8 weights."""
    weight = np.random.default_rng(0).normal(size=(64, 64))
    own = ingredients(product_graph(tmp_path / "g.onnx", weight), tmp_path)
    entry = VariantConfig.model_validate({"name": "both", "recipe": ["prune-unstructured", "int8-dynamic"]})
    from variants.recipes import RECIPES

    steps = [Step(each.recipe, RECIPES[each.recipe], RECIPES[each.recipe].parameters()) for each in entry.steps]
    made = run_chain(steps, own, {})
    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(made.files["model.onnx"]).graph.initializer]
    integers = next(t for t in tensors if t.dtype == np.int8 and t.size == weight.size)
    assert (integers == 0).mean() >= 0.5
    assert made.precision == "int8"


def planned(folder: Path, entry: str) -> Any:
    """The last planned variant of a model with this entry."""
    (folder / "1").mkdir(parents=True)
    product_graph(folder / "1/model.onnx", np.eye(2))
    (folder / "model.yaml").write_text(f"variants: [{entry}]\n")
    return plan(ModelFolder(folder).newest(), Hardware(cores=1, cpu="test"), quick=False)[-1]


def test_a_parameter_goes_to_every_step_that_knows_it(tmp_path: Path) -> None:
    """`sparsity` belongs to pruning, `reduce_range` to int8, and a step may have its own."""
    chain = "{name: x, recipe: [prune-unstructured, int8-dynamic], sparsity: 0.75, reduce_range: true}"
    first, second = planned(tmp_path / "a", chain).steps
    assert isinstance(first.parameters, PruneUnstructured)
    assert (first.parameters.sparsity, second.parameters.reduce_range) == (0.75, True)
    own = "{name: x, recipe: [{recipe: prune-unstructured, sparsity: 0.25}, int8-dynamic]}"
    assert planned(tmp_path / "b", own).steps[0].parameters.sparsity == 0.25
    assert second.recipe.make is quantize_dynamic


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            "{name: x, recipe: [prune-unstructured, int8-dynamics]}",
            "unknown recipe 'int8-dynamics'; did you mean 'int8-d",
        ),
        (
            "{name: x, recipe: [prune-unstructured, int8-dynamic], sparsty: 0.5}",
            "unknown key 'sparsty'; did you mean 'sp",
        ),
        ("{name: x, recipe: [{recipe: prune-unstructured, sparsity: 2}]}", "sparsity: Input should be less than 1"),
        ("{name: x, recipe: []}", r"variants.0.recipe: Tuple should have at least 1 item"),
        ("{name: x, recipe: [7]}", r"variants.0.recipe.0: a recipe is a name, a mapping with `recipe`, or a list"),
    ],
)
def test_a_mistake_in_a_chain_is_named(tmp_path: Path, entry: str, message: str) -> None:
    """Unknown recipes and parameters are errors that name the nearest valid one and where they stand."""
    with pytest.raises(RepositoryError, match=message):
        planned(tmp_path / "m", entry)


def test_the_usual_combinations_have_names(tmp_path: Path) -> None:
    """`pruned-int8` and `distilled-int8` are chains that nobody has to spell out."""
    (tmp_path / "model.yaml").write_text("variants: [pruned-int8, distilled-int8]\n")
    config = read_model_config(tmp_path / "model.yaml")
    assert [variant.recipe for variant in config.variants or ()] == [
        "prune-channels + int8-static",
        "distilled + int8-static",
    ]
