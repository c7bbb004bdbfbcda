"""Calibration: the range of an activation by three methods, in bounded memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recipe_fixtures import Array, product_graph

from variants.data import Samples
from variants.recipes.int8 import calibration
from variants.recipes.int8.calibration import METHODS, Activations, Method, Observed

LAPLACE = np.random.default_rng(0).laplace(size=200_000).astype(np.float32)


def observed(*batches: Array) -> Observed:
    """What a calibration pass over these batches keeps."""
    zero = batches[0].dtype.type(0)
    found = Observed(zero, zero)
    for batch in batches:
        found.widen(batch)
    for batch in batches:
        found.count(batch)
    return found


def test_minmax_is_the_full_range() -> None:
    """The lowest and the highest value of all batches, whatever lies between."""
    found = observed(np.array([1, 5], np.float32), np.array([-2, 3], np.float32))
    assert found.range("minmax") == (-2, 5)


@pytest.mark.parametrize("method", METHODS)
def test_a_range_reaches_over_zero(method: Method) -> None:
    """Zero is in every range, because padding and ReLU need it exact."""
    low, high = observed(np.linspace(4, 5, 1000, dtype=np.float32)).range(method)
    assert low == 0
    assert high == pytest.approx(5, rel=0.01)


def test_the_percentile_leaves_out_one_value_in_ten_thousand() -> None:
    """The limit is where 99.99 % of all magnitudes end, as sorting them says, to the width of a bin."""
    low, high = observed(LAPLACE).range("percentile")
    expected = float(np.quantile(np.abs(LAPLACE), 0.9999))
    assert high == pytest.approx(expected, abs=float(np.abs(LAPLACE).max()) / 1000)
    assert low == -high


def test_entropy_clips_a_rare_outlier_and_little_else() -> None:
    """One value of a hundred times the others' reach does not decide the range; without it, most of it is kept."""
    with_outlier = np.append(LAPLACE, np.float32(100 * LAPLACE.max()))
    assert observed(with_outlier).range("entropy")[1] < 0.1 * with_outlier.max()
    uniform = np.random.default_rng(1).uniform(-1, 1, 100_000).astype(np.float32)
    assert observed(uniform).range("entropy")[1] > 0.95


def test_zeros_have_no_say_in_what_is_clipped() -> None:
    """A ReLU's zeros are exact in any range, so however many there are, the range is that of the other values."""
    positive = np.abs(LAPLACE[:20_000])
    with_zeros = np.concatenate([positive, np.zeros(1_000_000, np.float32)])
    assert observed(with_zeros).range("entropy") == observed(positive).range("entropy")


def information_lost(counts: list[int], kept: int, levels: int) -> float:
    """The divergence of a histogram from its rounded form, written out bin by bin."""
    seen = [counts[1], *counts[1:]]
    clipped = [*seen[: kept - 1], sum(seen[kept - 1 :])]
    rounded = []
    for level in range(levels):
        members = [b for b in range(kept) if b * levels // kept == level]
        filled = [b for b in members if seen[b]]
        rounded += [sum(seen[b] for b in filled) / len(filled) if b in filled else 0.0 for b in members]
    total, said = sum(clipped), sum(rounded)
    pairs = [(p / total, max(q, 1e-4) / said) for p, q in zip(clipped, rounded, strict=True) if p]
    return float(sum(p * np.log(p / q) for p, q in pairs))


def test_entropy_loses_the_least_information(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectorised search finds the bins that a bin-by-bin calculation of the divergence finds."""
    monkeypatch.setattr(calibration, "_BINS", 512)
    values = LAPLACE[:20_000]
    found = observed(values)
    candidates = range(128, 513, 16)
    losses = [information_lost(found.counts.tolist(), kept, 128) for kept in candidates]
    expected = candidates[int(np.argmin(losses))]
    assert 128 < expected < 512
    assert found.range("entropy")[1] == pytest.approx(float(np.abs(values).max()) * expected / 512, rel=1e-5)


def test_a_tensor_of_zeros_has_no_range() -> None:
    """Nothing but zeros is no reason to fail, or to divide by zero."""
    for method in METHODS:
        assert observed(np.zeros(10, np.float32)).range(method) == (0, 0)


def test_a_tensor_of_almost_nothing_has_a_range() -> None:
    """Values so small that their reciprocal overflows are no reason to fail; the range is all of them."""
    for method in METHODS:
        assert observed(np.full(10, 1e-37, np.float32)).range(method)[1] == np.float32(1e-37)


def activations(tmp_path: Path, x: Array, max_batch: int = 32) -> Activations:
    """Input and output of a product of x [n, 4] with twice the identity."""
    graph = product_graph(tmp_path / "g.onnx", 2 * np.eye(4))
    return Activations(graph, ["x", "y"], Samples({"x": x}), max_batch, threads=1)


def test_every_sample_is_seen_in_few_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample comes first, then as many as the budget holds, and the last batch may be of any size."""
    x = np.arange(44, dtype=np.float32).reshape(11, 4)
    monkeypatch.setattr(calibration, "_BUDGET_BYTES", 4 * 2 * 16)
    batches = list(activations(tmp_path, x))
    assert [len(batch["y"]) for batch in batches] == [1, 4, 4, 2]
    np.testing.assert_array_equal(np.concatenate([batch["y"] for batch in batches]), 2 * x)


def test_how_samples_are_batched_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The histogram of a tensor is the same one by one as all at once, unlike with running bins."""
    x = np.random.default_rng(2).normal(size=(50, 4)).astype(np.float32)
    x[0] *= 1e-6  # bins laid out by the first sample would be too narrow for the others
    at_once = activations(tmp_path, x).observe(histograms=True)
    monkeypatch.setattr(calibration, "_BUDGET_BYTES", 1)
    one_by_one = activations(tmp_path, x).observe(histograms=True)
    for name, each in at_once.items():
        np.testing.assert_array_equal(each.counts, one_by_one[name].counts)
        assert each.counts.sum() == x.size
        assert each.range("minmax") == one_by_one[name].range("minmax")


def test_what_is_not_finite_is_no_range(tmp_path: Path) -> None:
    """A mask of minus infinity among the activations does not make the range infinite."""
    x: Any = np.array([[1, -np.inf, np.nan, -3]], np.float32)
    found = activations(tmp_path, x).observe(histograms=True)["x"]
    assert found.range("minmax") == (-3, 1)
    assert found.counts.sum() == 2


def test_a_model_without_a_batch_dimension_is_calibrated_sample_by_sample(tmp_path: Path) -> None:
    """Each sample is given as it is, without a leading axis."""
    x = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    graph = product_graph(tmp_path / "g.onnx", np.eye(4))
    batches = list(Activations(graph, ["x"], Samples({"x": x}), 0, threads=1))
    assert [batch["x"].shape for batch in batches] == [(2, 4)] * 3
