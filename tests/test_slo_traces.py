"""Arrival processes: the asked rate and burstiness, from the seed alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks.slo import traces
from benchmarks.slo.traces import Arrivals

S = 1_000_000_000
Trace = Callable[[float, int, int], Arrivals]


@pytest.fixture
def offsets(tmp_path: Path) -> Path:
    """A file like the Azure one: 5,000 arrivals, the first half twice as fast as the second."""
    rng = np.random.default_rng(0)
    gaps = np.concatenate([rng.exponential(0.1, 2500), rng.exponential(0.2, 2500)])
    lines = [f"{value:.4f}" for value in np.cumsum(gaps)]
    path = tmp_path / "conversations.csv"
    path.write_text("\n".join(["# a comment", "offset_s", *lines]) + "\n", encoding="utf-8")
    return path


SYNTHETIC: dict[str, Trace] = {
    "poisson": traces.poisson,
    "gamma-8": partial(traces.gamma, cv2=8.0),
    "square": partial(traces.square_wave, ratio=6.0, half_period_ns=S // 2),
    "mmpp2": partial(traces.mmpp2, ratio=5.0),
    "superserve-bursty": traces.superserve_bursty,
    "superserve-time-varying": partial(traces.superserve_time_varying, acceleration_per_s2=50.0),
    "diurnal": traces.diurnal,
}


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_trace_has_the_rate_asked_for(name: str) -> None:
    """Over many seeds, within four standard errors of the seeds' own spread."""
    counts = np.array([SYNTHETIC[name](500, 20 * S, seed).size for seed in range(30)])
    assert abs(counts.mean() - 10_000) < 4 * counts.std(ddof=1) / np.sqrt(counts.size)
    assert counts.std() < 2_500


@pytest.mark.parametrize("name", SYNTHETIC)
def test_a_trace_is_sorted_within_its_duration_and_reproducible(name: str) -> None:
    """Int64 offsets in [0, duration); equal seeds give equal arrays and others do not."""
    trace = SYNTHETIC[name]
    first, again, other = trace(400, 10 * S, 7), trace(400, 10 * S, 7), trace(400, 10 * S, 8)
    assert first.dtype == np.int64
    assert (np.diff(first) >= 0).all()
    assert first[0] >= 0
    assert first[-1] < 10 * S
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("cv2", [1.0, 2.0, 4.0, 8.0])
def test_gamma_gaps_vary_as_asked(cv2: float) -> None:
    """The squared coefficient of variation of 200,000 gaps is within 5 %."""
    gaps = np.diff(traces.gamma(1000, 200 * S, 1, cv2=cv2))
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(cv2, rel=0.05)


def test_a_bursty_process_starts_in_equilibrium() -> None:
    """The first tenth of a second holds as many arrivals as any other, on average over seeds."""
    counts = np.array([(traces.gamma(200, S // 10, seed, cv2=8.0)).size for seed in range(2000)])
    assert counts.mean() == pytest.approx(20, abs=4 * counts.std() / np.sqrt(counts.size))


def test_a_square_wave_alternates() -> None:
    """Low halves and high halves differ by the ratio."""
    arrivals = traces.square_wave(1050, 60 * S, 2, ratio=6.0, half_period_ns=S // 2)
    high = (arrivals // (S // 2)) % 2 == 1
    assert high.sum() / (~high).sum() == pytest.approx(6, rel=0.05)


def test_mmpp2_is_burstier_than_poisson() -> None:
    """Its counts in 100 ms have an index of dispersion far above 1, Poisson's near 1."""

    def dispersion(arrivals: Arrivals) -> float:
        counts = np.bincount(arrivals // (S // 10), minlength=1000)
        return float(counts.var() / counts.mean())

    assert dispersion(traces.poisson(500, 100 * S, 0)) == pytest.approx(1, abs=0.25)
    assert dispersion(traces.mmpp2(500, 100 * S, 0, ratio=5.0)) > 10


def test_the_bursty_base_is_a_clock() -> None:
    """Without variance on top, gaps of the base alone are all alike: its share of arrivals is evenly spaced."""
    arrivals = traces.superserve_bursty(1000, 10 * S, 0, base_share=0.999999)
    assert np.ptp(np.diff(arrivals)[:5000]) <= 2


def test_the_time_varying_rate_climbs() -> None:
    """Its first and last quarter differ by the ratio when the climb lies between them."""
    arrivals = traces.superserve_time_varying(1000, 100 * S, 3, ratio=3.0, acceleration_per_s2=100.0)
    assert (arrivals > 75 * S).sum() / (arrivals < 25 * S).sum() == pytest.approx(3, rel=0.1)


def test_a_day_has_spikes() -> None:
    """The busiest of 1440 minutes is far above the mean minute."""
    per_minute = np.bincount(traces.diurnal(2000, 144 * S, 0) // (S // 10), minlength=1440)
    assert per_minute.max() > 1.5 * per_minute.mean()


def test_real_arrivals_are_windows_of_the_file(offsets: Path) -> None:
    """The number asked for exactly, gaps proportional to the file's, another window for another seed."""
    arrivals = traces.azure_conversations(100, 10 * S, 4, path=offsets)
    assert arrivals.size == 1000
    assert 0 == arrivals[0] <= arrivals[-1] < 10 * S
    assert (np.diff(arrivals) >= 0).all()
    values = np.array([float(line) for line in offsets.read_text().splitlines()[2:]])
    gaps, wanted = np.diff(values), np.diff(arrivals)[:999]
    matches = [
        first
        for first in range(values.size - 1000)
        if np.allclose(gaps[first : first + 999] / gaps[first : first + 1000].sum() * 10 * S, wanted, atol=2)
    ]
    assert len(matches) == 1
    assert np.array_equal(arrivals, traces.azure_conversations(100, 10 * S, 4, path=offsets))
    assert not np.array_equal(arrivals, traces.azure_conversations(100, 10 * S, 5, path=offsets))


def test_overlaid_windows_reach_beyond_the_file(offsets: Path) -> None:
    """More arrivals than the file holds need more windows on top of each other, and the error says so."""
    with pytest.raises(ValueError, match="more overlay"):
        traces.azure_conversations(1000, 10 * S, 0, path=offsets)
    arrivals = traces.azure_conversations(1000, 10 * S, 0, path=offsets, overlay=4)
    assert arrivals.size == 10_000
    assert arrivals[-1] < 10 * S
    assert (np.diff(arrivals) >= 0).all()
