"""The flags that describe a load, for `bench` and `simulate` alike: what they make, and what is wrong with them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from server.settings import SettingsError
from server.workload import FLAGS, arrivals_of


def chosen(**flags: object) -> argparse.Namespace:
    """The flags as the parser leaves them."""
    return argparse.Namespace(**dict.fromkeys(FLAGS) | {"seed": 0} | flags)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"rate": 1.0, "seed": -1}, "--seed must be at least 0"),
        ({"rate": 1.0, "cv2": 1e30}, "--cv2 .* 0 or 0.01 to 1000"),
        ({"rate": 1.0, "cv2": 1e-320}, "--cv2 .* 0 or 0.01 to 1000"),
        ({"rate": 1.0, "cv2": float("nan")}, "--cv2 .* 0 or 0.01 to 1000"),
        ({"rate": 1e9, "seconds": 1e9}, "more than 10,000,000 requests"),
        ({"rate": 1e308, "seconds": 100.0}, "more than 10,000,000 requests"),
        ({"rate": 1e7}, "more than 10,000,000 requests"),
        ({"rate": 1e-300, "seconds": 1e300}, "--seconds must be at most"),
        ({"rate": 5e-324}, "there is no request"),
        ({"rate": 1.0, "samples": 0}, "--samples must be 1 to"),
        ({"rate": 1.0, "samples": 2**40}, "--samples must be 1 to"),
    ],
)
def test_what_would_hang_or_fail_is_one_line(flags: dict[str, object], told: str) -> None:
    """It names the flag and its range, before anything is made."""
    with pytest.raises(SettingsError, match=told) as raised:
        arrivals_of(chosen(**flags), "m")
    assert "\n" not in str(raised.value)


def test_the_ends_of_the_range_make_a_load() -> None:
    """A variation of 0, the least and the most, with every seed from 0 on."""
    for cv2 in (0.0, 0.01, 1000.0):
        arrivals = arrivals_of(chosen(rate=1000.0, seconds=10.0, cv2=cv2), "m")
        assert [arrival.at_ns for arrival in arrivals] == sorted(arrival.at_ns for arrival in arrivals)


def test_a_trace_stretched_for_ever_is_one_line(tmp_path: Path) -> None:
    """The line names the file's flag and the rate."""
    (tmp_path / "t").write_text("0\n1\n")
    with pytest.raises(SettingsError, match="--trace a rate of 1e-300/s would stretch"):
        arrivals_of(chosen(trace=tmp_path / "t", rate=1e-300), "m")


def test_every_request_has_the_samples_asked_for(tmp_path: Path) -> None:
    """One without the flag; with it so many, whether the arrivals are made or traced."""
    trace = tmp_path / "trace.csv"
    trace.write_text("0\n1\n")
    assert {arrival.samples for arrival in arrivals_of(chosen(rate=100.0), "m")} == {1}
    assert {arrival.samples for arrival in arrivals_of(chosen(rate=100.0, samples=8), "m")} == {8}
    assert [arrival.samples for arrival in arrivals_of(chosen(trace=trace, samples=3), "m")] == [3, 3]
