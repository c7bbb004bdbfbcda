from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.scheduling.latency import MISS_RATE, UNIT, LatencyModel, Spot
from variants.variant import LatencyProfile, State, Variant

MS = 1_000_000
SECOND = 1_000_000_000
PROFILE = LatencyProfile((1, 4, 8), (10 * MS, 22 * MS, 38 * MS))


def latency_model(
    *profiles: LatencyProfile,
    crowded: LatencyProfile | None = None,
    lengths: tuple[tuple[int, LatencyProfile], ...] = (),
    executors: int = 1,
) -> LatencyModel:
    """Predictions for variants with these profiles."""
    variants = [
        Variant(
            f"v{place}", State.ELIGIBLE, "", "fp32", "virtual", "cpu", profile=profile, crowded=crowded, lengths=lengths
        )
        for place, profile in enumerate(profiles)
    ]
    return LatencyModel(variants, executors)


def observe(model: LatencyModel, ratio: float, times: int, start_ns: int, variant: int = 0) -> int:
    """Batches of one sample, one after the other, each `ratio` times as slow as profiled; returns when they end."""
    now_ns = start_ns
    for _ in range(times):
        actual_ns = int(model.profiled_ns(variant, 1) * ratio)
        now_ns += actual_ns
        model.observe(variant, 1, actual_ns, now_ns)
        model.refresh(now_ns)
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
    model = latency_model(PROFILE)
    assert model.predict_ns(0, 4) == pytest.approx(1.15 * 22 * MS, rel=1e-4)
    assert model.idle_ns(0, 4) == pytest.approx(model.predict_ns(0, 4), rel=1e-4)


@given(
    latencies=st.lists(st.integers(1, 10**9), min_size=1, max_size=12),
    ratios=st.lists(st.floats(0.01, 20), max_size=5),
    slowdown=st.floats(0.25, 8),
    budget_ns=st.integers(-5, 4 * 10**9),
)
def test_the_largest_batch_is_exactly_the_last_whose_prediction_fits(
    latencies: list[int], ratios: list[float], slowdown: float, budget_ns: int
) -> None:
    """`largest_batch` and `predict_ns` agree to the nanosecond, whatever was observed, and never fall with the size."""
    model = latency_model(LatencyProfile(tuple(range(1, len(latencies) + 1)), tuple(latencies)))
    for ratio in ratios:
        observe(model, ratio, 1, 0)
    model.refresh(0, Spot(0, int(slowdown * UNIT)))
    predictions = [model.predict_ns(0, n) for n in range(1, len(latencies) + 1)]
    assert predictions == sorted(predictions)
    assert model.largest_batch(0, budget_ns) == sum(prediction <= budget_ns for prediction in predictions)
    for size, prediction in enumerate(predictions, 1):
        assert model.largest_batch(0, prediction) >= size


def test_a_slow_executor_is_slow_for_every_variant_and_size() -> None:
    """The executor's slowdown multiplies all predictions here; those for a crowd have their own."""
    model = latency_model(PROFILE, PROFILE)
    alone_ns = model.predict_ns(1, 8)
    model.refresh(0, Spot(0, 2 * UNIT), Spot(0, 3 * UNIT))
    assert model.predict_ns(1, 8) == pytest.approx(2 * alone_ns, rel=1e-6)
    assert model.crowded_ns(1, 8) == pytest.approx(3 * alone_ns, rel=1e-6)


def test_busy_neighbours_count_as_measured_in_a_crowd() -> None:
    """With none busy the profile alone holds, with all busy the crowded one, in between a straight line."""
    crowded = LatencyProfile((1, 4, 8), (12 * MS, 33 * MS, 76 * MS))
    model = latency_model(PROFILE, crowded=crowded, executors=3)
    assert [model.profiled_ns(0, 8, 0, busy) for busy in (0, 1, 2)] == [38 * MS, 57 * MS, 76 * MS]


def test_a_crowd_that_measured_faster_is_taken_for_noise() -> None:
    """Company never makes a batch faster."""
    model = latency_model(PROFILE, crowded=LatencyProfile((1, 4, 8), (9 * MS, 20 * MS, 30 * MS)), executors=2)
    assert model.profiled_ns(0, 8, 0, 1) == 38 * MS


LENGTHS = ((100, LatencyProfile((1, 8), (2 * MS, 10 * MS))), (400, LatencyProfile((1, 8), (8 * MS, 40 * MS))))


def test_longer_inputs_take_longer_by_a_power_law() -> None:
    """Between and beyond measured lengths latency follows the power law through the nearest two; here it is linear."""
    model = latency_model(LENGTHS[1][1], lengths=LENGTHS)
    for length, expected_ms in [(50, 2), (100, 2), (200, 4), (400, 8), (800, 16)]:
        assert model.profiled_ns(0, 1, model.step(length)) == pytest.approx(expected_ms * MS, rel=1e-3)


def test_a_length_is_predicted_as_the_longest_of_its_step() -> None:
    """A step is never predicted faster than any of its inputs would be, and there are few steps."""
    model = latency_model(LENGTHS[1][1], lengths=LENGTHS)
    for length in range(100, 3000, 7):
        assert model.profiled_ns(0, 1, model.step(length)) >= 2 * MS * length / 100 - 2
        assert model.step(model.longest(model.step(length))) == model.step(length)
    assert model.step(10**15) == model.step(10**18) == 40


def test_a_model_of_one_length_has_one_step() -> None:
    """Where lengths were not measured, every input counts alike."""
    assert latency_model(PROFILE).step(123456) == 0


@pytest.mark.parametrize("deviation", [0.02, 0.15])
def test_the_margin_makes_misses_as_rare_as_promised_whatever_the_noise(deviation: float) -> None:
    """In the long run about `MISS_RATE` of predictions are exceeded, for quiet and for noisy hosts."""
    random, model, now_ns, missed = Random(1), latency_model(PROFILE), 0, 0  # noqa: S311 - repeatable on purpose
    for batch in range(20_000):
        actual_ns = int(10 * MS * max(0.1, random.gauss(1.0, deviation)))
        now_ns += actual_ns
        model.refresh(now_ns)
        missed += batch >= 5_000 and actual_ns > model.predict_ns(0, 1)
        model.observe(0, 1, actual_ns, now_ns)
    assert MISS_RATE / 2 <= missed / 15_000 <= 2 * MISS_RATE or (deviation < 0.1 and missed / 15_000 <= 2 * MISS_RATE)


def test_noise_of_short_batches_does_not_widen_the_margin_of_long_ones() -> None:
    """A pause that doubles a short batch is nothing to one of another octave: each octave has its own margin."""
    model = latency_model(LatencyProfile((1,), (1 * MS,)), LatencyProfile((1,), (50 * MS,)))
    now_ns = SECOND
    for batch in range(200):
        now_ns = observe(model, 2.0 if batch % 5 == 0 else 1.0, 1, now_ns, variant=0)
        now_ns = observe(model, 1.0, 1, now_ns, variant=1)
    assert model.predict_ns(0, 1) > 1.5 * MS
    assert model.predict_ns(1, 1) < 1.2 * 50 * MS


def test_what_is_peculiar_to_one_variant_is_learnt_for_it_alone() -> None:
    """A variant that takes 1.4 times its profile is predicted so after a while; its neighbour is not."""
    model = latency_model(PROFILE, PROFILE)
    now_ns = SECOND
    for _ in range(300):
        now_ns = observe(model, 1.4, 1, now_ns, variant=0)
        now_ns = observe(model, 1.0, 1, now_ns, variant=1)
    assert model.predict_ns(0, 1) > 1.3 * model.predict_ns(1, 1)


def test_one_outlier_costs_nothing() -> None:
    """A single batch of ten times its profile moves no prediction: it is one in a hundred."""
    model = latency_model(PROFILE)
    before_ns = model.predict_ns(0, 1)
    observe(model, 10.0, 1, SECOND)
    assert model.predict_ns(0, 1) <= 1.1 * before_ns


def test_bad_moments_are_forgotten_while_nothing_runs() -> None:
    """Twenty slow batches no longer matter after a minute, nor do they return with the next batch."""
    model = latency_model(PROFILE)
    now_ns = observe(model, 3.0, 20, SECOND)
    assert model.predict_ns(0, 1) > 1.5 * 10 * MS
    model.refresh(now_ns + 60 * SECOND)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=0.1)
    observe(model, 1.0, 1, now_ns + 60 * SECOND)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=0.1)


@pytest.mark.parametrize("ratio", [1e-6, 1e6])
def test_absurd_measurements_are_bounded(ratio: float) -> None:
    """Neither an instantaneous nor an endless batch leaves predictions useless."""
    model = latency_model(PROFILE)
    observe(model, ratio, 50, SECOND)
    assert 0.2 * 10 * MS < model.predict_ns(0, 1) < 25 * 10 * MS


def test_what_an_idle_server_promises_does_not_depend_on_what_was_observed() -> None:
    """`idle_ns` decides what is never feasible; a busy minute must not change it."""
    model = latency_model(PROFILE)
    before_ns = model.idle_ns(0, 8)
    observe(model, 4.0, 20, SECOND)
    assert model.idle_ns(0, 8) == before_ns


def test_what_is_learnt_at_a_slow_executor_is_what_is_left_beyond_its_slowdown() -> None:
    """A batch that took as long as its executor's slowdown says teaches the variant nothing, and the pool the ratio."""
    model = latency_model(PROFILE)
    ratio = model.observe(0, 1, 20 * MS, SECOND, Spot(0, 2 * UNIT))
    assert ratio == pytest.approx(2.0)
    assert model.predict_ns(0, 1) == pytest.approx(1.15 * 10 * MS, rel=1e-3)
