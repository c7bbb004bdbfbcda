from __future__ import annotations

import pytest

from server.scheduling.forecast import ArrivalForecast

MS = 1_000_000
SECOND = 1_000_000_000


def steady(forecast: ArrivalForecast, per_second: int, start_ns: int, seconds: float) -> int:
    """Evenly spaced arrivals of one sample; returns when they end."""
    gap_ns = SECOND // per_second
    end_ns = start_ns + int(seconds * SECOND)
    for instant_ns in range(start_ns, end_ns, gap_ns):
        forecast.arrived(1, instant_ns)
    return end_ns


def bursty(per_second: int, end_ns: int) -> ArrivalForecast:
    """What is forecast after four seconds in which all arrivals of a tenth of a second come at once."""
    forecast = ArrivalForecast()
    for start_ns in range(end_ns - 4 * SECOND, end_ns, SECOND // 10):
        for _ in range(per_second // 10):
            forecast.arrived(1, start_ns)
    return forecast


def test_nothing_is_expected_before_anything_arrived() -> None:
    """An idle model forecasts nothing, at whatever instant the clock starts."""
    assert ArrivalForecast().expected(SECOND, 123 * SECOND) == 0.0


@pytest.mark.parametrize("samples", [1, 32])
def test_a_lone_arrival_is_no_sign_of_more(samples: int) -> None:
    """The request that is being decided on does not forecast itself."""
    forecast = ArrivalForecast()
    forecast.arrived(samples, 50 * SECOND)
    assert forecast.expected(100 * MS, 50 * SECOND) == 0.0


@pytest.mark.parametrize("rate", [50, 1000])
def test_a_steady_rate_is_forecast_with_a_standard_deviation_to_spare(rate: int) -> None:
    """Even arrivals give their mean plus the spread of a Poisson process."""
    forecast = ArrivalForecast()
    now_ns = steady(forecast, rate, 10 * SECOND, 2.0)
    mean = rate * 0.1
    assert mean <= forecast.expected(100 * MS, now_ns) <= mean * 1.1 + 1.5 * mean**0.5


def test_samples_count_not_requests() -> None:
    """A request of eight samples is eight samples of work."""
    ones, eights = ArrivalForecast(), ArrivalForecast()
    for instant_ns in range(10 * SECOND, 12 * SECOND, 10 * MS):
        ones.arrived(1, instant_ns)
        eights.arrived(8, instant_ns)
    assert eights.expected(SECOND, 12 * SECOND) > 7 * ones.expected(SECOND, 12 * SECOND)


def test_the_margin_grows_with_load_and_stays_finite() -> None:
    """A busy server leaves more room for bursts than a calm one, by a bounded factor even when saturated."""
    forecast = bursty(500, 14 * SECOND)
    mean = forecast.rate(14 * SECOND) / 10
    margins = [forecast.expected(100 * MS, 14 * SECOND, load) - mean for load in (0.0, 0.4, 0.6, 0.9, 1.0, 7.0)]
    assert margins[0] == margins[1] < margins[2] < margins[3] <= margins[4] == margins[5]
    assert margins[5] == pytest.approx(16 * margins[0])


def test_load_alone_is_no_reason_for_a_margin() -> None:
    """Arrivals no burstier than Poisson's are forecast alike at every load."""
    forecast = ArrivalForecast()
    now_ns = steady(forecast, 500, 10 * SECOND, 2.0)
    assert forecast.expected(100 * MS, now_ns, 0.95) == pytest.approx(forecast.expected(100 * MS, now_ns))


def test_bursty_arrivals_are_forecast_wider_than_steady_ones_of_the_same_rate() -> None:
    """The index of dispersion widens the forecast."""
    even = ArrivalForecast()
    steady(even, 500, 10 * SECOND, 4.0)
    now_ns = 14 * SECOND
    assert bursty(500, now_ns).expected(50 * MS, now_ns) > 1.2 * even.expected(50 * MS, now_ns)


def test_a_burst_is_seen_inside_its_first_bucket() -> None:
    """A herd at one instant is forecast to go on at once, not a bucket later."""
    forecast = ArrivalForecast()
    for _ in range(200):
        forecast.arrived(1, 30 * SECOND)
    assert forecast.expected(20 * MS, 30 * SECOND) > 15


def test_the_end_of_a_burst_is_seen_within_a_second() -> None:
    """A second after the last arrival, less than a twentieth of the rate is left."""
    forecast = ArrivalForecast()
    end_ns = steady(forecast, 1000, 10 * SECOND, 2.0)
    during = forecast.expected(SECOND, end_ns)
    assert forecast.expected(SECOND, end_ns + SECOND) < during / 20


def test_after_a_long_rest_nothing_is_left_of_a_rate() -> None:
    """Two quiet seconds and more leave exactly nothing, however long they were."""
    forecast = ArrivalForecast()
    end_ns = steady(forecast, 1000, 10 * SECOND, 1.0)
    assert forecast.expected(SECOND, end_ns + 3 * SECOND) == 0.0
    assert forecast.expected(SECOND, end_ns + 10**6 * SECOND) == 0.0
