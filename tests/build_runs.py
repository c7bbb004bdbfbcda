"""Builds run in this process, whose words and results can be read."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from rich.console import Console

import variants.plan
from variants.build import build
from variants.progress import Reporter
from variants.recipes import RECIPES
from variants.recipes.chain import Step, run_chain
from variants.recipes.recipe import Product, Recipe
from variants.repository import ModelFolder
from variants.variant import Card


class Paper(Reporter):
    """A reporter whose words can be read."""

    def __init__(self) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        super().__init__(Console(file=self.out, width=300), Console(file=self.err, width=300))


def run(path: Path, **options: Any) -> tuple[int, str, str]:
    """Build and return the exit code, standard output and standard error."""
    paper = Paper()
    return build(path, reporter=paper, **options), paper.out.getvalue(), paper.err.getvalue()


def cards(model: Path) -> dict[str, Card]:
    """The verified cards of a model's newest version."""
    return ModelFolder(model).newest().cards()


def stamps(model: Path) -> dict[str, int]:
    """When each file of the newest version was last written."""
    return {str(path): path.stat().st_mtime_ns for path in (model / "1/variants").rglob("*") if path.is_file()}


def with_recipe(monkeypatch: pytest.MonkeyPatch, name: str, make: Callable[..., Any]) -> None:
    """Put a recipe in place of a real one."""
    monkeypatch.setattr(variants.plan, "RECIPES", MappingProxyType({**RECIPES, name: Recipe(make)}))


def ending(patch: pytest.MonkeyPatch, error: BaseException, *recipes: str) -> None:
    """Let these recipes, or else every one, end this way; what they are made from does not change by that."""

    def run_or_end(steps: Sequence[Step], *given: Any) -> Product:
        if not recipes or any(step.name in recipes for step in steps):
            raise error
        return run_chain(steps, *given)

    patch.setattr("variants.factory.run_chain", run_or_end)
