"""Sample arrays for evaluation, calibration and training: read without pickle, checked against the model's inputs.

A file is an `.npz` with one array per model input, named as the input, plus the target; the leading axis counts
samples. Every mistake is a `RepositoryError` that names the file and the array.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from variants.datatypes import DATATYPES
from variants.repository import RepositoryError, VersionFolder
from variants.variant import TensorSpec

Array = npt.NDArray[Any]

_TUNING_STEP, _LEAST_TUNING, _MOST_TUNING = 8, 16, 512

_BF16 = DATATYPES["BF16"].numpy
_UNTYPED_BF16 = np.dtype("V2")


@dataclass(frozen=True, slots=True)
class Samples:
    """Some samples: inputs by name, each [samples, ...], and the target [samples, ...] where there is one."""

    inputs: Mapping[str, Array]
    target: Array | None = None

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def take(self, rows: slice | Sequence[int] | npt.NDArray[np.intp]) -> Samples:
        """The samples at `rows`."""
        inputs = {name: array[rows] for name, array in self.inputs.items()}
        return Samples(inputs, None if self.target is None else self.target[rows])


def spread(samples: Samples, most: int) -> Samples:
    """At most `most` samples, spread evenly over the whole set, so that a sorted file is still fairly represented."""
    if len(samples) <= most:
        return samples
    return samples.take(np.linspace(0, len(samples) - 1, most).astype(np.intp))


def read_arrays(path: Path) -> dict[str, Array]:
    """All arrays of an `.npz`, of equal length and without Python objects. Raises RepositoryError."""
    try:
        with path.open("rb") as raw:
            file = np.load(raw, allow_pickle=False)
            arrays = {name: file[name] for name in file.files} if isinstance(file, np.lib.npyio.NpzFile) else None
    except Exception as error:  # a damaged file fails in many ways, zlib's own among them, all with the same meaning
        raise RepositoryError(f"{path}: not a readable .npz of plain arrays (no pickles): {error}") from error
    if arrays is None:
        raise RepositoryError(f"{path}: must be an .npz with named arrays, not a single array")
    lengths = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if not lengths or 0 in lengths.values():
        raise RepositoryError(f"{path}: every array needs a leading axis of at least one sample, got {lengths}")
    if len(set(lengths.values())) > 1:
        raise RepositoryError(f"{path}: arrays differ in length: {lengths}")
    return arrays


def array_shapes(path: Path) -> dict[str, list[object]]:
    """Each array's dtype and its shape without the samples, read from the headers alone. Raises RepositoryError."""
    found: dict[str, list[object]] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(archive.namelist()):
                with archive.open(name) as file:
                    version = np.lib.format.read_magic(file)
                    read = (
                        np.lib.format.read_array_header_1_0
                        if version == (1, 0)
                        else np.lib.format.read_array_header_2_0
                    )
                    shape, _, dtype = read(file)
                    found[name] = [str(dtype), *shape[1:]]
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise RepositoryError(f"{path}: not a readable .npz of plain arrays (no pickles): {error}") from error
    return found


def match_inputs(
    path: Path, arrays: Mapping[str, Array], specs: Sequence[TensorSpec], *, target: str | None, other_targets: set[str]
) -> Samples:
    """Arrays as samples of a model with input `specs` (without the batch dimension in `shape`).

    `other_targets` are arrays that another section of the configuration uses; they are ignored. Raises
    RepositoryError for a missing, unknown, ill-typed or ill-shaped array.
    """
    names = {spec.name for spec in specs}
    missing = sorted((names | ({target} if target else set())) - set(arrays))
    if missing:
        raise RepositoryError(f"{path}: array {missing[0]!r} is missing; it holds {', '.join(sorted(arrays))}")
    unknown = sorted(set(arrays) - names - other_targets - ({target} if target else set()))
    if unknown:
        raise RepositoryError(f"{path}: array {unknown[0]!r} is no input of the model ({', '.join(sorted(names))})")
    inputs = {spec.name: _as_input(path, spec, arrays[spec.name]) for spec in specs}
    return Samples(inputs, arrays[target] if target else None)


def _as_input(path: Path, spec: TensorSpec, array: Array) -> Array:
    """One input array in the model's type; floats are narrowed and integers too where no value changes.

    Text is `str` or UTF-8. An .npz knows no bfloat16 and keeps its two bytes without a type.
    """
    shape = array.shape[1:]
    fits = len(shape) == len(spec.shape) and all(s in (-1, d) for s, d in zip(spec.shape, shape, strict=True))
    if not fits:
        raise RepositoryError(
            f"{path}: array {spec.name!r} has samples of shape {list(shape)}, the model takes {list(spec.shape)}"
        )
    if spec.datatype == "BYTES" and array.dtype.kind in "US":
        return _text(path, spec.name, array).astype(np.object_)
    wanted = DATATYPES[spec.datatype].numpy
    if wanted == _BF16 and array.dtype == _UNTYPED_BF16:
        array = array.view(_BF16)
    converted = array.astype(wanted) if _kind(array.dtype) == _kind(wanted) else array
    if converted.dtype != wanted or (wanted.kind in "iu" and not np.array_equal(converted, array)):
        raise RepositoryError(f"{path}: array {spec.name!r} is {array.dtype}, the model takes {wanted}")
    return converted


def _text(path: Path, name: str, array: Array) -> npt.NDArray[np.str_]:
    try:
        return np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array
    except UnicodeDecodeError as error:
        raise RepositoryError(f"{path}: array {name!r} must hold text in UTF-8: {error}") from error


def _kind(dtype: np.dtype[Any]) -> str:
    """Numpy's letter for a family of types; it takes bfloat16 for a stranger."""
    return "f" if dtype == _BF16 else dtype.kind


def refuse_overlap(held_out: str, kept: Samples, name: str, other: Samples) -> None:
    """Raise RepositoryError when identical samples are in both sets: accuracy would be measured on known answers."""
    seen = set(_digests(other))
    shared = sum(digest in seen for digest in _digests(kept))
    if shared:
        raise RepositoryError(
            f"{shared} of {len(kept)} {held_out} samples are also among the {len(other)} {name} samples; "
            "remove them from one of the two files"
        )


def _digests(samples: Samples) -> list[bytes]:
    """One digest per sample over all its inputs."""
    columns: Iterable[Array] = (samples.inputs[name] for name in sorted(samples.inputs))
    rows: list[Any] = [hashlib.sha256() for _ in range(len(samples))]
    for column in columns:
        for row, value in zip(rows, column, strict=True):
            row.update(repr(value.tolist()).encode() if column.dtype == object else value.tobytes())
    return [row.digest() for row in rows]


@dataclass(frozen=True, slots=True)
class DataSets:
    """The sets of a version, each None where `model.yaml` names none; no sample is in two of them."""

    evaluation: Samples | None = None
    calibration: Samples | None = None
    training: Samples | None = None
    tuning: Samples | None = None

    @property
    def any(self) -> Samples | None:
        """Whichever set there is, for tracing and timing."""
        return next((s for s in (self.evaluation, self.calibration, self.training) if s is not None), None)

    def with_tuning(self) -> DataSets:
        """With a share of the training data set aside for tuning, else of the calibration data, where none is given."""
        if self.tuning is not None:
            return self
        if self.training is not None:
            tuning, training = _set_aside(self.training, self.calibration)
            return replace(self, tuning=tuning, training=training)
        if self.calibration is not None:
            tuning, calibration = _set_aside(self.calibration, None)
            return replace(self, tuning=tuning, calibration=calibration)
        return self


def _set_aside(samples: Samples, calibrating: Samples | None) -> tuple[Samples | None, Samples]:
    """Every `_TUNING_STEP`th sample at most, spread evenly, and the rest; None where there are too few to tell.

    What is calibrated on is not chosen, and a sample that occurs twice is not in both sets.
    """
    digests = _digests(samples)
    used = set(_digests(calibrating)) if calibrating else set()
    free = np.array([at for at, digest in enumerate(digests) if digest not in used], np.intp)
    count = min(len(free) // _TUNING_STEP, _MOST_TUNING)
    if count < _LEAST_TUNING:
        return None, samples
    rows = free[np.linspace(0, len(free) - 1, count).astype(np.intp)]
    aside = {digests[row] for row in rows}
    rest = [at for at, digest in enumerate(digests) if digest not in aside]
    return samples.take(rows), samples.take(np.array(rest, np.intp))


def read_files(version: VersionFolder) -> dict[str, dict[str, Array]]:
    """The arrays of every configured file, by section of `model.yaml`; nothing is checked against the model yet."""
    config = version.model.config
    sections = {name: getattr(config, name) for name in ("evaluation", "calibration", "training", "tuning")}
    return {name: read_arrays(version.resolve(section.data)) for name, section in sections.items() if section}


def targets_of(version: VersionFolder) -> set[str]:
    """The arrays that are no inputs."""
    config = version.model.config
    return {
        section.target for section in (config.evaluation, config.training, config.tuning) if section and section.target
    }


def match_sets(
    version: VersionFolder, files: Mapping[str, Mapping[str, Array]], specs: Sequence[TensorSpec]
) -> DataSets:
    """The files as samples of a model. Raises RepositoryError, also when evaluation samples are used elsewhere."""
    config = version.model.config
    paths = {name: version.resolve(section.data) for name in files if (section := getattr(config, name)) is not None}
    own = {
        "evaluation": config.evaluation.target if config.evaluation else None,
        "training": config.training.target if config.training else None,
        "tuning": config.tuning.target if config.tuning else None,
    }
    sets = {
        name: match_inputs(paths[name], arrays, specs, target=own.get(name), other_targets=targets_of(version))
        for name, arrays in files.items()
    }
    pairs = (("evaluation", ("calibration", "training", "tuning")), ("tuning", ("training", "calibration")))
    for held_out, others in pairs:
        for name in others:
            if name in sets and held_out in sets:
                refuse_overlap(held_out, sets[held_out], name, sets[name])
    return DataSets(**sets).with_tuning()
