"""Which variants a build makes, from which recipes, and which of them are there already.

Rules of this file: nothing is imported that takes seconds, so that a build with nothing to do says so at once. A
variant is current when its fingerprint is unchanged and its files still are what the manifest says.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from variants.data import array_shapes
from variants.hardware import Hardware, needs_reduced_range, possible_precision
from variants.model_config import (
    RepositoryError,
    VariantConfig,
    nearest,
    one_line,
)
from variants.recipes import RECIPES
from variants.recipes.chain import Step, free_name
from variants.recipes.recipe import Product
from variants.repository import VersionFolder, file_sha256
from variants.variant import REFERENCE

DEFAULT_VARIANTS = (REFERENCE, "amp", "int8-dynamic", "int8-static", "pruned")
DEFAULT_ONNX_VARIANTS = (*DEFAULT_VARIANTS, "pruned-unstructured")

_TOOLS = (
    "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "onnxscript", "openvino",
    "safetensors", "torch",
)  # fmt: skip
_MAKING = ("data.py", "export.py", "networks", "recipes", "source.py", "trial.py")
_JUDGING = (
    *_MAKING,
    "cost.py",
    "evaluate.py",
    "factory.py",
    "fidelity.py",
    "intervals.py",
    "runtimes",
    "scores.py",
    "verify.py",
)


@dataclass(frozen=True, slots=True)
class Planned:
    """A variant to build; `made` covers everything that decides its artefact, `fingerprint` its card too."""

    name: str
    steps: tuple[Step, ...]
    made: str
    fingerprint: str

    @property
    def recipe(self) -> str:
        """The recipes' names, as one."""
        return " + ".join(step.name for step in self.steps)

    @property
    def parameters(self) -> dict[str, object]:
        """What was asked for, as the card has it: by step where there are several."""
        asked: dict[str, dict[str, object]] = {}
        for step in self.steps:
            asked[free_name(step.name, asked)] = step.parameters.model_dump(mode="json")
        return dict(asked) if len(self.steps) > 1 else asked[self.steps[0].name]


def plan(
    version: VersionFolder, hardware: Hardware, *, quick: bool, entries: Sequence[VariantConfig] | None = None
) -> list[Planned]:
    """The variants of a version, or of `entries` in place of those it names, the reference first.

    Raises RepositoryError for an unknown recipe or parameter.
    """
    making = {"inputs": _making(version), "tools": tool_versions(), "factory": _hashes_of(_MAKING), "quick": quick}
    judging = {"inputs": _judging(version), "factory": _hashes_of(_JUDGING), "cuda": bool(hardware.cuda)}
    planned = []
    for entry in _reference_first(_entries(version) if entries is None else entries):
        steps = _checked(version, entry)
        facts = making | {"steps": [step.facts() for step in steps]}
        if any(step.recipe.chooses(step.parameters) for step in steps):
            facts["gate"] = judging["inputs"]
        if any(step.name == "amp" for step in steps):
            facts["amp"] = [possible_precision(hardware, device).precision for device in ("cpu", "cuda")]
        if any(step.name.startswith("int8") for step in steps):
            facts["reduced_range"] = needs_reduced_range(hardware)
        made = _digest(facts)
        planned.append(Planned(entry.name, steps, made, _digest(judging | {"made": made})))
    return planned


def _digest(facts: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def is_current(version: VersionFolder, planned: Planned) -> bool:
    """Whether the variant was built from the same things and nothing was changed or lost since."""
    try:
        entry = version.manifest().variants.get(planned.name)
        if entry is None or entry.fingerprint != planned.fingerprint:
            return False
        card = version.card(planned.name)
        if card is None:
            return False
        for file in card.artefacts:
            version.artefact(planned.name, file)
    except RepositoryError:  # damaged: build it again
        return False
    return True


def kept_product(version: VersionFolder, planned: Planned) -> Product | None:
    """What an earlier build made of the same things and parent, to be judged anew; None if it must be made."""
    try:
        entry = version.manifest().variants.get(planned.name)
        card = version.stored_card(planned.name) if entry and entry.made == planned.made else None
        if entry is None or card is None or card.artefact is None:
            return None
        if card.parent is not None and entry.parent_sha256 != version.stored_card(card.parent).sha256:
            return None
        names = [card.artefact, *(name for name in card.artefacts if name != card.artefact)]
        files = {name: version.artefact(planned.name, name) for name in names}
    except RepositoryError:  # damaged: make it again
        return None
    precision = str(card.requirements.get("precision", REFERENCE))
    return Product(files, precision=precision, facts=card.parameters, findings=card.findings)


def tool_versions() -> dict[str, str]:
    """The installed versions of everything that takes part in making or judging a variant."""
    versions = {"python": ".".join(map(str, sys.version_info[:3]))}
    for tool in _TOOLS:
        try:
            versions[tool] = package_version(tool)
        except PackageNotFoundError:
            continue
    return versions


def _entries(version: VersionFolder) -> Sequence[VariantConfig]:
    """The configured variants or the defaults."""
    if version.model.config.variants is not None:
        return version.model.config.variants
    defaults = DEFAULT_ONNX_VARIANTS if version.source.onnx else DEFAULT_VARIANTS
    return [VariantConfig.model_validate(name) for name in defaults]


def _reference_first(entries: Sequence[VariantConfig]) -> list[VariantConfig]:
    reference = VariantConfig.model_validate(REFERENCE)
    own = [entry for entry in entries if entry.name == REFERENCE]
    return [*(own or [reference]), *(entry for entry in entries if entry.name != REFERENCE)]


def _checked(version: VersionFolder, entry: VariantConfig) -> tuple[Step, ...]:
    """The recipes of an entry with their parameters. Raises RepositoryError that names the nearest valid one.

    A parameter of the entry goes to every step that knows it; one that no step knows is a mistake.
    """
    where = f"{version.model.path / 'model.yaml'}: variants: {entry.name}"
    for step in entry.steps:
        if step.recipe not in RECIPES:
            raise RepositoryError(f"{where}: unknown recipe {step.recipe!r}; {nearest(step.recipe, RECIPES)}")
    recipes = [RECIPES[step.recipe] for step in entry.steps]
    known = {name for recipe in recipes for name in recipe.parameters.model_fields}
    for name in entry.parameters:
        if name not in known:
            raise RepositoryError(f"{where}: unknown key {name!r}; {nearest(name, known)}")
    steps = []
    for step, recipe in zip(entry.steps, recipes, strict=True):
        shared = {name: value for name, value in entry.parameters.items() if name in recipe.parameters.model_fields}
        try:
            parameters = recipe.parameters.model_validate(shared | step.parameters)
        except ValidationError as error:
            raise RepositoryError(one_line(error, where)) from error
        steps.append(Step(step.recipe, recipe, parameters))
    return tuple(steps)


_NOT_MADE_FROM: dict[str, Any] = {
    "variants": True,
    "auto": True,
    "slo": True,
    "gate": True,
    "evaluation": True,
    "batching": {"max_queue_delay_ms"},
}


def _making(version: VersionFolder) -> dict[str, object]:
    """What a person gave to make variants from: configuration and the content of every file it names."""
    config = version.model.config
    files = [section.data for section in (config.calibration, config.training, config.tuning) if section is not None]
    files += [file for file in (version.source.onnx, version.source.weights) if file is not None]
    said = config.model_dump(mode="json", exclude=_NOT_MADE_FROM)
    said |= {"source": version.source.model_dump(mode="json"), "metric": config.metric, "traced": _traced(version)}
    return {"said": said, "files": {file: file_sha256(version.resolve(file)) for file in files}, "code": _code(version)}


def _traced(version: VersionFolder) -> list[object]:
    """The shapes of the samples that a torch source is traced with: all but the first dimension are in the graph."""
    config = version.model.config
    sections = (config.evaluation, config.calibration, config.training) if version.source.module else ()
    return [array_shapes(version.resolve(section.data)) for section in sections if section is not None]


def _judging(version: VersionFolder) -> dict[str, object]:
    """What a person gave to judge variants by: the gate, and the evaluation data."""
    config = version.model.config
    said = config.model_dump(mode="json", include={"gate", "evaluation"})
    return said | {"data": file_sha256(version.resolve(config.evaluation.data)) if config.evaluation else None}


def _code(version: VersionFolder) -> dict[str, dict[str, str]]:
    """The content of the module or package that makes a torch source, and of all Python files in the model's folder.

    The module is looked for where `load_module` finds it. What it imports from elsewhere is not followed: a change
    there needs `--force`.
    """
    if version.source.module is None:
        return {}
    model, top = version.model.path, version.source.module.partition(":")[0].partition(".")[0]
    importlib.invalidate_caches()
    spec = PathFinder.find_spec(top, [str(model), str(Path.cwd()), *sys.path]) or importlib.util.find_spec(top)
    code = {"model": _hashes(model, model.rglob("*.py"))}
    for folder in (spec and spec.submodule_search_locations) or ():
        code[f"package {len(code)}"] = _hashes(Path(folder), Path(folder).rglob("*.py"))
    if spec and spec.origin and not spec.submodule_search_locations:
        code["module"] = _hashes(Path(spec.origin).parent, [Path(spec.origin)])
    return code


def _hashes_of(names: Iterable[str]) -> dict[str, str]:
    """The content of our own code that makes or judges variants: a changed recipe makes changed variants."""
    here = Path(__file__).parent
    paths = [here / name for name in names]
    return _hashes(here, (file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])))


def _hashes(root: Path, files: Iterable[Path]) -> dict[str, str]:
    """sha256 by path below `root`: two files of one name in different folders both count."""
    return {str(file.relative_to(root)): file_sha256(file) for file in sorted(files) if file.is_file()}
