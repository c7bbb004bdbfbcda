"""Latency profiles: what is measured, how noise and budgets are handled, and what the cache remembers."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest

from variants.measure import (
    DEFAULT_DIM,
    Example,
    ProfileCache,
    ProfileKey,
    Profiles,
    find_failures,
    measure_profiles,
    profile_batch_sizes,
    synthetic_inputs,
)
from variants.runtimes.runtime import Array, Session
from variants.variant import LatencyProfile, TensorSpec

MS = 1_000_000
NOBODY = 65534


class Clock:
    """A clock that moves only when a session runs."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


class Sleeper:
    """A session whose run takes what `duration` says for the batch size and the number of the run."""

    inputs: tuple[TensorSpec, ...] = (TensorSpec("x", "FP32", (-1, 2)),)
    outputs: tuple[TensorSpec, ...] = (TensorSpec("y", "FP32", (-1, 2)),)

    def __init__(self, clock: Clock, duration: Callable[[int, int], int], *, batch_axis: bool = True) -> None:
        self.batch_axis = batch_axis
        self.sizes: list[int] = []
        self._clock, self._duration = clock, duration

    def run(self, inputs: Mapping[str, Array]) -> list[np.ndarray[Any, Any]]:
        """Let the clock move by this run's duration."""
        size = len(inputs["x"])
        self._clock.now += self._duration(size, len(self.sizes))
        self.sizes.append(size)
        return [inputs["x"]]


ONE_SAMPLE = {"x": np.zeros((1, 2), np.float32)}


@pytest.mark.parametrize(
    ("largest", "sizes"), [(1, (1,)), (2, (1, 2)), (8, (1, 2, 4, 8)), (12, (1, 2, 4, 8, 12)), (3, (1, 2, 3))]
)
def test_batch_sizes(largest: int, sizes: tuple[int, ...]) -> None:
    """The ladder holds the powers of two and always the largest batch itself."""
    assert profile_batch_sizes(largest) == sizes


def measure_profile(session: Session, example: Example, sizes: tuple[int, ...], **more: Any) -> LatencyProfile:
    """The profile of a session that is measured alone."""
    return measure_profiles({"": session}, example, sizes, **more)[""]


def test_a_session_that_fails_is_found_and_harms_no_other() -> None:
    """What raises at a larger batch is named with the size and its own words; its neighbour has nothing to say."""
    clock = Clock()

    def fail(size: int, _: int) -> int:
        if size > 1:
            raise ValueError("no room\nfor two")
        return MS

    sessions: dict[str, Session] = {"bad": Sleeper(clock, fail), "good": Sleeper(clock, lambda _size, _run: MS)}
    assert find_failures(sessions, ONE_SAMPLE, (1, 2, 4)) == {"bad": "it fails at batch size 2: no room for two"}


def test_latencies_are_those_of_the_session() -> None:
    """On a quiet host the profile says exactly what the session takes."""
    clock = Clock()
    session = Sleeper(clock, lambda size, _: (3 + size) * MS)
    profile = measure_profile(session, ONE_SAMPLE, (1, 2, 4), budget_s=1, clock=clock)
    assert profile == LatencyProfile((1, 2, 4), (4 * MS, 5 * MS, 7 * MS))


def test_warm_up_and_disturbances_are_not_believed() -> None:
    """Neither a slow first run nor a slow spell of the host reaches the profile."""
    clock = Clock()
    slow_spell = range(10, 40)
    session = Sleeper(clock, lambda _, run: MS * (500 if run == 0 else 9 if run in slow_spell else 2))
    assert measure_profile(session, ONE_SAMPLE, (1,), budget_s=2, clock=clock).latencies_ns == (2 * MS,)


def test_a_disturbed_small_batch_is_mended() -> None:
    """A spell that outlasts all rounds of a small batch does not spoil its latency, nor that of larger ones."""
    clock = Clock()
    session = Sleeper(clock, lambda size, _: MS * (50 if size == 2 else size))
    profile = measure_profile(session, ONE_SAMPLE, (1, 2, 4, 8), budget_s=1, clock=clock)
    assert profile.latencies_ns == (MS, 4 * MS, 4 * MS, 8 * MS)


def test_a_lucky_run_is_not_believed() -> None:
    """A single run that was faster than the rest does not become the latency."""
    clock = Clock()
    session = Sleeper(clock, lambda _, run: MS if run in (1, 20) else 2 * MS)
    assert measure_profile(session, ONE_SAMPLE, (1,), budget_s=1, clock=clock).latencies_ns == (2 * MS,)


def test_ratios_hold_when_the_host_slows_down() -> None:
    """Sessions measured in turns keep their ratio although the host gets slower and slower."""
    clock = Clock()

    def drift() -> float:
        return 1 + clock.now / 1e9

    sessions: dict[str, Session] = {
        "slow": Sleeper(clock, lambda _size, _run: int(4 * MS * drift())),
        "fast": Sleeper(clock, lambda _size, _run: int(1 * MS * drift())),
    }
    profiles = measure_profiles(sessions, ONE_SAMPLE, (1, 2), budget_s=2, clock=clock)
    for size in (1, 2):
        assert profiles["slow"].latency_ns(size) / profiles["fast"].latency_ns(size) == pytest.approx(4, rel=0.15)


def test_the_budget_holds() -> None:
    """A budget large enough for some rounds is not exceeded, and most of it is used."""
    clock = Clock()
    sessions: dict[str, Session] = {name: Sleeper(clock, lambda size, _: 4 * size * MS) for name in "abc"}
    measure_profiles(sessions, ONE_SAMPLE, (1, 2, 4, 8), budget_s=2, clock=clock)
    assert 1.0e9 < clock.now <= 2e9


def test_a_slow_model_is_measured_all_the_same() -> None:
    """With no budget left every session still runs twice per size and gets a profile."""
    clock = Clock()
    session = Sleeper(clock, lambda size, _: size * 1000 * MS)
    profile = measure_profile(session, ONE_SAMPLE, (1, 2), budget_s=0.01, clock=clock)
    assert profile.latencies_ns == (1000 * MS, 2000 * MS)
    assert session.sizes == [1, 1, 2, 2]


def test_without_a_batch_axis_only_one() -> None:
    """A session without a batch axis is never given a batch, while its neighbours are."""
    clock = Clock()
    solo = Sleeper(clock, lambda _size, _run: MS, batch_axis=False)
    sessions: dict[str, Session] = {"solo": solo, "batched": Sleeper(clock, lambda _size, _run: MS)}
    profiles = measure_profiles(sessions, ONE_SAMPLE, (1, 4), budget_s=0.1, clock=clock)
    assert profiles["solo"].batch_sizes == (1,)
    assert profiles["batched"].batch_sizes == (1, 4)
    assert set(solo.sizes) == {1}


def test_inputs_may_come_from_a_function() -> None:
    """A function is asked for inputs of each batch size."""
    clock = Clock()
    session = Sleeper(clock, lambda _size, _run: MS)
    measure_profile(session, lambda size: {"x": np.ones((size, 2), np.float32)}, (1, 3), budget_s=0.0, clock=clock)
    assert session.sizes == [1, 1, 3, 3]


def test_synthetic_inputs() -> None:
    """Variable dimensions get the documented size, dim 0 the batch, and every datatype its numpy type."""
    specs = [
        TensorSpec("image", "FP32", (-1, 3, -1)),
        TensorSpec("ids", "INT64", (-1, -1)),
        TensorSpec("text", "BYTES", (-1,)),
        TensorSpec("flag", "BOOL", (-1, 1)),
    ]
    inputs = synthetic_inputs(specs, 4)
    assert inputs["image"].shape == (4, 3, DEFAULT_DIM)
    assert inputs["image"].dtype == np.float32
    assert inputs["ids"].shape == (4, DEFAULT_DIM)
    assert (inputs["ids"] == 1).all()
    assert inputs["text"].tolist() == ["1"] * 4
    assert inputs["flag"].dtype == np.bool_
    assert np.array_equal(inputs["image"], synthetic_inputs(specs, 4)["image"])


def test_synthetic_inputs_without_a_batch() -> None:
    """Where dim 0 is no batch it is a dimension like any other, and a scalar stays one."""
    specs = [TensorSpec("sequence", "FP32", (-1, 2)), TensorSpec("scale", "FP64", ())]
    inputs = synthetic_inputs(specs, 1, batch_axis=False)
    assert (inputs["sequence"].shape, inputs["scale"].shape) == ((DEFAULT_DIM, 2), ())


KEY = ProfileKey("ab" * 32, "onnxruntime", "1.2.3", "fp32", 1, "cpu", "host", (1, 2, 4), ("x float32 (1, 2)",), 1)
PROFILE = LatencyProfile((1, 2, 4), (10, 20, 30))
LONGER = LatencyProfile((1, 4), (40, 90))
PROFILES = Profiles(PROFILE, LatencyProfile((1, 2, 4), (11, 25, 50)), ((8, PROFILE), (16, LONGER)))


def test_cache_remembers(tmp_path: Path) -> None:
    """A profile is found again by another cache on the same folder, which it makes itself and leaves tidy."""
    folder = tmp_path / "deep" / "profiles"
    ProfileCache(folder).put(KEY, PROFILES)
    assert ProfileCache(folder).get(KEY) == PROFILES
    assert [path.suffix for path in folder.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "other",
    [
        replace(KEY, artefact_sha256="cd" * 32),
        replace(KEY, runtime="openvino"),
        replace(KEY, runtime_version="1.2.4"),
        replace(KEY, precision="bf16"),
        replace(KEY, threads=2),
        replace(KEY, device="cuda:0"),
        replace(KEY, host="another"),
        replace(KEY, batch_sizes=(1, 2)),
    ],
)
def test_cache_tells_apart_what_differs(tmp_path: Path, other: ProfileKey) -> None:
    """Every part of the key matters: a profile never answers for other circumstances."""
    cache = ProfileCache(tmp_path)
    cache.put(KEY, PROFILES)
    assert cache.get(other) == Profiles()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"batch_sizes": [1, 2], "latencies_ns": [1, 1]}',  # the format of 0.1, which knew profiles alone
        '{"alone": {"batch_sizes": [2, 1], "latencies_ns": [1, 1]}, "crowded": null, "lengths": null}',
        '{"alone": {"latencies_ns": 3}, "crowded": null, "lengths": null}',
        '{"alone": null, "crowded": null, "lengths": [[1]]}',
        '{"alone": null, "crowded": null}',
    ],
)
def test_cache_forgets_what_is_damaged(tmp_path: Path, text: str) -> None:
    """A damaged entry, or one of an older release, reads as absent and is replaced by the next measurement."""
    cache = ProfileCache(tmp_path)
    cache.put(KEY, PROFILES)
    next(tmp_path.iterdir()).write_text(text)
    assert cache.get(KEY) == Profiles()
    cache.put(KEY, PROFILES)
    assert cache.get(KEY) == PROFILES


def test_no_cache_is_no_failure(tmp_path: Path) -> None:
    """Without a folder, or where none can be made, everything works and nothing is remembered."""
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    for cache in (ProfileCache(None), ProfileCache(blocked / "profiles")):
        cache.put(KEY, PROFILES)
        assert cache.get(KEY) == Profiles()


@contextmanager
def unprivileged(folder: Path) -> Iterator[None]:
    """Give the folder to somebody who is not root and be that somebody: root may write everywhere."""
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, -1)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


def test_a_read_only_folder_is_no_failure() -> None:
    """A folder that may only be read still answers, and forgets silently."""
    with TemporaryDirectory() as name, unprivileged(folder := Path(name)):
        cache = ProfileCache(folder)
        cache.put(KEY, PROFILES)
        folder.chmod(0o500)
        with pytest.raises(PermissionError):
            (folder / "probe").touch()
        cache.put(replace(KEY, threads=2), PROFILES)
        assert cache.get(KEY) == PROFILES
        assert cache.get(replace(KEY, threads=2)) == Profiles()
        folder.chmod(0o700)
