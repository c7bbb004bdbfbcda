from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.latency import MISS_RATE, LatencyModel
from variants.variant import LatencyProfile

MS = 1_000_000
SECOND = 1_000_000_000
PROFILE = LatencyProfile((1, 4, 8), (10 * MS, 22 * MS, 38 * MS))


def observe(model: LatencyModel, ratio: float, times: int, start_ns: int, variant: int = 0) -> int:
    """Batches of one sample, one after the other, each `ratio` times as slow as profiled; returns when they end."""
    now_ns = start_ns
    for _ in range(times):
        actual_ns = int(model.profiled_ns(variant, 1) * ratio)
        now_ns += actual_ns
        model.observe(variant, 1, actual_ns, now_ns)
    return now_ns


def test_a_profile_interpolates_between_measured_sizes() -> None:
    """Between two measured sizes latency is linear; at them it is exact."""
    assert [PROFILE.latency_ns(size) for size in (1, 2, 4, 6, 8)] == [10 * MS, 14 * MS, 22 * MS, 30 * MS, 38 * MS]


@pytest.mark.parametrize("size", [0, -1, 9])
def test_a_profile_never_extrapolates(size: int) -> None:
    """A size outside the measured range is an error, not a guess."""
    with pytest.raises(ValueError, match="outside"):
        PROFILE.latency_ns(size)


def test_a_larger_batch_that_measured_faster_is_taken_for_noise() -> None:
    """A profile never falls: the slower, smaller neighbour is believed."""
    assert LatencyProfile((1, 2, 4), (10, 8, 12)).latencies_ns == (10, 10, 12)


@pytest.mark.parametrize(
    ("sizes", "latencies"),
    [((), ()), ((1, 2), (5,)), ((2, 1), (5, 6)), ((1, 1), (5, 6)), ((0, 1), (5, 6)), ((1,), (0,))],
)
def test_a_malformed_profile_is_refused(sizes: tuple[int, ...], latencies: tuple[int, ...]) -> None:
    """Empty, uneven, unsorted, repeated, zero-sized or instantaneous profiles raise ValueError."""
    with pytest.raises(ValueError, match=r"profile|rise"):
        LatencyProfile(sizes, latencies)


def test_predictions_start_at_the_profile_and_a_margin() -> None:
    """Before anything ran, a prediction is the profile times the starting margin: just what idleness promises."""
    model = LatencyModel([PROFILE])
    assert model.predict_ns(0, 4) == pytest.approx(1.15 * 22 * MS, rel=1e-4)
    assert model.idle_ns(0, 4) == pytest.approx(model.predict_ns(0, 4), rel=1e-4)


@given(
    latencies=st.lists(st.integers(1, 10**9), min_size=1, max_size=12),
    ratios=st.lists(st.floats(0.01, 20), max_size=5),
    budget_ns=st.integers(-5, 4 * 10**9),
)
def test_the_largest_batch_is_exactly_the_last_whose_prediction_fits(
    latencies: list[int], ratios: list[float], budget_ns: int
) -> None:
    """`largest_batch` and `predict_ns` agree to the nanosecond, whatever was observed."""
    model = LatencyModel([LatencyProfile(tuple(range(1, len(latencies) + 1)), tuple(latencies))])
    for ratio in ratios:
        observe(model, ratio, 1, 0)
    fitting = [n for n in range(1, len(latencies) + 1) if model.predict_ns(0, n) <= budget_ns]
    assert model.largest_batch(0, budget_ns) == max(fitting, default=0)
    for size in range(1, len(latencies) + 1):
        assert model.largest_batch(0, model.predict_ns(0, size)) >= size


def test_a_slow_host_is_noticed_within_five_batches_on_every_variant() -> None:
    """After five batches at twice the profile, all variants are predicted at well over one and a half times theirs."""
    model = LatencyModel([PROFILE, PROFILE])
    observe(model, 2.0, 5, SECOND)
    assert model.predict_ns(0, 1) > 2.0 * 10 * MS
    assert model.predict_ns(1, 1) > 1.7 * 10 * MS


def test_a_host_that_recovers_is_noticed_within_ten_batches() -> None:
    """Predictions come back down with the host."""
    model = LatencyModel([PROFILE])
    now_ns = observe(model, 3.0, 10, SECOND)
    observe(model, 1.0, 10, now_ns)
    assert model.slowdown < 1.2


@pytest.mark.parametrize("deviation", [0.02, 0.15])
def test_the_margin_makes_misses_as_rare_as_promised_whatever_the_noise(deviation: float) -> None:
    """In the long run about `MISS_RATE` of predictions are exceeded, for quiet and for noisy hosts."""
    random, model, now_ns, missed = Random(1), LatencyModel([PROFILE]), 0, 0  # noqa: S311 - repeatable on purpose
    for batch in range(30_000):
        actual_ns = int(10 * MS * max(0.1, random.gauss(1.0, deviation)))
        now_ns += actual_ns
        model.refresh(now_ns)
        missed += batch >= 10_000 and actual_ns > model.predict_ns(0, 1)
        model.observe(0, 1, actual_ns, now_ns)
    assert missed / 20_000 <= 2 * MISS_RATE
    assert missed / 20_000 >= (MISS_RATE / 2 if deviation > 0.1 else 0)


def test_a_noisy_variant_widens_its_own_margin_only() -> None:
    """What one variant exceeds is not held against another."""
    model = LatencyModel([PROFILE, PROFILE])
    now_ns = SECOND
    for _ in range(200):
        now_ns = observe(model, 1.5, 1, now_ns, variant=0)
        now_ns = observe(model, 0.9, 1, now_ns, variant=1)
    assert model.predict_ns(0, 1) > 1.2 * model.predict_ns(1, 1)


def test_one_outlier_is_forgotten_while_nothing_runs() -> None:
    """A batch that took ten times its profile no longer matters after twenty idle seconds."""
    model = LatencyModel([PROFILE])
    now_ns = observe(model, 10.0, 1, SECOND)
    model.refresh(now_ns)
    assert model.predict_ns(0, 1) > 2.5 * 10 * MS
    model.refresh(now_ns + 20 * SECOND)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=0.01)


def test_what_was_forgotten_does_not_return_with_the_next_batch() -> None:
    """The first normal batch after a long rest confirms the profile instead of reviving an old outlier."""
    model = LatencyModel([PROFILE])
    now_ns = observe(model, 10.0, 1, SECOND)
    observe(model, 1.0, 1, now_ns + 20 * SECOND)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=0.02)


def test_a_wide_margin_relaxes_while_only_other_variants_run() -> None:
    """A variant that is no longer tried is not held to its worst days: otherwise it would be avoided for ever."""
    model = LatencyModel([PROFILE, PROFILE])
    now_ns = SECOND
    for _ in range(100):
        now_ns = observe(model, 3.0, 1, now_ns, variant=0)
        now_ns = observe(model, 1.0, 1, now_ns, variant=1)
    assert model.predict_ns(0, 1) > 1.3 * model.predict_ns(1, 1)
    observe(model, 1.0, 3000, now_ns, variant=1)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=0.05)


def test_a_margin_that_shrank_was_earned_and_stays() -> None:
    """Idleness does not widen the margin of a steady host."""
    model = LatencyModel([PROFILE])
    now_ns = observe(model, 1.0, 1000, SECOND)
    steady_ns = model.predict_ns(0, 1)
    assert steady_ns < 1.1 * 10 * MS
    model.refresh(now_ns + 60 * SECOND)
    assert model.predict_ns(0, 1) == pytest.approx(steady_ns, rel=1e-3)


@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_absurd_measurements_are_bounded(ratio: float) -> None:
    """Neither an instantaneous nor an endless batch leaves predictions useless."""
    model = LatencyModel([PROFILE])
    observe(model, ratio, 50, SECOND)
    assert 0.2 * 10 * MS < model.predict_ns(0, 1) < 25 * 10 * MS


def test_what_an_idle_server_promises_does_not_depend_on_what_was_observed() -> None:
    """`idle_ns` decides what is never feasible; a busy minute must not change it."""
    model = LatencyModel([PROFILE])
    before_ns = model.idle_ns(0, 8)
    observe(model, 4.0, 20, SECOND)
    assert model.idle_ns(0, 8) == before_ns
