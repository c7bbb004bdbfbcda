"""Sample files: which are read, as which types, and that every damaged one is told in the same way."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from variants.data import Array, Samples, match_inputs, read_arrays, refuse_overlap
from variants.repository import RepositoryError
from variants.variant import TensorSpec


def matched(array: Array, datatype: str) -> Array:
    """The array as samples of an input of this type."""
    spec = TensorSpec("x", datatype, array.shape[1:])
    return match_inputs(Path("data.npz"), {"x": array}, [spec], target=None, other_targets=set()).inputs["x"]


def test_a_damaged_compressed_file_is_no_crash(tmp_path: Path) -> None:
    """An error of zlib becomes the usual line that names the file."""
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.random.default_rng(0).integers(0, 5, (2000, 4)))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)
    with pytest.raises(RepositoryError, match=r"data.npz: not a readable .npz"):
        read_arrays(path)


def test_a_single_array_is_said_to_be_one(tmp_path: Path) -> None:
    """An .npy under the name of an .npz is told apart from a damaged file."""
    with (tmp_path / "data.npz").open("wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(RepositoryError, match=r"must be an \.npz with named arrays"):
        read_arrays(tmp_path / "data.npz")


def test_text_may_be_utf8_bytes() -> None:
    """Bytes are decoded as UTF-8; others are refused with the array's name."""
    assert matched(np.array(["é".encode(), b"a"]), "BYTES").tolist() == ["é", "a"]
    assert matched(np.array(["é", "a"]), "BYTES").tolist() == ["é", "a"]
    with pytest.raises(RepositoryError, match="array 'x' must hold text in UTF-8"):
        matched(np.array([b"\xff"]), "BYTES")


def test_bfloat16_inputs_can_be_given(tmp_path: Path) -> None:
    """An .npz forgets bfloat16 and keeps its bytes, which are read as such; wider floats are narrowed."""
    values = np.array([[1.5, -2.0], [0.25, 3.0]], ml_dtypes.bfloat16)
    np.savez(tmp_path / "data.npz", x=values)
    read = read_arrays(tmp_path / "data.npz")["x"]
    for given in (read, values, values.astype(np.float32), values.astype(np.float64)):
        found = matched(given, "BF16")
        assert found.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found, values)
    with pytest.raises(RepositoryError, match="array 'x' is int64, the model takes bfloat16"):
        matched(np.ones((2, 2), np.int64), "BF16")
    with pytest.raises(RepositoryError, match="the model takes float32"):
        matched(read, "FP32")


def test_an_overlap_is_found_in_bfloat16_too() -> None:
    """Samples are compared by their bytes, whatever their type."""
    ones = Samples({"x": np.ones((3, 2), ml_dtypes.bfloat16)})
    refuse_overlap("evaluation", ones, "calibration", Samples({"x": np.zeros((3, 2), ml_dtypes.bfloat16)}))
    with pytest.raises(RepositoryError, match="3 of 3 evaluation samples"):
        refuse_overlap("evaluation", ones, "calibration", ones)
