"""A chain of recipes: each step starts from what the step before it made, e.g. ``[prune-channels, int8-static]``.

Rules of this file: a chain ends like a recipe, with one product; steps that several chains begin with are made once a
build. A step that needs a module comes before those that only change the graph.
"""

from __future__ import annotations

import json
from collections.abc import Container, MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

from variants.model_config import Section
from variants.recipes.recipe import Ingredients, Product, Recipe, RecipeRejected
from variants.runtimes.onnx_signature import read_signature

Made = MutableMapping[str, Product]
"""What was made so far in this build, by the steps that made it."""


@dataclass(frozen=True, slots=True)
class Step:
    """A recipe by its name, with checked parameters."""

    name: str
    recipe: Recipe
    parameters: Section

    def facts(self) -> dict[str, object]:
        """What decides the result, as plain JSON values."""
        return {"recipe": self.name, "parameters": self.parameters.model_dump(mode="json")}


def run_chain(steps: Sequence[Step], ingredients: Ingredients, made: Made) -> Product:
    """Make the steps one after another. Raises RecipeRejected, saying which step does not apply."""
    product = None
    for position, step in enumerate(steps):
        key = json.dumps([each.facts() for each in steps[: position + 1]])
        if key not in made:
            made[key] = _run(step, position, _after(product, ingredients), is_chain=len(steps) > 1)
        product = made[key]
    if product is None:
        raise RecipeRejected("a variant needs at least one recipe")
    return product if len(steps) == 1 else _with_history(steps, made, product)


def _run(step: Step, position: int, ingredients: Ingredients, *, is_chain: bool) -> Product:
    work = ingredients.work / f"{position}-{step.name}"
    work.mkdir()
    try:
        return step.recipe.make(replace(ingredients, work=work), step.parameters)
    except RecipeRejected as error:
        if is_chain:
            raise RecipeRejected(f"{step.name}: {error}", error.findings) from error
        raise


def _after(product: Product | None, ingredients: Ingredients) -> Ingredients:
    """The ingredients with what was made as the source."""
    if product is None:
        return ingredients
    graph = product.files[product.artefact]
    source = replace(ingredients.source, graph=graph, signature=read_signature(graph), module=product.module)
    return replace(ingredients, source=source)


def _with_history(steps: Sequence[Step], made: Made, last: Product) -> Product:
    """The last product with the facts of every step under the step's name, and the findings of all.

    What is there twice has its number behind its name, e.g. `distilled 2`.
    """
    facts: dict[str, object] = {}
    findings: dict[str, object] = {}
    for position, step in enumerate(steps):
        product = made[json.dumps([each.facts() for each in steps[: position + 1]])]
        facts[free_name(step.name, facts)] = step.parameters.model_dump(mode="json") | dict(product.facts)
        findings |= {free_name(name, findings): finding for name, finding in product.findings.items()}
    return replace(last, facts=facts, findings=findings)


def free_name(name: str, taken: Container[str]) -> str:
    """The name, or the first free one of `name 2`, `name 3` and so on."""
    return name if name not in taken else next(each for n in count(2) if (each := f"{name} {n}") not in taken)
