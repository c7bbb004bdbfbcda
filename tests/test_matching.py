"""Which arrays fit a model, and what is taken from them: names, shapes, datatypes, overlap."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from variants.data import Samples, match_inputs, read_arrays, refuse_overlap, spread
from variants.model_config import RepositoryError
from variants.variant import TensorSpec

SPECS = (TensorSpec("x", "FP32", (2,)),)


def matched(arrays: dict[str, np.ndarray[Any, Any]], target: str | None = "label") -> Samples:
    """Arrays matched with a model that takes `x`, two floats."""
    return match_inputs(Path("d.npz"), arrays, SPECS, target=target, other_targets=set())


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2))}, "d.npz: array 'label' is missing; it holds x"),
        ({"y": np.ones((3, 2)), "label": np.ones(3)}, "d.npz: array 'x' is missing"),
        ({"x": np.ones((3, 2)), "z": np.ones(3), "label": np.ones(3)}, "array 'z' is no input of the model"),
        ({"x": np.ones((3, 4)), "label": np.ones(3)}, r"samples of shape \[4\], the model takes \[2\]"),
        ({"x": np.ones((3, 2), np.uint8), "label": np.ones(3)}, "array 'x' is uint8, the model takes float32"),
    ],
)
def test_ill_fitting_arrays_are_named(arrays: dict[str, np.ndarray[Any, Any]], message: str) -> None:
    """Missing, unknown, ill-shaped and ill-typed arrays are one clear line each."""
    with pytest.raises(RepositoryError, match=message):
        matched(arrays)


def test_float64_data_is_narrowed() -> None:
    """Numpy's default floats fit a float32 model."""
    assert matched({"x": np.ones((3, 2)), "label": np.ones(3)}).inputs["x"].dtype == np.float32


def test_integers_are_narrowed_only_without_loss() -> None:
    """int64 data fit an int32 model unless a value would change."""
    specs = (TensorSpec("x", "INT32", ()),)
    good = match_inputs(Path("d"), {"x": np.array([1, 2])}, specs, target=None, other_targets=set())
    assert good.inputs["x"].dtype == np.int32
    with pytest.raises(RepositoryError, match="is int64, the model takes int32"):
        match_inputs(Path("d"), {"x": np.array([1, 2**40])}, specs, target=None, other_targets=set())


def test_data_files_hold_plain_equal_length_arrays(tmp_path: Path) -> None:
    """Pickled objects, uneven lengths, single arrays and damaged files are refused with the file's name."""
    np.savez(tmp_path / "objects.npz", x=np.array([{}, {}], dtype=object))
    np.savez(tmp_path / "uneven.npz", x=np.ones(3), y=np.ones(4))
    np.save(tmp_path / "single.npy", np.ones(3))
    (tmp_path / "damaged.npz").write_bytes(b"PK\x03\x04 nothing")
    for name, message in (
        ("objects.npz", "not a readable .npz of plain arrays"),
        ("uneven.npz", "differ in length: {'x': 3, 'y': 4}"),
        ("single.npy", "must be an .npz with named arrays"),
        ("damaged.npz", "not a readable"),
    ):
        with pytest.raises(RepositoryError, match=f"{name}.*{message}"):
            read_arrays(tmp_path / name)


def test_overlap_is_refused_with_counts() -> None:
    """Two of four evaluation samples that are also calibration samples are counted."""
    evaluation = matched({"x": np.array([[1, 2], [3, 4], [5, 6], [7, 8.0]]), "label": np.zeros(4)})
    other = matched({"x": np.array([[3, 4], [7, 8], [9, 9.0]])}, target=None)
    with pytest.raises(RepositoryError, match="2 of 4 evaluation samples are also among the 3 calibration samples"):
        refuse_overlap("evaluation", evaluation, "calibration", other)
    refuse_overlap("evaluation", evaluation, "calibration", other.take(slice(2, 3)))


def test_spread_takes_from_the_whole_set() -> None:
    """A limited sample reaches from the first to the last, so a file sorted by class is not cut."""
    samples = matched({"x": np.arange(200.0).reshape(100, 2), "label": np.arange(100)})
    some = spread(samples, 5)
    assert some.target is not None
    assert some.target.tolist() == [0, 24, 49, 74, 99]
