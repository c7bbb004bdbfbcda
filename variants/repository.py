"""The model repository on disk <-> values: models, versions, cards and the manifest.

Rules of this file: imports neither torch nor onnx, because the server reads the repository too. Every path resolves
inside its model's folder, symbolic links included. Whatever is written appears whole or not at all. The manifest is
the root of trust: a file that is not in it, or whose sha256 differs, is never handed out.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from variants.durable import copy_durably, swap_folder, write_durably
from variants.model_config import (
    NAME_PATTERN,
    ModelConfig,
    RepositoryError,
    SourceConfig,
    one_line,
    read_model_config,
)
from variants.variant import REFERENCE, Card

__all__ = [
    "Manifest", "ModelFolder", "Repository", "RepositoryError", "VersionFolder", "file_sha256", "open_path",
]  # fmt: skip

SCHEMA_VERSION = 1
_STAGED, _ASIDE = ".new-", ".old-"
"""What a variant's folder is called before it takes its place, and after it has left it to its successor."""

_CARD = TypeAdapter(Card)


class _CardFile(BaseModel):
    """A `card.json`: the card's own keys beside the version of this schema."""

    model_config = ConfigDict(extra="allow")

    schema_version: Literal[1]


class ManifestEntry(BaseModel):
    """What the manifest knows of one variant: what it was made from.

    `fingerprint` covers everything that decides artefact and card, `made` what decides the artefact alone; empty means
    "again". `parent_sha256` is the parent's artefact (or, for the reference, the source), `evaluation_sha256` a digest
    of the data it was measured on and of target, metric and task: a variant whose reference has another is stale.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str = ""
    made: str = ""
    parent_sha256: str | None = None
    evaluation_sha256: str | None = None


class Manifest(BaseModel):
    """A version's `manifest.json`: sha256 of every file the server may load, tool versions, parents."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    files: dict[str, str] = Field(default_factory=dict)
    tools: dict[str, str] = Field(default_factory=dict)
    variants: dict[str, ManifestEntry] = Field(default_factory=dict)


def file_sha256(path: Path) -> str:
    """The sha256 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_path(path: Path) -> list[ModelFolder]:
    """The models at `path`, which is a model's folder or a repository of them. Raises RepositoryError."""
    if not path.is_dir():
        raise RepositoryError(f"{path}: no such folder")
    if (path / "model.yaml").exists() or _version_numbers(path):
        return [ModelFolder(path)]
    models = Repository(path).models()
    if not models:
        raise RepositoryError(f"{path}: neither a model (no model.yaml, no version folder) nor a repository of models")
    return models


class Repository:
    """A folder of models."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def models(self) -> list[ModelFolder]:
        """Every model, by name; hidden folders are no models. Raises RepositoryError if the root is not there."""
        if not self.root.is_dir():
            raise RepositoryError(f"{self.root}: no such folder")
        folders = sorted(entry for entry in self.root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        return [ModelFolder(folder) for folder in folders]


class ModelFolder:
    """One model: its name, its configuration and its versions. Reading is lazy, so one bad model harms no other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._config: ModelConfig | None = None

    @property
    def name(self) -> str:
        """The model's name: the folder's. Raises RepositoryError if it is not a valid one."""
        name = self.path.absolute().name
        if not re.fullmatch(NAME_PATTERN, name):
            raise RepositoryError(f"{self.path}: a model's name must match {NAME_PATTERN}, not {name!r}")
        return name

    @property
    def config(self) -> ModelConfig:
        """`model.yaml`, or the defaults without one. Raises RepositoryError."""
        if self._config is None:
            self._config = read_model_config(self.path / "model.yaml")
        return self._config

    def versions(self) -> list[VersionFolder]:
        """All versions, ascending."""
        return [VersionFolder(self, number) for number in _version_numbers(self.path)]

    def newest(self) -> VersionFolder:
        """The highest version, built or not: what `build` works on. Raises RepositoryError if there is none."""
        versions = self.versions()
        if not versions:
            raise RepositoryError(f"{self.path}: no version folder (a positive integer such as {self.path.name}/1)")
        return versions[-1]

    def serving(self) -> VersionFolder:
        """The highest built version, else the highest with a bare ONNX source. Raises RepositoryError."""
        newest_first = list(reversed(self.versions()))
        for version in newest_first:
            if version.is_built:
                return version
        for version in newest_first:
            if version.onnx_source is not None:
                return version
        raise RepositoryError(f"{self.path}: no version is built and none has an ONNX source; run `gearshift build`")


class VersionFolder:
    """One version of a model: source, data, variants with their cards, and the manifest that vouches for them."""

    def __init__(self, model: ModelFolder, number: int) -> None:
        self.model = model
        self.number = number
        self.path = model.path / str(number)

    @property
    def source(self) -> SourceConfig:
        """The configured source, else `source/model.onnx`, else a bare `model.onnx`. Raises RepositoryError."""
        if self.model.config.source is not None:
            return self.model.config.source
        for relative in ("source/model.onnx", "model.onnx"):
            if (self.path / relative).is_file():
                return SourceConfig(onnx=relative)
        raise RepositoryError(f"{self.path}: no source: neither `source` in model.yaml nor source/model.onnx")

    @property
    def onnx_source(self) -> Path | None:
        """The source's ONNX file if it is one and exists, else None."""
        try:
            relative = self.source.onnx
            return self.resolve(relative) if relative else None
        except RepositoryError:
            return None

    @property
    def is_built(self) -> bool:
        """Whether the reference was built; everything else about this version may still be missing."""
        folder = self.variant_dir(REFERENCE)
        has_card = any((place / "card.json").is_file() for place in (folder, _aside(folder)))
        return has_card and REFERENCE in self.manifest().variants

    def resolve(self, relative: str) -> Path:
        """An existing file named in `model.yaml` or the manifest, relative to this version. Raises RepositoryError."""
        path = (self.path / relative).resolve()
        if Path(relative).is_absolute() or not path.is_relative_to(self.model.path.resolve()):
            raise RepositoryError(f"{self.path}: {relative!r} leads outside the model's folder")
        if not path.is_file():
            raise RepositoryError(f"{self.path}: {relative!r} is not there")
        return path

    def variant_dir(self, name: str) -> Path:
        """Where a variant's artefact and card are. Raises RepositoryError for a name that is no folder name."""
        if not re.fullmatch(NAME_PATTERN, name):
            raise RepositoryError(f"{self.path}: a variant's name must match {NAME_PATTERN}, not {name!r}")
        return self.path / "variants" / name

    def manifest(self) -> Manifest:
        """The manifest, empty before the first build. Raises RepositoryError if it cannot be understood."""
        path = self.path / "manifest.json"
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return Manifest()
        except ValidationError as error:
            raise RepositoryError(one_line(error, str(path))) from error

    def verify(self, relative: str) -> Path:
        """The path of a file whose sha256 is the manifest's. Raises RepositoryError that names the file.

        A killed build may have left it where its variant stepped aside to: it is found there too, since a reader
        cannot `recover`, least of all in a read-only repository.
        """
        expected = self.manifest().files.get(relative)
        if expected is None:
            raise RepositoryError(f"{self.path}: {relative!r} is not in the manifest; run `gearshift build`")
        aside = f"variants/{_ASIDE}{relative.removeprefix('variants/')}"
        for place in (relative, aside):
            if (self.path / place).is_file() and file_sha256(self.resolve(place)) == expected:
                return self.resolve(place)
        path = self.resolve(relative)
        raise RepositoryError(f"{path}: changed since it was built (its sha256 is not the manifest's)")

    def artefact(self, variant: str, file: str) -> Path:
        """A variant's artefact file, verified. Raises RepositoryError."""
        return self.verify(f"variants/{variant}/{file}")

    def cards(self) -> dict[str, Card]:
        """The verified cards by variant name, without stale ones; see `card`. Raises RepositoryError."""
        found = {name: self.card(name) for name in sorted(self.manifest().variants)}
        return {name: card for name, card in found.items() if card is not None}

    def card(self, name: str) -> Card | None:
        """One verified card; None if it is stale: its parent was rebuilt, or measured on other data, since.

        Raises RepositoryError for a card, or a parent's, that was changed or cannot be understood.
        """
        card, entries = self.stored_card(name), self.manifest().variants
        if card.parent is None:
            return card
        if card.parent not in entries:
            return None
        own, parent = entries[name], entries[card.parent]
        is_current = own.parent_sha256 == self.stored_card(card.parent).sha256
        return card if is_current and own.evaluation_sha256 == parent.evaluation_sha256 else None

    def stored_card(self, name: str) -> Card:
        """One verified card, stale or not. Raises RepositoryError if it was changed or cannot be understood."""
        path = self.verify(f"variants/{name}/card.json")
        try:
            values = _CardFile.model_validate_json(path.read_bytes())
            return _CARD.validate_python(values.model_extra)
        except ValidationError as error:
            raise RepositoryError(one_line(error, str(path))) from error

    def write_variant(self, card: Card, files: Mapping[str, Path], entry: ManifestEntry) -> None:
        """Put a variant in place of its predecessor: artefacts (name -> where they lie now), card, manifest entry.

        The new folder is complete on disk before it takes the old one's place, which is kept until the manifest knows
        the new one; an interrupt at any moment leaves the old one, or one that `recover` brings back.
        """
        target = self.variant_dir(card.variant)
        target.parent.mkdir(exist_ok=True)
        self.recover()
        staged = Path(tempfile.mkdtemp(prefix=_STAGED, dir=target.parent))
        try:
            for name, origin in files.items():
                copy_durably(origin, staged / name)
            write_durably(staged / "card.json", _to_json({"schema_version": SCHEMA_VERSION, **asdict(card)}))
            staged.chmod(0o755)
            hashes = {f"variants/{card.variant}/{file.name}": file_sha256(file) for file in staged.iterdir()}
            swap_folder(staged, target, _aside(target))
            self._record(card.variant, hashes, entry)
        finally:
            self.recover()

    def _record(self, variant: str, hashes: Mapping[str, str], entry: ManifestEntry | None) -> None:
        """Replace a variant's lines of the manifest; None takes the variant out."""
        manifest = self.manifest()
        prefix = f"variants/{variant}/"
        files = {file: sha for file, sha in manifest.files.items() if not file.startswith(prefix)} | dict(hashes)
        variants = {name: old for name, old in manifest.variants.items() if name != variant}
        if entry is not None:
            variants[variant] = entry
        self.write_manifest(manifest.model_copy(update={"files": files, "variants": variants}))

    def write_manifest(self, manifest: Manifest) -> None:
        """Replace the manifest atomically."""
        write_durably(self.path / "manifest.json", _to_json(manifest.model_dump()))

    def doubt(self, variant: str) -> None:
        """Keep a variant as it is, and have the next build make or judge it again."""
        manifest = self.manifest()
        entry = manifest.variants[variant].model_copy(update={"fingerprint": ""})
        self.write_manifest(manifest.model_copy(update={"variants": manifest.variants | {variant: entry}}))

    def remove_variant(self, name: str) -> None:
        """Take out a variant that is no longer asked for; the manifest forgets it first."""
        self._record(name, {}, None)
        shutil.rmtree(self.variant_dir(name), ignore_errors=True)

    def recover(self) -> None:
        """Finish a write, interrupted or not: keep the folder that the manifest knows, sweep what is left over."""
        for leftover in sorted((self.path / "variants").glob(".*")):
            name = leftover.name.removeprefix(_ASIDE)
            if leftover.name.startswith(_ASIDE):
                target = leftover.with_name(name)
                if not target.exists() or (self._is_recorded(name, leftover) and not self._is_recorded(name, target)):
                    shutil.rmtree(target, ignore_errors=True)
                    leftover.rename(target)
            if leftover.name.startswith((_STAGED, _ASIDE)):
                shutil.rmtree(leftover, ignore_errors=True)

    def _is_recorded(self, variant: str, folder: Path) -> bool:
        """Whether the folder holds exactly what the manifest says of the variant."""
        prefix = f"variants/{variant}/"
        known = {
            file.removeprefix(prefix): sha for file, sha in self.manifest().files.items() if file.startswith(prefix)
        }
        return known == {file.name: file_sha256(file) for file in folder.iterdir() if file.is_file()}


def _version_numbers(path: Path) -> list[int]:
    """The positive integers among the folder's subfolders, ascending."""
    return sorted(int(d.name) for d in path.iterdir() if re.fullmatch(r"[1-9]\d{0,17}", d.name) and d.is_dir())


def _aside(folder: Path) -> Path:
    return folder.with_name(f"{_ASIDE}{folder.name}")


def _to_json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
